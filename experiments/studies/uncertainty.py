"""Does uncertainty mean anything? Risk-coverage of each measure, and the frontier of gated mode.

python -m experiments.studies.uncertainty --runs=runs/a,runs/b --out=runs/uncertainty
    [--corpus=path:WHERE_THE_DATA_ARE_NOW]

Harm of a token: its nats with all tokens hard less its nats with all tokens soft, so it contains what
hardening the tokens before has changed in the keys of later layers. `gain`: how much of the way from
random order to the order by harm itself a measure goes, hardening tokens in order of rising u (mean
over layers). Frontier: gated mode at thetas that are quantiles of u on the validation split; a soft
token costs the sum of all mechanisms. The best theta is chosen on validation and read on test.

The question is about models that were trained soft (arms such as `bayesian@soft` of the ablation): a
run that ends hard is off its training distribution when soft. Runs of one config name (seeds) are
averaged. Writes `table.md`, `rows.json`, `risk.png`, `frontier.png`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from experiments.studies.comparison import UNCERTAINTY_COLUMNS
from experiments.studies.scores import per_token
from meta_attention_jax import analysis
from meta_attention_jax.analysis import frontier_figure, risk_coverage_figure
from meta_attention_jax.analysis.statistics import interval, risk_coverage
from meta_attention_jax.controller.baselines import measures_of
from meta_attention_jax.fields import expect
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run

RUNS = flags.DEFINE_list("runs", None, "Run directories that route.")
OUT = common.define_path("out", None, "Where table and pictures go.")
BATCHES = flags.DEFINE_integer("batches", 16, "Batches of the split.", 1)
DATA = common.define_data()
flags.mark_flags_as_required(["runs", "out"])

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def arrays(run: Run, split: str, *, mode: str, measure: str, theta: float = 1.0) -> dict[str, Any]:
    """Per-token arrays of a run in a mode, with u by a measure."""
    return per_token(run, split, mode=mode, max_batches=BATCHES.value, measure=measure, theta=theta)


def cost_of(result: dict[str, Any], costs: np.ndarray) -> float:
    """Mean cost of what runs: of k* at hard tokens, of all mechanisms at soft ones."""
    return float(np.mean(np.where(result["hard"], costs[result["route"]], costs.sum())))


def study(run: Run, measure: str, split: str, thetas: list[float]) -> dict[str, Any]:
    """Risk-coverage and frontier of one run by one measure on one split."""
    soft = arrays(run, split, mode="soft", measure=measure)
    hard = arrays(run, split, mode="hard", measure=measure)
    curve = risk_coverage(soft.get("log_uncertainty", soft["uncertainty"]).mean(0), hard["nll"] - soft["nll"])
    costs = np.asarray(run.hypers.routing.costs)
    points = []
    for theta in thetas:
        result = arrays(run, split, mode="gated", measure=measure, theta=theta)
        points.append({
            "theta": theta, "nll": float(result["nll"].mean()),
            "cost": cost_of(result, costs), "hard": float(result["hard"].mean()),
        })
    return {"curve": curve, "frontier": points}


def both_splits(run: Run, measure: str) -> dict[str, Any]:
    """The study on test, with the point that validation finds best (`best`) marked."""
    u = arrays(run, "validation", mode="soft", measure=measure)["uncertainty"]
    # theta = 0 means that nothing is hard, even where u is 0.
    inner = [max(float(np.quantile(u, q)), 1e-9) for q in QUANTILES[1:-1]]
    thetas = [0.0, *inner, 1.0]
    seen = study(run, measure, "validation", thetas)
    best = int(np.argmin([p["nll"] for p in seen["frontier"]]))
    return {**study(run, measure, "test", thetas), "validation": seen, "best": best}


def averaged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Curves and points of several seeds, averaged place by place."""
    curve = {key: np.mean([r["curve"][key] for r in results], axis=0) for key in results[0]["curve"]}
    points = [
        {key: float(np.mean([p[key] for p in same])) for key in same[0]}
        for same in zip(*(r["frontier"] for r in results))
    ]
    return {"curve": curve, "frontier": points}


def main() -> None:
    with common.user_mistakes():
        if not RUNS.value:
            raise ValueError("runs: expected at least one run directory, got none.")
        runs = [load_run(path, **DATA()) for path in RUNS.value]
        for run in runs:
            expect(run.config.controller.name != "fixed", "runs", "runs that route", str(run.path))
            run.dataset  # Opened here, where its errors are the user's.
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for measure in measures_of(run.config.controller.name):
            print(f"{run.path}: {measure}", flush=True)
            found.setdefault(f"{run.config.name}, {measure}", []).append(both_splits(run, measure))
    rows, means = [], {name: averaged(results) for name, results in found.items()}
    for name, results in found.items():
        gain, gain_pm = interval([r["curve"]["gain"] for r in results])
        points = means[name]["frontier"]
        chosen = [r["frontier"][r["best"]] for r in results]
        rows.append({
            "name": name, "seeds": len(results),
            "gain": analysis.with_interval({"gain": gain, "gain_pm": gain_pm}, "gain", ".1%"),
            "harm": float(np.mean([r["curve"]["random"] for r in results])),
            "gain_validation": float(np.mean([r["validation"]["curve"]["gain"] for r in results])),
            **{f"best_{key}": float(np.mean([p[key] for p in chosen])) for key in ("nll", "cost")},
            "hard_nll": points[-1]["nll"], "hard_cost": points[-1]["cost"],
        })
    out = pathlib.Path(OUT.value)
    print(analysis.terminal_table(rows, UNCERTAINTY_COLUMNS))
    analysis.write_text(out / "table.md", analysis.markdown_table(rows, UNCERTAINTY_COLUMNS))
    analysis.write_json(out / "rows.json", {"rows": rows, "studies": found})
    with common.spared("pictures"):
        for part, figure, file in (("curve", risk_coverage_figure, "risk"), ("frontier", frontier_figure, "frontier")):
            analysis.save(figure({name: mean[part] for name, mean in means.items()}), out / f"{file}.png")
        print(f"pictures: {out}/risk.png, {out}/frontier.png")


if __name__ == "__main__":
    common.run(main)
