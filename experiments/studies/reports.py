"""One page for a run, an ablation or a sweep, from its directory. No flags, no training."""

from __future__ import annotations

import functools
import html
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.common import spared
from experiments.studies import arms, comparison, final, outcome
from experiments.studies.samples import text_of
from experiments.studies.scores import per_token
from meta_attention_jax import analysis
from meta_attention_jax.analysis import Section
from meta_attention_jax.analysis.statistics import risk_coverage
from meta_attention_jax.config import read_stored
from meta_attention_jax.controller.prior import make_prior
from meta_attention_jax.files import Place, run_directory
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.logs import read_metrics

SHOWN_ROWS = 6
RISK_BATCHES = 4


def report(workdir: str | os.PathLike[str], **data: Any) -> tuple[str, Callable[[], str]]:
    """(what it is, what makes its page); all that can be wrong with the directory is said first.

    `data`: `corpus` and `data_split` of `load_run`, for a run.
    """
    root = run_directory("workdir", workdir)
    if (root / "ablation.json").is_file():
        _shared(root / "ablation.json", "config")
        rows = comparison.collect(root)
        if not rows:
            raise ValueError(f"workdir: expected finished runs in {str(root)!r}, got none yet.")
        return "ablation", functools.partial(ablation_page, root, rows)
    if (root / "sweep.json").is_file():
        stored = _shared(root / "sweep.json", "config", "points")
        result = outcome.result(root, stored["points"])
        if not result.done:
            raise ValueError(f"workdir: expected finished points in {str(root)!r}, got none yet.")
        return "sweep", functools.partial(sweep_page, result, stored["config"]["name"])
    if (root / "config.json").is_file():
        run = load_run(root, **data)
        held_out = [r for r in read_metrics(run.path) if r["event"] == "eval"]
        if not held_out:
            raise ValueError(f"workdir: expected an evaluation in {str(root)!r}, got none yet.")
        for mode in ("soft", "hard"):
            found = held_out[-1].get(mode)
            if not (isinstance(found, dict) and {"nll", "kl", "cost", "layers"} <= found.keys()):
                wanted = f"a {mode} evaluation at the end of {str(run.path / 'metrics.jsonl')!r}"
                raise ValueError(f"workdir: expected {wanted}, got something else.")
        run.dataset  # Opened now, for what can be wrong with it.
        return "run", functools.partial(run_page, run)
    raise ValueError(f"workdir: expected the directory of a run, an ablation or a sweep, got {str(workdir)!r}.")


def _shared(path: Place, *keys: str) -> dict[str, Any]:
    """What the runs of a comparison or a sweep share: the config, with its name, and the points."""
    stored = read_stored(path)
    parts = [stored.get(key) for key in keys]
    ok = all(isinstance(part, dict) for part in parts) and isinstance(parts[0].get("name"), str)
    if not (ok and all(isinstance(point, dict) for part in parts[1:] for point in part.values())):
        raise ValueError(f"workdir: expected {' and '.join(keys)} in {str(path)!r}, got something else.")
    return stored


def run_page(run: Run) -> str:
    """How training went, where tokens go, and what posteriors look like."""
    records = read_metrics(run.path)
    held_out = [r for r in records if r["event"] == "eval"]
    rows, columns = final.table_of(held_out[-1], run.mechanisms)
    batch, routing = run.routed_batch()
    real = np.asarray(batch.segment_ids) > 0
    figures = [
        *final.figures_of(records, run.mechanisms, run.config.data.corpus, run.config.name).items(),
        ("Positions", lambda: analysis.routing_by_position(routing.route, real, run.mechanisms)),
    ]
    if routing.concentration is not None:
        if len(run.mechanisms) == 3:
            prior = np.asarray(make_prior(run.config.prior.family, run.hypers.routing).concentration)
            prior = prior / prior.sum()
            drawn = lambda: analysis.simplex_figure(routing.mean[:, real], run.mechanisms, prior=prior)  # noqa: E731
            figures.append(("Posteriors", drawn))
        concentration = routing.concentration[:, real]
        figures.append(("Entropy", lambda: analysis.entropy_split_figure(concentration, run.mechanisms)))
    if run.config.controller.name != "fixed":
        figures.append(("Uncertainty", lambda: risk_figure(run)))
    sections = [Section(f"Validation at step {held_out[-1]['step']}", analysis.table_html(rows, columns))]
    sections += [
        Section(name, html_) for name, figure in figures
        if (html_ := _drawn(f"{run.config.name}: {name.lower()}", figure))
    ]
    sections.append(Section("Held-out text", analysis.coloured_html(
        **text_of(run, batch, routing, real[:SHOWN_ROWS]), title=run.config.name,
        caption="Each token is coloured by its mechanism; pale means uncertain.",
    )))
    config = json.dumps(json.loads((run.path / "config.json").read_text(encoding="utf-8")), indent=1)
    sections.append(Section("Config", f"<pre>{html.escape(config)}</pre>"))
    return analysis.html_page(f"{run.config.name}, step {run.step}", sections)


def _drawn(description: str, figure: Callable[[], Figure]) -> str:
    """The HTML of a figure; "" with a warning where it cannot be drawn."""
    with spared(description):
        return analysis.figure_html(figure(), description)
    return ""


def risk_figure(run: Run) -> Any:
    """Whether uncertainty finds the tokens that hardening hurts, on some validation batches."""
    soft, hard = (per_token(run, "validation", mode=mode, max_batches=RISK_BATCHES) for mode in ("soft", "hard"))
    curve = risk_coverage(soft["uncertainty"].mean(0), hard["nll"] - soft["nll"])
    return analysis.risk_coverage_figure({run.config.controller.uncertainty: curve})


def ablation_page(root: Place, rows: list[dict[str, Any]]) -> str:
    """The table of the arms, and their hard nats against cost."""
    order = list(arms.DEFAULT)
    lines, written, columns = comparison.shown(root, rows, order)
    config = json.loads((root / "ablation.json").read_text(encoding="utf-8"))["config"]
    sections = []
    for view in dict.fromkeys(line["view"] for line in lines):
        made = [{**line, "setting": line["arm"], "point": {"name": line["arm"]}}
                for line in lines if line["view"] == view and not line["arm"].endswith(arms.SOFT)]
        figure = functools.partial(
            analysis.pareto_figure, made, outcome.front(made), None, title=config["name"], split="test"
        )
        table = analysis.table_html([line for line in written if line["view"] == view], columns)
        body = table + _drawn(f"Hard nats against cost, equal {view}", figure)
        sections.append(Section(f"Equal {view}, test split", body))
    return analysis.html_page(f"Ablation: {config['name']}", sections)


def sweep_page(result: outcome.Result, title: str) -> str:
    """The table of the settings, the front, and what the swept number does."""
    title += result.title
    shown, columns = outcome.shown(result)
    heading = "Settings: validation split, unless a column says test"
    sections = [Section(heading, analysis.table_html(shown, columns))]
    said = {"pareto": "Hard nats against cost", "against": "What the swept number does"}
    for name, figure in outcome.drawers(result, title).items():
        if drawn := _drawn(f"{said[name]}: {title}", figure):
            sections.append(Section(said[name], drawn))
    text = f"Chosen: {result.pick}, {outcome.RULE}." if result.pick else ""
    return analysis.html_page(f"Sweep: {title}", sections, text)
