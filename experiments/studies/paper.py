"""The four numbers of the paper (arXiv 2605.28384), run and not projected.

python -m experiments.studies.paper --workdir=runs/paper [--out=experiments/results/paper]

Trains the sweeps of `configs/sweep_paper.py` and `configs/sweep_paper_recall.py`, evaluates every run on
the test split, soft and hard (nothing is chosen by it), and writes rows, tables, pictures and a page.
Started again, it goes on; what has its row in `rows.json` of the results is not done again.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import sweep_paper, sweep_paper_recall
from experiments import common
from experiments.benchmarks.common import commit
from experiments.studies import sweeps
from experiments.studies.paper_report import write_results
from meta_attention_jax.config import read_stored
from meta_attention_jax.controller.prior import make_prior
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.training import build

WORKDIR = common.define_path("workdir", "runs/paper", "Where the runs go.")
OUT = common.define_path("out", None, "Where the results go; the workdir when absent.")
AT_ONCE = flags.DEFINE_integer("points_at_once", 10, "Points of one program at most.", 1)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split.", 1)
CORPORA = {"recall": sweep_paper_recall, "tiny_lm": sweep_paper}


def measured(run: Run) -> dict[str, Any]:
    """What one run has to show on the test split.

    `projected_cost` and `expected_cost` are those of the soft run's posterior means, by their argmax and
    as they are; `cost` is what the hard run's routes cost; `prior_cost` what the prior's mean does.
    """
    soft, hard = (
        run.evaluate("test", mode=mode, max_batches=TEST_BATCHES.value) for mode in ("soft", "hard")
    )
    found = {
        "step": run.step, "tokens": hard["tokens"],
        "nll_soft": soft["nll"], "nll_hard": hard["nll"], "gap": hard["nll"] - soft["nll"],
        "projected_cost": soft["cost"], "expected_cost": soft["expected_cost"], "cost": hard["cost"],
        "routing_entropy": soft["routing_entropy"], "usage_entropy": soft["usage_entropy"],
        "collapsed": hard["collapsed_layers"] / run.config.model.num_layers,
        "full": hard["fraction/full"], "kl": soft["kl"],
    }
    if run.config.controller.name == "bayesian":
        hypers = run.hypers.routing
        mean = make_prior(run.config.prior.family, hypers).mean
        found["prior_cost"] = float(np.asarray(mean) @ np.asarray(hypers.costs))
    return found


def points_of(module: Any) -> dict[str, dict[str, Any]]:
    """Points of a sweep by arm: the label of a run is its arm and seed."""
    arms: dict[str, dict[str, Any]] = {}
    for point in module.get_sweep():
        arms.setdefault(point["name"], {})[f"{point['name']}, seed {point['seed']}"] = point
    return arms


def arm_rows(
    root: pathlib.Path, corpus: str, base: ConfigDict, points: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Trains what is not trained, as one program, and yields the rows."""
    with common.user_mistakes():
        configs = {
            algebra.labels([point])[0] + f",seed={point['seed']}": algebra.configured(base, point)
            for point in points.values()
        }
        for config in configs.values():
            build.check(config)
        jobs = sweeps.prepared(root, configs, sweeps.open_datasets(configs.values()))
    sweeps.train_points(root, jobs, at_once=AT_ONCE.value)
    for (name, config), point in zip(configs.items(), points.values()):
        row = {"corpus": corpus, "arm": point["name"], "seed": point["seed"],
               "beta": float(config.objective.beta), "commit": commit()}
        if sweeps.failed(root, name).exists():
            yield {**row, "diverged": True}
            continue
        print(f"{corpus}, test split: {name}", flush=True)
        yield {**row, **measured(load_run(root / "points" / name, step=config.train.steps))}


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    out = pathlib.Path(OUT.value or WORKDIR.value)
    # Runs of one arm and split are one program, compiled once.
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    rows = []
    if (out / "rows.json").exists():
        with common.user_mistakes():
            rows = read_stored(out / "rows.json", "rows of this study")["rows"]
    total = sum(len(module.get_sweep()) for module in CORPORA.values())
    for corpus, module in CORPORA.items():
        base, arms = module.get_config(), points_of(module)
        # The weights of the KL are one arm at nine weights, and so one program.
        weights = {k: v for arm, points in arms.items() if " at " in arm for k, v in points.items()}
        groups = [points for arm, points in arms.items() if " at " not in arm] + [weights] * bool(weights)
        for number, points in enumerate(groups, 1):
            have = {(row["corpus"], row["arm"], row["seed"]) for row in rows}
            left = {k: p for k, p in points.items() if (corpus, p["name"], p["seed"]) not in have}
            print(f"{corpus}, {number}/{len(groups)}: {len(left)} of {len(points)} runs to go", flush=True)
            for row in arm_rows(root / corpus, corpus, base, left) if left else ():
                rows.append(row)
                write_results(out, rows, total)
    write_results(out, rows, total)


if __name__ == "__main__":
    common.run(main)
