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
        "every k-th", "best layers, one order", "best layers", "KV heads", "token table", "position",
        "bayesian shuffled", "bayesian",
    ),
    "routers": (
        "local softmax", "local cost_penalty", "local bayesian_mean", "local bayesian_beta0", "local bayesian",
        "cost_penalty", "bayesian", "oracle",
    ),
}
LINE = "best layers"  # The pattern that a router is held against at its own share.
CONTRASTS = (
    ("bayesian@0.3", f"{LINE} at its share"), ("bayesian@0.2", f"{LINE} at its share"),
    ("bayesian@0.3", f"{LINE}@0.5"), ("bayesian@0.3", "KV heads@0.5"), ("bayesian@0.3", "every k-th@0.5"),
    ("bayesian@0.3", "bayesian shuffled@0.3"), ("bayesian@0.3", "bayesian random@0.3"),
    ("bayesian@0.3", "token table@0.3"), ("bayesian@0.3", "position@0.3"),
    ("bayesian@0.3", "cost_penalty@0.3"), ("bayesian@0.2", "cost_penalty@0.2"), ("bayesian@0.3", "local bayesian@0.3"),
    ("local bayesian@0.3", f"{LINE} at its share"), ("local bayesian@0.3", "local bayesian shuffled@0.3"),
    ("local bayesian@0.3", "local bayesian random@0.3"),
    ("local bayesian@0.3", "token table@0.3"), ("local bayesian@0.3", "position@0.3"),
    ("local bayesian@0.3", "local cost_penalty@0.3"), ("local bayesian@0.2", "local cost_penalty@0.2"),
    ("local bayesian@0.3", "local softmax@0.3"), ("local bayesian@0.3", "local bayesian_mean@0.3"),
    ("local bayesian@0.3", "local bayesian_beta0@0.3"),
    ("bayesian@0.3", "oracle@0.3"), ("local bayesian@0.3", "oracle@0.3"),
)


def summary(rows: Rows) -> list[dict[str, Any]]:
    """A row per kind and arm: nats above full attention on the same windows with the interval of a bootstrap over
    documents, and over the seeds where there are several; share; exact answers."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        base = by_window(rows, kind, "full")
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
                "seed_pm": interval(of_seed)[1] if len(seeds) > 1 else None,
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


def by_window(rows: Rows, kind: str, arm: str) -> dict[int, dict[str, Any]]:
    """The readings of an arm by window, mean over its seeds."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind and row["arm"] == arm:
            found.setdefault(row["window"], []).append(row)
    return {window: {**own[0], **{key: float(np.mean([row[key] for row in own])) for key in ("nll", "share")}}
            for window, own in found.items()}


def at_share(rows: Rows, kind: str, family: str, share: float) -> dict[int, float]:
    """Nats of a fixed pattern at a share, window by window, between the two shares of it that are next."""
    known = {0.0: by_window(rows, kind, "local"), 1.0: by_window(rows, kind, "full")}
    for arm in {row["arm"] for row in rows if row["arm"].split("@")[0] == family}:
        own = by_window(rows, kind, arm)
        if own:
            known[float(np.mean([row["share"] for row in own.values()]))] = own
    shares = sorted(known)
    windows = set.intersection(*(set(own) for own in known.values()))
    return {w: float(np.interp(share, shares, [known[s][w]["nll"] for s in shares])) for w in windows}


def contrast(rows: Rows, kind: str, arm: str, other: str) -> Optional[dict[str, Any]]:
    """Nats of one arm less those of another, in pairs of windows, with the interval of a bootstrap over documents."""
    mine = by_window(rows, kind, arm)
    if not mine:
        return None
    if other.endswith(" at its share"):
        if not any(row["arm"].startswith(f"{LINE}@") and row["kind"] == kind for row in rows):
            return None
        share = float(np.mean([row["share"] for row in mine.values()]))
        theirs, shares = at_share(rows, kind, LINE, share), [share]
    else:
        found = by_window(rows, kind, other)
        theirs, shares = {w: row["nll"] for w, row in found.items()}, [row["share"] for row in found.values()]
    common_windows = sorted(mine.keys() & theirs.keys())
    if not common_windows:
        return None
    middle, low, high = bootstrap(
        np.array([mine[w]["nll"] - theirs[w] for w in common_windows]),
        np.array([mine[w]["tokens"] for w in common_windows], float),
        groups=[mine[w]["document"] for w in common_windows],
    )
    return {
        "task": kind, "arm": arm, "other": other, "windows": len(common_windows), "difference": middle, "low": low,
        "high": high, "share": float(np.mean([mine[w]["share"] for w in common_windows])),
        "other_share": float(np.mean(shares)),
    }


def contrasts(rows: Rows) -> list[dict[str, Any]]:
    """All of `CONTRASTS` that there are rows for."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = (contrast(rows, kind, *pair) for pair in CONTRASTS for kind in kinds)
    return [one for one in found if one is not None]


COLUMNS = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("windows", "windows", "d"),
    analysis.Column("share", "on full", ".1%"), analysis.Column("nll", "nats", ".4f"),
    analysis.Column("above", "above full", "+.4f"), analysis.Column("interval", "95 %, documents"),
    analysis.Column("seed_pm", "± 95 %, 3 seeds", ".4f"), analysis.Column("exact", "exact", ".0%"),
]
FLOPS = analysis.Column("flops", "attention FLOPs executed", ".1%")
DIFFERENCES = [
    analysis.Column("task", "text"), analysis.Column("arm", "arm"), analysis.Column("other", "less that of"),
    analysis.Column("windows", "windows", "d"), analysis.Column("share", "on full", ".1%"),
    analysis.Column("other_share", "its share", ".1%"), analysis.Column("difference", "nats", "+.4f"),
    analysis.Column("interval", "95 %"),
]
GRID = [
    analysis.Column("arm", "arm"), analysis.Column("setting", "setting"),
    *(analysis.Column(f"left@{share}", f"harm left at {share:.0%}", ".1%") for share in plan.CHOSEN_AT),
    analysis.Column("share", "on full at lambda 0", ".1%"), analysis.Column("mark", "chosen"),
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
            f"kappa {row['strength']:g}, beta {row['beta']:g}, rate {row['learning_rate']:g}"
        )
        found.setdefault((row["arm"], said), []).append(row)
    shown = []
    for (arm, said), own in found.items():
        keys = [*(f"left@{share}" for share in plan.CHOSEN_AT), *(["share"] if "share" in own[0] else [])]
        shown.append({"arm": arm, "setting": said, **{key: float(np.mean([row[key] for row in own])) for key in keys}})
    total = lambda row: sum(row[f"left@{share}"] for share in plan.CHOSEN_AT)  # noqa: E731
    for arm in {row["arm"] for row in shown}:
        min((row for row in shown if row["arm"] == arm), key=total)["mark"] = "yes" if arm != "oracle" else ""
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


def gain_lines(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every measure finds, by kind of text, arm and harm."""
    return [
        {**row, "arm": name.removeprefix("doubt "), "interval": f"{row['low']:.1%} to {row['high']:.1%}"}
        for name, rows in choices.items() if name.startswith("doubt ") for row in rows
    ]


def calibration_lines(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How E pi_full meets the oracle's label, mean over seeds."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, rows in choices.items():
        if name.startswith("calibration "):
            for row in rows:
                found.setdefault((row["kind"], name.removeprefix("calibration ")), []).append(row)
    return [
        {"kind": kind, "arm": arm, "seeds": len(own),
         **{key: float(np.mean([row[key] for row in own])) for key in ("ece", "brier", "mean", "labelled")}}
        for (kind, arm), own in found.items()
    ]


def scarce_lines(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings by the number of training windows, mean over seeds with the 95 % interval's half-width."""
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in choices.get("scarce", ()):
        said = f"kappa {row['strength']:g}, eta {row['preference']:g}, beta {row['beta']:g}"
        arm = f"{row['arm']} of prose" if row["data"] == "prose" else row["arm"]
        found.setdefault((arm, said, row["windows"]), []).append(row)
    shown = []
    for (arm, said, size), own in found.items():
        line = {"arm": arm, "setting": said, "windows": size}
        for key in (f"left@{share}" for share in plan.CHOSEN_AT):
            middle, pm = interval([row[key] for row in own])
            line[key] = f"{middle:.1%} ± {pm:.1%}" if len(own) > 1 else f"{middle:.1%}"
        for key in ("share", "entropy", "vacuity"):
            if all(key in row for row in own):
                line[key] = float(np.mean([row[key] for row in own]))
        shown.append(line)
    return shown


def progress_lines(choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Validation on the way, six windows, at lambda 0, hard: what a step through the whole model buys."""
    shown = []
    for name, found in choices.items():
        for row in found.get("progress", ()) if name.startswith("end to end ") else ():
            kinds = row["kinds"]
            for i, kind in enumerate(tasks.TASKS):
                if kinds["tokens"][i]:
                    share = float(np.mean([layer[i][0] for layer in kinds["fractions"]]))
                    shown.append({"arm": name.removeprefix("end to end "), "step": row["step"], "kind": kind,
                                  "nll": kinds["nll"][i], "share": share})
    return shown


def further(choices: Mapping[str, Any]) -> list[str]:
    """Sections of the parts that have been run."""
    sections = (
        ("Uncertainty", "Gain: how much of the way from random order to the order by harm itself a measure goes, at "
         "lambda 0; harm against full attention everywhere, and against the same router soft. Bootstrap over "
         "documents.",
         gain_lines(choices), GAINS),
        ("Calibration", "E pi_full of every token and layer in full attention's stream against the oracle's label "
         "(a window would change the layer's output by 8 % of the stream's norm).",
         calibration_lines(choices), CALIBRATION),
        ("Scarce data", "Trained on so many windows, for as many steps; harm left on validation, mean over three seeds "
         "with the half-width of its 95 % interval.", scarce_lines(choices), SCARCE),
        ("Steps", progress_lines.__doc__, progress_lines(choices), PROGRESS),
    )
    return [f"## {title}\n\n{words}\n\n{analysis.markdown_table(shown, columns)}"
            for title, words, shown, columns in sections if shown]


def page(rows: Rows, choices: Mapping[str, Any]) -> str:
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
        "the whole model. Nats on prose and code from token 64 on, on copies, on answers. Intervals: bootstrap over "
        "documents, paired with full attention on the same windows."
    )
    parts = [
        "# Does Bayesian routing earn its place on a published model?", said, "![nats against share](share.png)",
        "## Arms", analysis.markdown_table(lines(rows), [*COLUMNS, *([FLOPS] if "flops" in rows[0] else [])]),
        "## Differences",
        "In pairs of windows; below 0 the first is better. `at its share`: between the numbers of layers next to it.",
        analysis.markdown_table(differences, DIFFERENCES),
        "## Settings", "Of the harm of a window everywhere (the change of every layer's output), what is left on "
        "validation streams when the tokens of highest score go to full attention; mean over three seeds.",
        analysis.markdown_table(grid_lines(choices), GRID), *further(choices),
    ]
    return "\n\n".join(parts) + "\n"


def write(out: pathlib.Path) -> None:
    """Page, tables and picture, where there are rows."""
    rows = read_rows(out / "rows.jsonl")
    if not any(row["arm"] == "full" for row in rows):
        return
    choices = json.loads((out / "choices.json").read_text(encoding="utf-8"))
    analysis.write_text(out / "README.md", page(rows, choices))
    with common.spared("pictures"):
        figure = analysis.comparison_figure(
            [row for row in lines(rows) if row["task"] in plan.MAIN], FAMILIES, "A published model",
            "local x: trained layer by layer; without local: end to end.",
        )
        analysis.save(figure, out / "share.png")
