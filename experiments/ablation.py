"""Arms x seeds, treated alike: settings chosen on validation, the test split read once.

python -m experiments.ablation --config=configs/recall.py --workdir=runs/ablation
    [--arms=bayesian,prior-free,full-only,local+full] [--seeds=5] [--views=tokens,flops]
    [--shard=0/2] [--notune]

1. For every arm, one field after the other is chosen on the validation split with a seed of its own
   (`arms.grids`: learning rate, and what else the arm has): of the settings within 0.005 nats of the
   best, hard, the cheapest. Written to `tune/<arm>/chosen.json`.
2. Every arm is trained with every seed (`runs/<arm>/seed<k>`), and read on the test split once
   (`test.json` in the run directory).
3. View `flops`: arms whose step costs less than the first arm's get steps in proportion
   (`equal_flops/<arm>/seed<k>`).
4. `table.md`, `table.csv`, `rows.json`: means with 95 % intervals, differences paired by seed.

Each run is an ordinary run directory. Interrupted, start it again. Processes with --shard=i/n share
the arms in one directory; whoever is last writes the whole table.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Optional

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import arms, common
from experiments.comparison import choose, parse_shard, write_tables
from experiments.scores import scores
from meta_attention_jax import analysis
from meta_attention_jax.training import build
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, prepare, train
from meta_attention_jax.training.run import open_run

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where all runs and the tables go.")
ARMS = flags.DEFINE_list("arms", list(arms.DEFAULT), "Arms; the first is the reference of FLOPs.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds per arm.", 1)
VIEWS = flags.DEFINE_list("views", ["tokens", "flops"], "tokens, flops, or both.")
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: this process takes every n-th arm, from i on.")
TUNE = flags.DEFINE_bool("tune", True, "Choose settings on validation first.")
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Batches of the test split.", 1)
flags.mark_flags_as_required(["config", "workdir"])

TUNING_SEED = 1000
SAME_FLOPS = 0.03
"""Arms whose step costs within this share of the reference's have no run of their own in `flops`."""


def run_one(config: ConfigDict, path: pathlib.Path) -> Optional[str]:
    """Trains, or goes on, or finds it done; what went wrong if the run diverged."""
    failed = path.parent / f"{path.name}.diverged"
    if failed.exists():
        return failed.read_text()
    with common.user_mistakes():
        job = prepare(config, path)
    try:
        train(job, label=str(path.relative_to(WORKDIR.value)))
    except Diverged as error:
        analysis.write_text(failed, str(error))
        print(f"{path}: {error}")
        return str(error)
    return None


def validation(path: pathlib.Path) -> dict[str, float]:
    """Hard nats and cost of a finished run's last evaluation."""
    last = [r for r in read_metrics(path) if r["event"] == "eval"][-1]["hard"]
    return {"nll": last["nll"], "cost": last["cost"]}


def tune(config: ConfigDict, arm: str, root: pathlib.Path) -> dict[str, float]:
    """Settings of an arm, chosen on validation one field after the other; see `arms.grids`."""
    done = root / "chosen.json"
    if done.exists():
        return json.loads(done.read_text())["chosen"]
    base = arms.configured(config, arm)
    fields = [(field, base[field.split(".")[0]][field.split(".")[1]], factors)
              for field, factors in arms.grids(arm)]
    chosen = {field: float(value) for field, value, _ in fields}
    tried_all = []
    for field, start, factors in fields:
        tried = {}
        for factor in factors:
            value = float(start * factor)
            settings = {**chosen, field: value}
            # One directory per setting: what an earlier field has tried is not run again.
            label = ",".join(f"{f.split('.')[1]}={v:.4g}" for f, v in settings.items())
            candidate = arms.configured(config, arm, seed=TUNING_SEED, **settings)
            if run_one(candidate, root / label) is None:
                tried[value] = validation(root / label)
                tried_all.append({"settings": settings, **tried[value]})
        if not tried:
            common.fail(f"{field}: expected a value in {root} that does not diverge, got none.")
        chosen[field] = choose(tried)
    analysis.write_json(done, {"chosen": chosen, "tried": tried_all})
    return chosen


def measure(path: pathlib.Path) -> None:
    """`test.json` of a finished run, once."""
    if not (path / "test.json").exists():
        analysis.write_json(
            path / "test.json", scores(open_run(path), "test", max_batches=TEST_BATCHES.value)
        )


def flops_per_token(config: ConfigDict) -> float:
    """Forward FLOPs per token of a training step in mode soft."""
    vocab = build.build_dataset(config).vocab_size
    flops = build.build_flops(config, vocab)
    if config.controller.name != "fixed":
        return flops.dense
    pattern, layers = config.controller.fixed, config.model.num_layers
    ran = [pattern[i % len(pattern)] for i in range(layers)]
    return flops.routed({name: ran.count(name) / layers for name in set(ran)})


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    with common.user_mistakes():
        index, number = parse_shard(SHARD.value)
        if unknown := set(VIEWS.value) - {"tokens", "flops"}:
            raise ValueError(f"views: expected tokens or flops, got {sorted(unknown)[0]!r}.")
        for arm in ARMS.value:
            build.check(arms.configured(CONFIG.value, arm))
        reference = flops_per_token(arms.configured(CONFIG.value, ARMS.value[0]))
    for arm in ARMS.value[index::number]:
        print(f"\n{arm}")
        chosen = tune(CONFIG.value, arm, root / "tune" / arm) if TUNE.value else {}
        settings = [("runs", CONFIG.value.train.steps)] if "tokens" in VIEWS.value else []
        ratio = reference / flops_per_token(arms.configured(CONFIG.value, arm))
        if "flops" in VIEWS.value and abs(ratio - 1.0) > SAME_FLOPS:
            settings.append(("equal_flops", round(CONFIG.value.train.steps * ratio)))
        for folder, steps in settings:
            for seed in range(SEEDS.value):
                path = root / folder / arm / f"seed{seed}"
                changes = {**chosen, "seed": seed, "train.steps": steps}
                if run_one(arms.configured(CONFIG.value, arm, **changes), path) is None:
                    measure(path)
    write_tables(root, ARMS.value)


if __name__ == "__main__":
    common.run(main)
