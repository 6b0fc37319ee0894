"""What a comparison concludes from finished runs: which setting, which table. No flags, no training."""

from __future__ import annotations

import collections
import csv
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.studies.arms import base_arm
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import interval, paired_interval
from meta_attention_jax.config import read_config, read_stored
from meta_attention_jax.fields import expect

TOLERANCE = 0.005
"""Nats within which a cheaper setting counts as equal."""

SAME = "same_as_tokens"
"""In `equal_flops/<arm>/`: the arm's step costs what the reference's does, its runs are those of equal tokens."""

VIEWS = {"tokens": "runs", "flops": "equal_flops"}
"""Folders of the runs of an ablation, by what is equal for all arms."""

MEANS = {
    "nll_hard": ("nats hard", ".4f"),
    "nll_soft": ("nats soft", ".4f"),
    "gap": ("gap", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "cost": ("cost", ".1%"),
    "oracle_cost": ("oracle cost", ".1%"),
    "routing_entropy": ("routing entropy", ".1%"),
    "usage_entropy": ("usage entropy", ".1%"),
    "collapsed_layers": ("collapsed layers", ".1f"),
    "information": ("I(route; kind)", ".3f"),
    "auroc": ("AUROC full", ".3f"),
    "precision": ("precision full", ".1%"),
    "recall": ("recall full", ".1%"),
    "recall_accuracy": ("recall answered", ".1%"),
    "aggregate_accuracy": ("aggregates answered", ".1%"),
    "predictive_1": ("S = 1", ".4f"),
    "predictive_4": ("S = 4", ".4f"),
    "predictive_16": ("S = 16", ".4f"),
    "elbo": ("ELBO", ".4f"),
}
"""Scalars that are averaged over seeds: title and format. I(route; kind), AUROC, precision and recall
are of the layer that does the recall, by the validation split."""


UNCERTAINTY_COLUMNS = [
    analysis.Column("name", "controller, measure"),
    analysis.Column("seeds", "seeds", "d"),
    analysis.Column("gain_validation", "gain over random, validation", ".1%"),
    analysis.Column("gain", "gain over random, test"),
    analysis.Column("harm", "mean harm", "+.4f", "hard - soft, nats per token"),
    analysis.Column("best_nll", "nats at best theta", ".4f", "chosen on validation, run by run"),
    analysis.Column("best_cost", "at cost", ".1%"),
    analysis.Column("hard_nll", "all hard, nats", ".4f"),
    analysis.Column("hard_cost", "at cost ", ".1%"),
]
"""Of the table of `experiments.studies.uncertainty`."""


def with_intervals(
    lines: Sequence[dict[str, Any]], names: Mapping[str, tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[analysis.Column]]:
    """(the lines with their means and half-widths as text, a column for each), by name: title and format."""
    texts = [{**line, **{name: analysis.with_interval(line, name, form) for name, (_, form) in names.items()}}
             for line in lines]
    return texts, [analysis.Column(name, title) for name, (title, _) in names.items()]


def choose(tried: list[dict[str, Any]]) -> dict[str, float]:
    """Of all settings tried, the cheapest within TOLERANCE of the best hard nats; of equals in cost
    the better one. Dicts of `settings`, `nll`, `cost`."""
    best = min(result["nll"] for result in tried)
    near = [result for result in tried if result["nll"] <= best + TOLERANCE]
    return min(near, key=lambda r: (round(r["cost"], 6), r["nll"]))["settings"]


def demo_parts(
    rows: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[dict[str, Any]], list[analysis.Column], str]]:
    """(corpus, its rows, their columns, notes on these as Markdown) of `analysis.comparison_rows`."""
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        columns = analysis.demo_columns(corpus)
        notes = "".join(f"* **{title}**: {note}\n" for title, note in analysis.column_notes(columns))
        yield corpus, [row for row in rows if row["corpus"] == corpus], columns, notes


def collect(root: pathlib.Path) -> list[dict[str, Any]]:
    """One row per finished run below `root`, from the directories alone."""
    rows = []
    for view, folder in VIEWS.items():
        paths = sorted((root / folder).glob("*/seed*/test.json"))
        for same in sorted((root / folder).glob(f"*/{SAME}")):
            paths += sorted((root / "runs" / same.parent.name).glob("seed*/test.json"))
        for path in paths:
            config = read_config(path.parent / "config.json")
            try:
                rows.append({
                    "view": view, "arm": path.parent.parent.name, "seed": config["seed"],
                    "steps": config["train"]["steps"], "learning_rate": config["optimizer"]["learning_rate"],
                    "beta": config["objective"]["beta"],
                    **{name: config["prior"][name] for name in ("strength", "preference")},
                    **read_stored(path, "a result"),
                })
            except (KeyError, TypeError):
                place = str(path.parent / "config.json")
                raise ValueError(f"workdir: expected a complete config in {place!r}, got something else.") from None
    return rows


def diverged(root: pathlib.Path) -> collections.Counter[tuple[str, str]]:
    """(view, arm) -> runs that diverged."""
    return collections.Counter(
        (view, path.parent.name) for view, folder in VIEWS.items() for path in (root / folder).glob("*/seed*.diverged")
    )


def flat(row: dict[str, Any]) -> dict[str, float]:
    """The scalars of a row that are averaged over seeds."""
    values = {name: row.get(name) for name in MEANS if not isinstance(row.get(name), list)}
    if "truth_layer" in row:
        layer = row["truth_layer"]
        values["information"] = row["information"][layer]
        values |= {name: row["truth"][layer][name] for name in ("auroc", "precision", "recall")}
    for kind in ("recall", "aggregate"):
        values[f"{kind}_accuracy"] = row.get("accuracy", {}).get(kind)
    return {name: value for name, value in values.items() if value is not None}


def table(rows: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """One line per view and arm: means, intervals, paired differences of hard nats and cost."""
    by_arm: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        by_arm.setdefault((row["view"], row["arm"]), {})[row["seed"]] = flat(row)
    lines = []
    position = {arm: i for i, arm in enumerate(order)}
    keys = sorted(by_arm, key=lambda k: (k[0] != "tokens", position.get(k[1], len(order)), k[1]))
    for view, arm in keys:
        seeds = by_arm[view, arm]
        line: dict[str, Any] = {"view": view, "arm": arm, "seeds": len(seeds)}
        for name in MEANS:
            if values := [s[name] for s in seeds.values() if name in s]:
                line[name], line[f"{name}_pm"] = interval(values)
        for other in ("full-only", "prior-free"):
            base = by_arm.get((view, other))
            if base and other != arm and base.keys() & seeds.keys():
                for name in ("nll_hard", "cost"):
                    pair = ({seed: values[name] for seed, values in side.items()} for side in (seeds, base))
                    line[f"{name}_vs_{other}"], line[f"{name}_vs_{other}_pm"] = paired_interval(*pair)
        lines.append(line)
    return lines


def shown(
    root: pathlib.Path, rows: list[dict[str, Any]], order: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[analysis.Column]]:
    """(`table` with runs that diverged and settings tried, the same as text, its columns)."""
    lines = table(rows, order)
    lost = diverged(root)
    for line in lines:
        line["diverged"] = lost[line["view"], line["arm"]]
        chosen = root / "tune" / base_arm(line["arm"]) / "chosen.json"
        if chosen.exists():
            line["tried"] = len(json.loads(chosen.read_text(encoding="utf-8"))["tried"])
    return lines, *written(lines)


def written(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[analysis.Column]]:
    """Lines of `table` as text, and the columns that they fill."""
    names = {**MEANS}
    for other in ("full-only", "prior-free"):
        names[f"nll_hard_vs_{other}"] = (f"hard nats - {other}'s", "+.4f")
        names[f"cost_vs_{other}"] = (f"cost - {other}'s", "+.1%")
    used = {name: how for name, how in names.items() if any(name in line for line in lines)}
    columns = [analysis.Column("view", "equal"), analysis.Column("arm", "arm"),
               analysis.Column("seeds", "seeds", "d"), analysis.Column("diverged", "diverged", "d"),
               analysis.Column("tried", "settings tried", "d")]
    texts, means = with_intervals(lines, used)
    return texts, columns + means


def write_tables(root: pathlib.Path, order: list[str]) -> None:
    """rows.json, table.csv, table.md; prints the table."""
    rows = collect(root)
    analysis.write_json(root / "rows.json", rows)
    lines, texts, columns = shown(root, rows, order)
    analysis.write_text(root / "table.md", analysis.markdown_table(texts, columns))
    text = io.StringIO()
    fields = list(dict.fromkeys(field for line in lines for field in line))
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(lines)
    analysis.write_text(root / "table.csv", text.getvalue())
    print(analysis.terminal_table(texts, columns, width=160))
    print(f"table: {root}/table.md   rows: {root}/rows.json")


def parse_shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    digits = index.isdecimal() and number.isdecimal() and text.isascii()
    expect(digits and int(index) < int(number), "shard", "i/n with 0 <= i < n", text)
    return int(index), int(number)
