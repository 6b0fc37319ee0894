"""Arms x seeds, treated alike: settings chosen on validation, the test split read once.

python -m experiments.ablation --config=configs/recall.py --workdir=runs/ablation
    [--arms=bayesian,prior-free,full-only,local+full] [--seeds=5] [--views=tokens,flops]
    [--shard=0/2] [--notune]

1. For every arm, one field after the other is chosen on the validation split with a seed of its own
   (`arms.grids`): the learning rate by hard nats, and what else the arm has by cost: the cheapest of
   the settings tried at this learning rate within 0.005 hard nats of the best of them. Written to
   `tune/<arm>/chosen.json`.
2. Every arm is trained with every seed (`runs/<arm>/seed<k>`), and read on the test split once
   (`test.json` in the run directory).
3. View `flops`: arms whose step costs less than the first arm's get steps in proportion
   (`equal_flops/<arm>/seed<k>`); those whose step costs the same stand there with the runs of 2.
4. `table.md`, `table.csv`, `rows.json`: means with 95 % intervals, differences paired by seed.

Arms without a gate (`bayesian@soft`) take over the settings of the arm with one. Each run is an
ordinary run directory. Interrupted, start it again. Processes with --shard=i/n share
the arms in one directory; whoever is last writes the whole table.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Optional

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import common
from experiments.studies import arms, comparison, final, pinned
from experiments.studies.comparison import SAME, TOLERANCE, choose, parse_shard, write_tables
from experiments.studies.scores import measure
from meta_attention_jax import analysis
from meta_attention_jax.config import config_to_dict
from meta_attention_jax.data.manifest import MANIFEST
from meta_attention_jax.fields import expect
from meta_attention_jax.training import build
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.processes import Busy

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = common.define_path("workdir", None, "Where all runs and the tables go.")
ARMS = flags.DEFINE_list("arms", list(arms.DEFAULT), "Arms; the first is the reference of FLOPs.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds per arm.", 1)
VIEWS = flags.DEFINE_list("views", ["tokens", "flops"], "tokens, flops, or both.")
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: this process takes every n-th arm, from i on.")
TUNE = flags.DEFINE_bool("tune", True, "Choose settings on validation first.")
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Batches of the test split.", 1)
flags.mark_flags_as_required(["config", "workdir"])

TUNING_SEED = 1000
LEARNING_RATE = "optimizer.learning_rate"
SAME_FLOPS = 0.03
"""Arms whose step costs within this share of the reference's have no run of their own in `flops`."""


def run_one(config: ConfigDict, path: pathlib.Path) -> Optional[str]:
    """Trains, or goes on, or finds it done; what went wrong if the run diverged."""
    failed = path.parent / f"{path.name}.diverged"
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    with common.user_mistakes():
        job = prepare(config, path)
    try:
        train(job, label=str(path.relative_to(WORKDIR.value)), final=final.of_run)
    except Busy as error:
        common.fail(error)
    except Diverged as error:
        analysis.write_text(failed, str(error))
        print(f"{path}: {error}")
        return str(error)
    return None


def validation(path: pathlib.Path) -> dict[str, float]:
    """Hard nats and cost of a finished run's last evaluation."""
    last = [r for r in read_metrics(path) if r["event"] == "eval"][-1]["hard"]
    return {"nll": last["nll"], "cost": last["cost"]}


def tune(config: ConfigDict, arm: str, root: pathlib.Path) -> Optional[dict[str, float]]:
    """Settings of an arm, chosen on validation; None if all diverged.

    The learning rate is that of the best hard nats. Then, after each further field of `arms.grids`, the search goes on
    from the cheapest setting tried at this learning rate that is within TOLERANCE of the best of them.
    """
    done = root / "chosen.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))["chosen"]
    base = arms.configured(config, arm)
    fields = [(field, base[field.split(".")[0]][field.split(".")[1]], factors) for field, factors in arms.grids(arm)]
    best = {field: float(value) for field, value, _ in fields}
    tried: dict[str, dict[str, Any]] = {}
    for field, start, factors in fields:
        for factor in factors:
            settings = {**best, field: float(start * factor)}
            label = ",".join(f"{f.split('.')[1]}={v:.4g}" for f, v in settings.items())
            candidate = arms.configured(config, arm, seed=TUNING_SEED, **settings)
            if label not in tried and run_one(candidate, root / label) is None:
                tried[label] = {"settings": settings, **validation(root / label)}
        if not tried:
            return None
        if field == LEARNING_RATE:
            best = min(tried.values(), key=lambda result: result["nll"])["settings"]
        else:
            at_rate = [result for result in tried.values() if result["settings"][LEARNING_RATE] == best[LEARNING_RATE]]
            best = choose(at_rate)
    analysis.write_json(done, {"chosen": best, "tried": list(tried.values())})
    return best


def compare(arm: str, ratio: float, root: pathlib.Path) -> None:
    """Tunes and trains one arm in all seeds and views; `ratio`: the reference's FLOPs over its own."""
    chosen: Optional[dict[str, float]] = {}
    if TUNE.value:
        base = arms.base_arm(arm)
        chosen = tune(CONFIG.value, base, root / "tune" / base)
        if chosen is None:
            print(f"{arm}: every setting diverged")
            return
    steps = {"runs": CONFIG.value.train.steps}
    if "flops" in VIEWS.value:
        if abs(ratio - 1.0) <= SAME_FLOPS:
            analysis.write_text(root / "equal_flops" / arm / SAME, "")
        else:
            steps["equal_flops"] = round(CONFIG.value.train.steps * ratio)
            if "tokens" not in VIEWS.value:
                del steps["runs"]
    for folder, count in steps.items():
        for seed in range(SEEDS.value):
            path = root / folder / arm / f"seed{seed}"
            changes = {**chosen, "seed": seed, "train.steps": count}
            if run_one(arms.configured(CONFIG.value, arm, **changes), path) is None:
                measure(path, CONFIG.value, max_batches=TEST_BATCHES.value)


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    with common.user_mistakes():
        index, number = parse_shard(SHARD.value)
        for view in sorted(VIEWS.value):
            expect(view in comparison.VIEWS, "views", "tokens or flops", view)
        distinct = ARMS.value and len(set(ARMS.value)) == len(ARMS.value)
        expect(distinct, "arms", "distinct names, at least one", ARMS.value)
        if CONFIG.value.prior.costs == "measured":
            raise ValueError("prior.costs: expected costs that are the same for all runs, got 'measured'.")
        configs = {arm: arms.configured(CONFIG.value, arm) for arm in ARMS.value}
        for config in configs.values():
            build.check(config)
        dataset = build.build_dataset(configs[ARMS.value[0]])
        shared = {
            "config": config_to_dict(CONFIG.value), "tune": TUNE.value, "test_batches": TEST_BATCHES.value,
            "reference": ARMS.value[0], "tolerance": TOLERANCE,
        }
        begun = [path.parent for path in sorted(root.glob(f"*/*/*/{MANIFEST}"))]
        data = {"all": pinned.Data(dataset, begun)}
        pinned.pin(root / "ablation.json", shared, "a comparison", data=data)
    flops = {arm: build.soft_flops(config, build.build_flops(config, dataset.vocab_size))
             for arm, config in configs.items()}
    # Arms that share their settings stay together, or two processes would choose them at once.
    bases = list(dict.fromkeys(map(arms.base_arm, ARMS.value)))[index::number]
    for arm in ARMS.value:
        if arms.base_arm(arm) in bases:
            print(f"\n{arm}")
            compare(arm, flops[ARMS.value[0]] / flops[arm], root)
    write_tables(root, ARMS.value)


if __name__ == "__main__":
    common.run(main)
