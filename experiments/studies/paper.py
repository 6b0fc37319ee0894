"""The four numbers of the paper (arXiv 2605.28384), run and not projected.

python -m experiments.studies.paper --workdir=runs/paper [--out=experiments/results/paper]

Trains the sweeps of `configs/sweep_paper.py` and `configs/sweep_paper_recall.py`, evaluates every run on
the test split, soft and hard (nothing is chosen by it), and writes rows, tables, pictures and a page.
Started again, it goes on; what has its row in `rows.json` of the results is not done again.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import sweep_paper, sweep_paper_recall
from experiments import common
from experiments.benchmarks.common import commit
from experiments.studies import sweeps
from experiments.studies.paper_report import AT_WEIGHT, write_results
from meta_attention_jax.config import read_stored
from meta_attention_jax.controller.prior import make_prior
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.space import Point
from meta_attention_jax.training import build
from meta_attention_jax.training.parallel import device_per_core

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
    soft, hard = (run.evaluate("test", mode=mode, max_batches=TEST_BATCHES.value) for mode in ("soft", "hard"))
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


def groups_of(points: Sequence[Point]) -> list[list[Point]]:
    """The points of an arm, which are one program; the weights of the KL are one arm at nine weights."""
    arms: dict[str, list[Point]] = {}
    for point in points:
        arms.setdefault(AT_WEIGHT if AT_WEIGHT in point["name"] else point["name"], []).append(point)
    return list(arms.values())


def arm_rows(root: pathlib.Path, corpus: str, base: ConfigDict, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Trains what is not trained, as one program, and yields the rows."""
    with common.user_mistakes():
        configs = {
            algebra.labels([point])[0] + f",seed={point['seed']}": algebra.configured(base, point)
            for point in points
        }
        for config in configs.values():
            build.check(config)
        jobs = sweeps.prepared(root, configs, sweeps.open_datasets(configs.values()))
    sweeps.train_points(root, jobs, at_once=AT_ONCE.value)
    for (name, config), point in zip(configs.items(), points, strict=True):
        row = {"corpus": corpus, "arm": point["name"], "seed": point["seed"],
               "beta": float(config.objective.beta), "commit": commit()}
        if sweeps.failed(root, name).exists():
            yield {**row, "diverged": True}
            continue
        print(f"{corpus}, test split: {name}", flush=True)
        yield {**row, **measured(load_run(root / "points" / name, step=config.train.steps))}


def stored_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """What the study has found so far; raises ValueError for a file of something else."""
    rows = read_stored(path, "rows of this study").get("rows")
    whole = lambda row: isinstance(row, dict) and {"corpus", "arm", "seed", "beta"} <= row.keys()  # noqa: E731
    if not (isinstance(rows, list) and all(map(whole, rows))):
        raise ValueError(f"out: expected rows of this study in {str(path)!r}, got something else.")
    return rows


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    out = pathlib.Path(OUT.value or WORKDIR.value)
    with common.user_mistakes():
        rows = stored_rows(out / "rows.json") if (out / "rows.json").exists() else []
    device_per_core()
    total = sum(len(module.get_sweep()) for module in CORPORA.values())
    for corpus, module in CORPORA.items():
        base, groups = module.get_config(), groups_of(module.get_sweep())
        have = {(row["arm"], row["seed"]) for row in rows if row["corpus"] == corpus}
        for number, points in enumerate(groups, 1):
            left = [point for point in points if (point["name"], point["seed"]) not in have]
            print(f"{corpus}, {number}/{len(groups)}: {len(left)} of {len(points)} runs to go", flush=True)
            for row in arm_rows(root / corpus, corpus, base, left) if left else ():
                rows.append(row)
                write_results(out, rows, total)
    write_results(out, rows, total)


if __name__ == "__main__":
    common.run(main)
