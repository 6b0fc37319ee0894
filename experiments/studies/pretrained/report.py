"""Tables, picture and page of the comparison, from its rows alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from experiments import common
from experiments.studies.pretrained import plan
from experiments.studies.pretrained.study import read_rows
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import bootstrap, interval
from meta_attention_jax.data import tasks

Rows = Sequence[Mapping[str, Any]]

FAMILIES = {
    "fixed and in disorder": (
        "bayesian", "local bayesian", "local bayesian shuffled", "best layers", "every k-th", "KV heads", "token table",
        "position",
    ),
    "routers": (
        "bayesian", "local bayesian", "local bayesian_mean", "local bayesian_beta0", "local softmax",
        "local cost_penalty", "cost_penalty", "oracle",
    ),
}
"""Rows of the picture; the same arm has the same place, and so the same colour, in both."""

CONTRASTS = (
    ("bayesian@0.3", "best layers"), ("bayesian@0.2", "best layers"), ("bayesian@0.3", "KV heads"),
    ("bayesian@0.3", "best layers@0.5"), ("bayesian@0.3", "KV heads@0.5"), ("bayesian@0.3", "every k-th@0.5"),
    ("bayesian@0.3", "bayesian shuffled@0.3"), ("bayesian@0.3", "bayesian random@0.3"),
    ("bayesian@0.3", "token table"), ("bayesian@0.3", "position"),
    ("bayesian@0.3", "cost_penalty"), ("bayesian@0.2", "cost_penalty"), ("bayesian@0.3", "local bayesian"),
    ("bayesian@0.3", "oracle"), ("bayesian@0.2", "oracle"),
    ("local bayesian@0.3", "best layers"), ("local bayesian@0.2", "best layers"),
    ("local bayesian@0.3", "KV heads"), ("local bayesian@0.3", "best layers@0.5"),
    ("local bayesian@0.3", "KV heads@0.5"),
    ("local bayesian@0.3", "local bayesian shuffled@0.3"), ("local bayesian@0.3", "local bayesian random@0.3"),
    ("local bayesian@0.3", "token table"), ("local bayesian@0.3", "position"),
    ("local bayesian@0.3", "local cost_penalty"), ("local bayesian@0.2", "local cost_penalty"),
    ("local bayesian@0.3", "local softmax"), ("local bayesian@0.2", "local softmax"),
    ("local bayesian@0.3", "local bayesian_mean"), ("local bayesian@0.2", "local bayesian_mean"),
    ("local bayesian@0.3", "local bayesian_beta0"), ("local bayesian@0.2", "local bayesian_beta0"),
    ("local bayesian@0.3", "oracle"), ("local bayesian@0.2", "oracle"),
    *((f"{arm} cautious by {measure}@0.3", arm) for arm in ("local bayesian", "bayesian")
      for measure in ("vacuity", "mutual_information")),
)
"""(arm, another at its own share, or a family: at the first one's share in every window, between the shares that the
family was read at)."""


def summary(rows: Rows) -> list[dict[str, Any]]:
    """A row per kind and arm: nats above full attention on the same windows with the interval of a bootstrap over
    documents, and over the seeds where there are several; share; exact answers."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        base = {window: own[-1] for window, own in by_window(rows, kind, "full").items()}
        for arm in dict.fromkeys(row["arm"] for row in rows if row["kind"] == kind):
            own = [row for row in rows if row["kind"] == kind and row["arm"] == arm and row["window"] in base]
            if not own:
                continue
            above = np.array([row["nll"] - base[row["window"]]["nll"] for row in own])
            tokens = np.array([row["tokens"] for row in own], float)
            documents = [row["document"] for row in own]
            middle, low, high = bootstrap(above, tokens, groups=documents)
            seeds = sorted({row["seed"] for row in own})
            of_seed = [float(np.average(above[mine], weights=tokens[mine])) for mine in
                       (np.array([row["seed"] == seed for row in own]) for seed in seeds)]
            line = {
                "task": kind, "arm": arm, "windows": len({row["window"] for row in own}),
                "documents": len(set(documents)), "seeds": len(seeds),
                "share": float(np.mean([row["share"] for row in own])),
                "nll": float(np.average([row["nll"] for row in own], weights=tokens)),
                "above": middle, "above_low": low, "above_high": high,
                "keys": float(np.mean([row["keys"] for row in own])),
                # Seeds that took turns have not read the same windows.
                "seed_pm": interval(of_seed)[1] if len(own) == len(seeds) * len({r["window"] for r in own}) > 1
                and len(seeds) > 1 else None,
            }
            if "flops" in own[0]:
                line["flops"] = float(np.mean([row["flops"] for row in own]))
            if own[0]["exact"] is not None:
                right = np.array([row["exact"] for row in own], float)
                line["exact"], line["exact_low"], line["exact_high"] = bootstrap(
                    right, np.ones(len(own)), groups=documents
                )
            found.append(line)
    return found


def by_window(rows: Rows, kind: str, arm: str) -> dict[int, dict[int, Mapping[str, Any]]]:
    """window -> seed -> the reading of an arm; -1 is the seed of what has none."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind and row["arm"] == arm:
            found.setdefault(row["window"], {})[row["seed"]] = row
    return found


BEYOND = 0.02
"""Of share, that a window may lie outside of what it is compared with: a curve is not known there."""


def contrast(rows: Rows, kind: str, arm: str, other: str) -> Optional[dict[str, Any]]:
    """Nats of one arm less those of another, in pairs of windows and of seeds where both have some, with the interval
    of a bootstrap over documents, and over seeds where both have read everything with several."""
    mine = by_window(rows, kind, arm)
    if "@" in other:
        families = [by_window(rows, kind, other)]
    else:
        shares = sorted({row["arm"] for row in rows if row["kind"] == kind and row["arm"].split("@")[0] == other})
        families = [by_window(rows, kind, name) for name in shares]
    pairs = []
    for window, seeds in mine.items():
        for seed, row in seeds.items():
            knots = [own for own in (_of_seed(family.get(window, {}), seed) for family in families) if own is not None]
            if knots and len(knots) == len(families):
                knots.sort(key=lambda knot: knot[0])
                share, nats = (list(part) for part in zip(*knots))
                at = float(np.clip(row["share"], share[0], share[-1]))
                if "@" in other or abs(at - row["share"]) <= BEYOND:
                    pairs.append((seed, row, row["nll"] - float(np.interp(at, share, nats)), at))
    if not pairs:
        return None
    tokens = np.array([row["tokens"] for _, row, _, _ in pairs], float)
    difference = np.array([value for _, _, value, _ in pairs])
    middle, low, high = bootstrap(difference, tokens, groups=[row["document"] for _, row, _, _ in pairs])
    seeds = sorted({seed for seed, *_ in pairs})
    whole = len(seeds) > 1 and all(len(own) == len(seeds) for own in mine.values())
    of_seed = [float(np.average(difference[own], weights=tokens[own])) for own in
               (np.array([seed == each for seed, *_ in pairs]) for each in seeds)]
    return {
        "task": kind, "arm": arm, "other": other, "windows": len({row["window"] for _, row, _, _ in pairs}),
        "difference": middle, "low": low, "high": high, "seed_pm": interval(of_seed)[1] if whole else None,
        "share": float(np.mean([row["share"] for _, row, _, _ in pairs])),
        "other_share": float(np.mean([at for *_, at in pairs])),
    }


def _of_seed(own: Mapping[int, Mapping[str, Any]], seed: int) -> Optional[tuple[float, float]]:
    """(share, nats) of the same seed, or of what has none; for what has none itself, the mean over seeds."""
    rows = [own[each] for each in (seed, -1) if each in own][:1] or (list(own.values()) if seed == -1 else [])
    mean = lambda key: float(np.mean([row[key] for row in rows]))  # noqa: E731
    return (mean("share"), mean("nll")) if rows else None


def contrasts(rows: Rows) -> list[dict[str, Any]]:
    """All of `CONTRASTS` that there are rows for."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = (contrast(rows, kind, *pair) for pair in CONTRASTS for kind in kinds)
    return [one for one in found if one is not None]


COLUMNS = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("windows", "windows", "d"),
    analysis.Column("share", "on full", ".1%"), analysis.Column("keys", "of its keys", ".1%"),
    analysis.Column("nll", "nats", ".4f"), analysis.Column("above", "above full", "+.4f"),
    analysis.Column("interval", "95 %, documents"),
    analysis.Column("seed_pm", "± 95 %, 3 seeds", ".4f"), analysis.Column("exact", "exact", ".0%"),
]
FLOPS = analysis.Column("flops", "attention FLOPs executed", ".1%")
DIFFERENCES = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("other", "less that of"),
    analysis.Column("windows", "windows", "d"), analysis.Column("share", "on full", ".1%"),
    analysis.Column("other_share", "its share", ".1%"), analysis.Column("difference", "nats", "+.4f"),
    analysis.Column("interval", "95 %, documents"), analysis.Column("seed_pm", "± 95 %, seeds", ".4f"),
]
GRID = [
    analysis.Column("arm", "arm"), analysis.Column("setting", "setting"),
    *(analysis.Column(f"left@{share}", f"harm left at {share:.0%}", ".1%") for share in plan.CHOSEN_AT),
    analysis.Column("share", "on full at lambda 0", ".1%"), analysis.Column("mark", "chosen at"),
]


def lines(rows: Rows) -> list[dict[str, Any]]:
    """`summary` as it is shown, by kind and family."""
    shown = [{**row, "interval": "" if row["arm"] == "full" else f"{row['above_low']:+.4f} to {row['above_high']:+.4f}"}
             for row in summary(rows)]
    kinds, first = list(plan.KINDS), ("full", "local", "oracle")
    place = lambda arm: first.index(arm.split("@")[0]) if arm.split("@")[0] in first else len(first)  # noqa: E731
    return sorted(shown, key=lambda row: (kinds.index(row["task"]), place(row["arm"]), row["arm"]))


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
    analysis.Column("kind", "text"), analysis.Column("arm", "arm"), analysis.Column("harm", "harm against"),
    analysis.Column("measure", "measure"), analysis.Column("gain", "gain", ".1%"),
    analysis.Column("interval", "95 %"), analysis.Column("mean_harm", "mean harm, nats", "+.4f"),
]
CALIBRATION = [
    analysis.Column("kind", "text"), analysis.Column("arm", "arm"), analysis.Column("seeds", "seeds", "d"),
    analysis.Column("ece", "ECE", ".3f"), analysis.Column("brier", "Brier", ".3f"),
    analysis.Column("mean", "mean E pi_full", ".1%"), analysis.Column("labelled", "labelled full", ".1%"),
]
SCARCE = [
    analysis.Column("arm", "arm"), analysis.Column("setting", "setting"), analysis.Column("windows", "windows", "d"),
    *(analysis.Column(f"left@{share}", f"harm left at {share:.0%}") for share in plan.CHOSEN_AT),
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
    """Settings by the number of training windows, mean over seeds with the 95 % interval's half-width."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in (row for name, rows in found.items() if name.startswith("scarce ") for row in rows):
        said = f"kappa {row['strength']:g}, eta {row['preference']:g}, beta {row['beta']:g}"
        arm = f"{row['arm']} of prose" if row["data"].startswith("prose") else row["arm"]
        groups.setdefault((arm, said, row["windows"]), []).append(row)
    shown = []
    for (arm, said, size), own in groups.items():
        line = {"arm": arm, "setting": said, "windows": size}
        for key in (f"left@{share}" for share in plan.CHOSEN_AT):
            middle, pm = interval([row[key] for row in own])
            line[key] = f"{middle:.1%} ± {pm:.1%}" if len(own) > 1 else f"{middle:.1%}"
        for key in ("share", "entropy", "vacuity"):
            if all(key in row for row in own):
                line[key] = float(np.mean([row[key] for row in own]))
        shown.append(line)
    return shown


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
         "lambda 0; harm against full attention everywhere, and against the same router soft. Bootstrap over "
         "documents.",
         gain_lines(found), GAINS, "risk"),
        ("Calibration", "E pi_full of every token and layer in full attention's stream against the oracle's label "
         "(a window would change the layer's output by 8 % of the stream's norm).",
         calibration_lines(found), CALIBRATION, "reliability"),
        ("Scarce data", "Trained on so many windows, for as many steps; harm left on validation, mean over three seeds "
         "with the half-width of its 95 % interval.", scarce_lines(found), SCARCE, ""),
        ("Steps", progress_lines.__doc__, progress_lines(found), PROGRESS, ""),
    )
    return [
        f"## {title}\n\n{words}\n\n" + (f"![{picture}]({picture}.png)\n\n" if picture else "")
        + analysis.markdown_table(shown, columns)
        for title, words, shown, columns, picture in sections if shown
    ]


def page(rows: Rows, choices: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    about = choices["about"]
    differences = [
        {**row, "interval": f"{row['low']:+.4f} to {row['high']:+.4f}"} for row in contrasts(rows)
    ]
    said = (
        f"{about['backbone']['path']}, frozen; T {about['length']}, window {about['window']}, {about['sinks']} sinks; "
        "test split, hard, one threshold for all kinds of text. `x@0.3`: arm x at the threshold that gave 30 % on "
        "validation, over prose, copies and needles in equal parts; what it then was is the column. `local x`: trained "
        "by each layer's own output alone, its three seeds in turn over the windows; without `local`: trained through "
        "the whole model, all seeds on all windows. `of its keys`: keys read by the tokens on full attention, of those "
        "that it reads everywhere. Nats on prose and code from token 64 on, on copies, on answers. Intervals: "
        "bootstrap over documents (30 addresses of six presidents), paired with full attention on the same windows."
    )
    parts = [
        "# Does Bayesian routing earn its place on a published model?", said, "![nats against share](share.png)",
        "## Arms", analysis.markdown_table(lines(rows), [*COLUMNS, *([FLOPS] if "flops" in rows[0] else [])]),
        "## Differences",
        "In pairs of windows, and of seeds; below 0 the first is better. An arm without `@` is taken at the first "
        "one's share in every window, between the shares that it was read at; windows that lie outside of these by "
        "more than two points are left out.",
        analysis.markdown_table(differences, DIFFERENCES),
        "## Settings", "Of the harm of a window everywhere (the change of every layer's output), what is left on "
        "validation streams when the tokens of highest score go to full attention; mean over three seeds.",
        analysis.markdown_table(grid_lines(choices), GRID), *further(found),
    ]
    return "\n\n".join(parts) + "\n"


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
        curves = {
            f"{row['arm']}, {row['measure']}": {**row, "random": row["mean_harm"]} for row in gain_lines(found)
            if row["kind"] == plan.MAIN[0] and row["harm"] == "full" and row["arm"].endswith("bayesian")
        }
        if curves:
            analysis.save(analysis.risk_coverage_figure(
                curves, "Does uncertainty find the tokens of prose that routing hurts?"
            ), out / "risk.png")
        calibrated = {row["arm"]: row for row in found.get("calibration", ())
                      if row["kind"] == plan.MAIN[0] and row["seed"] == 0}
        if calibrated:
            analysis.save(analysis.reliability_figure(
                calibrated, "Does E pi_full say where a window would change prose?"
            ), out / "reliability.png")
