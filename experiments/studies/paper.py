"""The four numbers of the paper (arXiv 2605.28384), run and not projected.

python -m experiments.studies.paper --workdir=runs/paper [--out=experiments/results/paper]

Trains the sweeps of `configs/sweep_paper.py` and `configs/sweep_paper_recall.py`, evaluates every run on
the test split, soft and hard (nothing is chosen by it), and writes rows, tables, pictures and a page.
Started again, it goes on; what is finished is not done again.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import sweep_paper, sweep_paper_recall
from experiments import common
from experiments.studies import pinned, sweeps
from experiments.studies.paper_report import write_results
from meta_attention_jax import analysis
from meta_attention_jax.config import config_to_dict, read_stored
from meta_attention_jax.controller.prior import make_prior
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.training import build

WORKDIR = common.define_path("workdir", "runs/paper", "Where the runs go.")
OUT = common.define_path("out", None, "Where the results go; the workdir when absent.")
AT_ONCE = flags.DEFINE_integer("points_at_once", 10, "Points of one program at most.", 1)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split.", 1)
CORPORA = {"tiny_lm": sweep_paper, "recall": sweep_paper_recall}


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


def rows_of(root: pathlib.Path, corpus: str, module: Any, at_once: int) -> list[dict[str, Any]]:
    """Trains what is not trained, evaluates what is not evaluated, and returns all rows of a corpus."""
    base, points = module.get_config(), module.get_sweep()
    with common.user_mistakes():
        names = algebra.kept_labels(points, sweeps.stored_points(root), base)
        points = dict(zip(names, points))
        configs = {name: algebra.configured(base, point) for name, point in points.items()}
        for config in configs.values():
            build.check(config)
        datasets = sweeps.open_datasets(configs.values())
        pinned.pin(
            root / "sweep.json", {"config": config_to_dict(base), "points": points}, "this sweep",
            grows="points", data=sweeps.data_of(root, configs, datasets),
        )
        jobs = sweeps.prepared(root, configs, datasets)
    sweeps.train_points(root, jobs, at_once=at_once)
    rows = []
    for count, (name, point) in enumerate(points.items(), 1):
        path = root / "points" / name
        row = {"corpus": corpus, "arm": point["name"], "seed": point["seed"],
               "beta": float(configs[name].objective.beta)}
        if sweeps.failed(root, name).exists():
            rows.append({**row, "diverged": True})
            continue
        if not (path / "test.json").exists():
            print(f"{corpus}, test split: {count}/{len(points)} {name}", flush=True)
            run = load_run(path, step=configs[name].train.steps)
            analysis.write_json(path / "test.json", measured(run))
        rows.append({**row, **read_stored(path / "test.json", "a result")})
    return rows


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    out = pathlib.Path(OUT.value or WORKDIR.value)
    # Runs of one arm and split are one program, compiled once.
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    rows: list[dict[str, Any]] = []
    for corpus, module in CORPORA.items():
        rows += rows_of(root / corpus, corpus, module, AT_ONCE.value)
        write_results(out, rows)


if __name__ == "__main__":
    common.run(main)
