"""Tables, picture and page of the comparison, from its rows alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import common
from experiments.studies.pretrained import plan
from experiments.studies.pretrained.differences import Rows, contrasts, goal, summary
from experiments.studies.pretrained.study import read_rows
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import interval
from meta_attention_jax.data import tasks

FAMILIES = {
    "fixed and in disorder": (
        "bayesian", "local bayesian", "bayesian shuffled", "best layers", "every k-th", "KV heads", "token table",
        "position",
    ),
    "routers": (
        "bayesian", "local bayesian", "local bayesian_mean", "local bayesian_beta0", "local softmax",
        "local cost_penalty", "cost_penalty", "oracle",
    ),
}
"""Rows of the picture; the same arm has the same place, and so the same colour, in both."""

COLUMNS = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("windows", "windows", "d"),
    analysis.Column("documents", "documents", "d"), analysis.Column("share", "on full", ".1%"),
    analysis.Column("keys", "of its keys", ".1%"),
    analysis.Column("nll", "nats", ".4f"), analysis.Column("above", "above full", "+.4f"),
    analysis.Column("interval", "95 %, documents"),
    analysis.Column("by_seeds", "95 %, seeds"), analysis.Column("exact", "exact", ".0%"),
]
FLOPS = analysis.Column("flops", "attention FLOPs executed", ".1%")
DIFFERENCES = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("other", "less that of"),
    analysis.Column("windows", "windows", "d"), analysis.Column("share", "on full", ".1%"),
    analysis.Column("other_share", "its share", ".1%"), analysis.Column("difference", "nats", "+.4f"),
    analysis.Column("interval", "95 %, documents"), analysis.Column("by_seeds", "95 %, seeds"),
]
GOAL = [
    analysis.Column("arm", "arm"), analysis.Column("windows", "windows", "d"),
    analysis.Column("share", "on full, mean", ".1%"), *(analysis.Column(kind, kind) for kind in plan.MAIN),
    analysis.Column("met", "met"),
]
GRID = [
    analysis.Column("arm", "arm"), analysis.Column("setting", "setting"),
    *(analysis.Column(f"left@{share}", f"harm left at {share:.0%}", ".1%") for share in plan.CHOSEN_AT),
    analysis.Column("share", "on full at lambda 0", ".1%"), analysis.Column("mark", "chosen at"),
]


def columns_of(rows: Rows) -> list[analysis.Column]:
    """Of the table of arms; longer texts have their FLOPs."""
    return [*COLUMNS, *([FLOPS] if "flops" in rows[0] else [])]


def lines(rows: Rows) -> list[dict[str, Any]]:
    """`summary` as it is shown, by kind and family."""
    shown = [{**row, "interval": "" if row["arm"] == "full" else f"{row['above_low']:+.4f} to {row['above_high']:+.4f}",
              "by_seeds": _by_seeds(row)} for row in summary(rows)]
    kinds, first = list(plan.KINDS), ("full", "local", "oracle")
    place = lambda arm: first.index(arm.split("@")[0]) if arm.split("@")[0] in first else len(first)  # noqa: E731
    return sorted(shown, key=lambda row: (kinds.index(row["task"]), place(row["arm"]), row["arm"]))


def _by_seeds(row: Mapping[str, Any]) -> str:
    return "" if row["seed_pm"] is None else f"{row['seed_mean']:+.4f} ± {row['seed_pm']:.4f}"


def grid_lines(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of the arms that are trained locally, mean over seeds; the better of each arm is marked."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in choices.get("grid", ()):
        said = "" if row["arm"] == "oracle" else (
            f"kappa {row['strength']:g}, beta {row['beta']:g}, rate {row['learning_rate']:g}, "
            f"rho {row['entropy_bonus']:g}"
        )
        found.setdefault((row["arm"], said), []).append(row)
    shown = []
    for (arm, said), own in found.items():
        keys = [*(f"left@{share}" for share in plan.CHOSEN_AT), *(["share"] if "share" in own[0] else [])]
        shown.append({"arm": arm, "setting": said, **{key: float(np.mean([row[key] for row in own])) for key in keys}})
    for arm in {row["arm"] for row in shown} - {"oracle"}:
        for share in plan.CHOSEN_AT:
            best = min((row for row in shown if row["arm"] == arm), key=lambda row: row[f"left@{share}"])  # noqa: B023
            best["mark"] = f"{best['mark']}, {share:.0%}" if "mark" in best else f"{share:.0%}"
    return shown


GAINS = [
    analysis.Column("kind", "text"), analysis.Column("windows", "windows", "d"), analysis.Column("arm", "arm"),
    analysis.Column("harm", "harm against"), analysis.Column("measure", "measure"),
    analysis.Column("gain", "gain", ".1%"), analysis.Column("interval", "95 %"),
    analysis.Column("mean_harm", "mean harm, nats", "+.4f"),
]
CALIBRATION = [
    analysis.Column("kind", "text"), analysis.Column("arm", "arm"), analysis.Column("seeds", "seeds", "d"),
    analysis.Column("ece", "ECE", ".3f"), analysis.Column("brier", "Brier", ".3f"),
    analysis.Column("mean", "mean E pi_full", ".1%"), analysis.Column("labelled", "labelled full", ".1%"),
]
PEER = "cost_penalty"  # What the arms of few windows are compared with, on the same ones.
SCARCE = [
    analysis.Column("arm", "arm"), analysis.Column("setting", "setting"), analysis.Column("windows", "windows", "d"),
    *(analysis.Column(f"{key}@{share}", f"{words} at {share:.0%}") for share in plan.CHOSEN_AT
      for key, words in (("left", "harm left"), ("less", f"less {PEER}'s"))),
    analysis.Column("share", "on full at lambda 0", ".1%"), analysis.Column("entropy", "entropy", ".3f"),
    analysis.Column("vacuity", "vacuity", ".3f"),
]
PROGRESS = [
    analysis.Column("arm", "arm, weight"), analysis.Column("step", "step", "d"), analysis.Column("kind", "text"),
    analysis.Column("nll", "nats", ".4f"), analysis.Column("share", "on full at lambda 0", ".1%"),
]


def gain_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every measure finds, by kind of text, arm and harm."""
    return [
        {**row, "arm": name.removeprefix("doubt "), "interval": f"{row['low']:.1%} to {row['high']:.1%}"}
        for name, rows in found.items() if name.startswith("doubt ") for row in rows
    ]


def calibration_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How E pi_full meets the oracle's label, mean over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in found.get("calibration", ()):
        groups.setdefault((row["kind"], row["arm"]), []).append(row)
    return [
        {"kind": kind, "arm": arm, "seeds": len(own),
         **{key: float(np.mean([row[key] for row in own])) for key in ("ece", "brier", "mean", "labelled")}}
        for (kind, arm), own in groups.items()
    ]


def scarce_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings by the number of training windows, mean over seeds with the 95 % interval's half-width; so are
    differences from the arm without a prior on the same windows, for seeds draw these."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    rows = [row for name, own in found.items() if name.startswith("scarce ") for row in own]
    peers = {row["data"]: row for row in rows if row["arm"] == PEER}
    for row in rows:
        said = f"kappa {row['strength']:g}, eta {row['preference']:g}, beta {row['beta']:g}"
        arm = f"{row['arm']} of prose" if row["data"].startswith("prose") else row["arm"]
        groups.setdefault((arm, said, row["windows"]), []).append(row)
    shown = []
    for (arm, said, size), own in groups.items():
        line = {"arm": arm, "setting": said, "windows": size}
        for share in plan.CHOSEN_AT:
            key = f"left@{share}"
            line[key] = _percent([row[key] for row in own])
            pairs = [row[key] - peers[row["data"]][key] for row in own if row["data"] in peers]
            if arm.removesuffix(" of prose") != PEER and pairs:
                line[f"less@{share}"] = _percent(pairs, "+.1%")
        for key in ("share", "entropy", "vacuity"):
            if all(key in row for row in own):
                line[key] = float(np.mean([row[key] for row in own]))
        shown.append(line)
    return shown


def _percent(values: Sequence[float], form: str = ".1%") -> str:
    middle, pm = interval(values)
    return f"{middle:{form}} ± {pm:.1%}" if len(values) > 1 else f"{middle:{form}}"


def progress_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Validation on the way, six windows, at lambda 0, hard: what a step through the whole model buys."""
    shown = []
    for name, steps in found.items():
        for row in steps if name.startswith("steps ") else ():
            kinds = row["kinds"]
            for i, kind in enumerate(tasks.TASKS):
                if kinds["tokens"][i]:
                    share = float(np.mean([layer[i][0] for layer in kinds["fractions"]]))
                    shown.append({"arm": name.removeprefix("steps "), "step": row["step"], "kind": kind,
                                  "nll": kinds["nll"][i], "share": share})
    return shown


def further(found: Mapping[str, Any]) -> list[str]:
    """Sections of the parts that have been run."""
    sections = (
        ("Uncertainty", "Gain: how much of the way from random order to the order by harm itself a measure goes, at "
         "the price of 30 %; harm against full attention everywhere, and against the same router soft. Bootstrap over "
         "documents.",
         gain_lines(found), GAINS, "risk"),
        ("Calibration", "E pi_full of every token and layer in full attention's stream against the oracle's label "
         "(a window would change the layer's output by 8 % of the stream's norm).",
         calibration_lines(found), CALIBRATION, "reliability"),
        ("Scarce data", "Trained on so many windows, for as many steps; harm left on validation, mean over three "
         "seeds, which draw the windows, with the half-width of its 95 % interval; differences in pairs of the same "
         "windows.",
         scarce_lines(found), SCARCE, ""),
        ("Steps", progress_lines.__doc__, progress_lines(found), PROGRESS, ""),
    )
    return [
        f"## {title}\n\n{words}\n\n" + (f"![{picture}]({picture}.png)\n\n" if picture else "")
        + analysis.markdown_table(shown, columns)
        for title, words, shown, columns, picture in sections if shown
    ]


def page(rows: Rows, choices: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    about, shown = choices["about"], lines(rows)
    differences = [
        {**row, "interval": f"{row['low']:+.4f} to {row['high']:+.4f}", "by_seeds": _by_seeds(row)}
        for row in contrasts(rows)
    ]
    said = (
        f"{about['backbone']['path']}, frozen; T {about['length']}, window {about['window']}, {about['sinks']} sinks; "
        "test split, hard, one threshold for all kinds of text. `x@0.3`: arm x at the threshold that gave 30 % on "
        f"validation at T {plan.LENGTH}, over prose, copies and needles in equal parts; what it then was is the "
        "column. `local x`: trained by each layer's own output alone, its seeds in turn over the windows; without "
        f"`local`: trained through the whole model, all seeds on the first {plan.BY_ALL} windows, then in turn. `of "
        "its keys`: keys read by the tokens on full attention, of those that it reads everywhere. Nats on prose and "
        "code behind the first window of tokens, on copies, on answers. Intervals: bootstrap over documents (of prose, "
        "addresses of six presidents), paired with full attention on the same windows; over seeds mean and interval on "
        f"the windows that all have read, {plan.FOR_SEEDS} at least, not on all that the mean before is of."
    )
    parts = [
        "# Does Bayesian routing earn its place on a published model?", said, "![nats against share](share.png)",
        "## Arms", analysis.markdown_table(shown, columns_of(rows)),
        "## The goal",
        f"At most {plan.GOAL} nats above full attention on {', '.join(plan.MAIN)} at once; nats above it (95 % over "
        "documents). Met: by all intervals over documents; open: one lies on both sides.",
        analysis.markdown_table(goal(shown), GOAL), *_fresh(rows),
        "## Differences",
        "In pairs of windows, and of seeds; below 0 the first is better. An arm without `@` is taken at the first "
        "one's share in every window, between the shares that it was read at; windows that lie outside of these by "
        "more than two points are left out.",
        analysis.markdown_table(differences, DIFFERENCES),
        "## Settings", *_settings(choices), *further(found),
    ]
    return "\n\n".join(parts) + "\n"


def _fresh(rows: Rows) -> list[str]:
    """The goal on windows that had no part in what reads them."""
    further = goal(summary([row for row in rows if row["window"] >= plan.BY_ALL]))
    return [
        f"The same on the windows behind the first {plan.BY_ALL} alone: by those was seen what is read further, and "
        "shares of 40 and 50 % were added.",
        analysis.markdown_table(further, GOAL),
    ] if further else []


def _settings(choices: Mapping[str, Any]) -> list[str]:
    if "settings of" in choices:
        return [f"Those that were chosen for {choices['settings of']}; none was tuned on this model."]
    return [
        "Of the harm of a window everywhere (the change of every layer's output), what is left on "
        "validation streams when the tokens of highest score go to full attention; mean over three seeds.",
        analysis.markdown_table(grid_lines(choices), GRID),
    ]


def write(out: pathlib.Path) -> None:
    """Page, tables and picture, where there are rows."""
    rows = read_rows(out / "rows.jsonl")
    if not any(row["arm"] == "full" for row in rows):
        return
    choices, found = (
        json.loads((out / name).read_text(encoding="utf-8")) if (out / name).is_file() else {}
        for name in ("choices.json", "found.json")
    )
    analysis.write_text(out / "README.md", page(rows, choices, found))
    with common.spared("pictures"):
        figure = analysis.comparison_figure(
            [row for row in lines(rows) if row["task"] in plan.MAIN], FAMILIES, "A published model",
            "local x: trained layer by layer; without local: end to end.",
        )
        analysis.save(figure, out / "share.png")
        gains = [row for row in gain_lines(found) if row["kind"] == plan.MAIN[0] and row["harm"] == "full"]
        arm = "bayesian" if any(row["arm"] == "bayesian" for row in gains) else "local bayesian"
        curves = {row["measure"]: {**row, "random": row["mean_harm"]} for row in gains if row["arm"] == arm}
        if curves:
            analysis.save(analysis.risk_coverage_figure(
                curves, "Does uncertainty find the tokens of prose that routing hurts?", f"{arm}, hard - full attention"
            ), out / "risk.png")
        calibrated = {row["arm"]: row for row in found.get("calibration", ())
                      if row["kind"] == plan.MAIN[0] and row["seed"] == 0}
        if calibrated:
            analysis.save(analysis.reliability_figure(
                calibrated, "Does E pi_full say where a window would change prose?"
            ), out / "reliability.png")
