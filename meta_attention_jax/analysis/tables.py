"""Tables: rows of plain values to Markdown, HTML, aligned terminal text and JSON."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from meta_attention_jax.files import write_whole

MISSING = "–"

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str  # where a row keeps the value
    title: str  # the heading; the terminal stacks its words
    format: str = ""  # a format specification (".3f", ".1%"); empty for text, which is aligned left
    note: str = ""  # what the number is, with its unit; printed under the table


_NATS = "held-out negative log-likelihood per loss token (nats)"
_BITS = "the same per byte of text (bits/byte)"
_SOFT = "every token mixes all mechanisms at the posterior mean"
_HARD = "run with one mechanism per token"


def demo_columns(corpus: str) -> list[Column]:
    """Columns of the comparison table for one corpus. Every corpus: nats soft and hard, their gap, projected cost,
    routing and usage entropy, route fractions. `recall` adds what is known about its queries; the others, being text,
    bits/byte."""
    columns = [
        Column("arm", "arm"),
        Column("nll_soft", "nats soft", ".3f", f"{_NATS}; {_SOFT}"),
        Column("nll_hard", "nats hard", ".3f", f"{_NATS}; {_HARD}"),
        Column("gap", "gap", "+.3f", "nats hard minus nats soft: what hardening costs"),
    ]
    if corpus != "recall":
        columns += [
            Column("bpb_soft", "bits/byte soft", ".3f", _BITS),
            Column("bpb_hard", "bits/byte hard", ".3f", _BITS),
        ]
    columns += [
        Column("cost", "cost", ".1%", "projected cost of the hard routes; full attention is 100 %"),
        Column("routing_entropy", "routing entropy", ".1%",
               "mean entropy of a token's mean weights, of log K: how undecided single tokens are"),
        Column("usage_entropy", "usage entropy", ".1%",
               "entropy of the mean route, of log K: how evenly the mechanisms are used"),
        *(Column(f"fraction_{name}", f"to {name}", ".1%", "share of tokens by hard route, all layers")
          for name in ("full", "linear", "local")),
    ]
    if corpus == "recall":
        answer = "share of queries whose likeliest next token is the right value"
        columns += [
            Column("accuracy_queries_soft", "query acc. soft", ".1%", answer),
            Column("accuracy_queries_hard", "query acc. hard", ".1%", answer),
            Column("queries_full", "queries on full", ".1%", "share of query tokens routed to full"),
            Column("others_full", "others on full", ".1%", "share of other tokens routed to full"),
            Column("route_layer", "in layer", "d", "layer of the two shares, counted from 0"),
        ]
    return columns


def comparison_rows(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Results as table rows, grouped by corpus in order of first appearance, with `gap` (nats). gap = nll_hard -
    nll_soft, left out where either is missing."""
    for result in results:
        for key in ("corpus", "arm"):
            if key not in result:
                raise ValueError(f"results: expected {key!r} in every result, got {sorted(result)}.")
    order = list(dict.fromkeys(result["corpus"] for result in results))
    rows = [dict(result) for result in results]
    for row in rows:
        soft, hard = row.get("nll_soft"), row.get("nll_hard")
        if "gap" not in row and soft is not None and hard is not None:
            row["gap"] = hard - soft
    return sorted(rows, key=lambda row: order.index(row["corpus"]))


def plain(value: Any) -> Any:
    """`value` in plain Python for JSON: arrays to numbers and lists, NaN and inf to None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars alike.
        return plain(value.tolist())
    raise ValueError(f"value: expected numbers, text, None, arrays or containers of those, got {type(value).__name__}.")


def format_value(value: Any, format: str = "") -> str:
    """`value` by a format specification; "–" for None and NaN, "∞" or "-∞" for infinities."""
    if value is None:
        return MISSING
    if not isinstance(value, (str, bool)):
        number = float(value)
        if math.isnan(number):
            return MISSING
        if math.isinf(number):
            return "∞" if number > 0 else "-∞"
        value = int(number) if format.endswith("d") else number if format else plain(value)
    if isinstance(value, str) and not format:
        return value
    return f"{value:{format}}"


def with_interval(row: Row, key: str, format: str) -> str:
    """"mean ± half-width" of a row that has `key` and `<key>_pm`, the half without a sign."""
    if key not in row:
        return format_value(None)
    half = format_value(row[f"{key}_pm"], format.lstrip("+"))
    return f"{format_value(row[key], format)} ± {half}"


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    if not columns:
        raise ValueError("columns: expected at least one Column, got none.")

    def cell(value: Any, column: Column) -> str:
        try:
            return format_value(value, column.format)
        except (TypeError, ValueError):
            can = f"a value that {column.format!r} can format"
            raise ValueError(f"{column.key}: expected {can}, got {value!r}.") from None

    return [[cell(row.get(column.key), column) for column in columns] for row in rows]


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table, padded so that its source reads as a table too; numbers aligned right."""
    lines = [[column.title for column in columns]] + _cells(rows, columns)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *(len(cell) for cell in cells)) for cells in zip(*lines)]

    def row(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column.format else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if column.format else "-" * width for width, column in zip(widths, columns)]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])]) + "\n"


def terminal_table(rows: Sequence[Row], columns: Sequence[Column], width: int = 120) -> str:
    """Aligned plain text; headings stack their words. Columns that do not fit into `width` go below, the first column
    repeated."""
    cells = _cells(rows, columns)
    heads = [column.title.split() or [""] for column in columns]
    widths = [max(map(len, [*head, *(line[i] for line in cells)])) for i, head in enumerate(heads)]
    blocks, used = [[0]], widths[0]
    for i in range(1, len(columns)):
        if used + 2 + widths[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]

    def block(indices: Sequence[int]) -> str:
        height = max(len(heads[i]) for i in indices)
        stacked = {i: [""] * (height - len(heads[i])) + heads[i] for i in indices}
        lines = [[stacked[i][level] for i in indices] for level in range(height)]
        lines.append(["─" * widths[i] for i in indices])
        lines += [[line[i] for i in indices] for line in cells]
        return "\n".join(
            "  ".join(
                cell.rjust(widths[i]) if columns[i].format else cell.ljust(widths[i]) for i, cell in zip(indices, line)
            ).rstrip()
            for line in lines
        )

    return "\n\n".join(map(block, blocks)) + "\n"


def html_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """An HTML table, every cell escaped; a column's note shows on hovering over its heading."""

    def cell(tag: str, text: str, column: Column, title: str = "") -> str:
        align = ' class="number"' if column.format else ""
        hover = f' title="{html.escape(title)}"' if title else ""
        return f"<{tag}{align}{hover}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", column.title, column, column.note) for column in columns)
    body = "\n".join(
        "<tr>" + "".join(cell("td", text, column) for text, column in zip(line, columns)) + "</tr>"
        for line in _cells(rows, columns)
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def column_notes(columns: Sequence[Column]) -> list[tuple[str, str]]:
    """(titles, note) of the columns that have one; columns that share a note share an entry."""
    notes: dict[str, list[str]] = {}
    for column in columns:
        if column.note:
            notes.setdefault(column.note, []).append(column.title)
    return [(", ".join(titles), note) for note, titles in notes.items()]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`files.write_whole` of text; what no encoding has becomes "?"."""
    write_whole(path, text.encode("utf-8", "replace"))


def write_json(path: str | os.PathLike[str], rows: Any) -> None:
    """Write `plain(rows)` as JSON, whole or not at all. NaN and inf become null."""
    write_text(path, json.dumps(plain(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
