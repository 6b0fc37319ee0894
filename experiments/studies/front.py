"""After how many points a search has reached the front of a grid.

python -m experiments.studies.front --workdir=runs/search-recall --beside=experiments/results/sweep_recall
    [--json=reached.json]

Both are judged on validation, by the rows that they have written. A setting on the grid's front, a mean over seeds, is
reached by the first point that is no worse than it, in hard nats and in cost, by more than its 95 % intervals. The
hypervolume is the area of cost and nats that points leave behind them, up to the worst of the grid in each, and is told
of the grid's single points, as the search has them, and of its settings, in which a lucky seed counts for less.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import common
from experiments.studies import outcome
from meta_attention_jax import analysis
from meta_attention_jax.analysis import Column
from meta_attention_jax.fields import expect

FINEST = 5e-4
"""Of cost and nats, what no table shows: less than that is no difference, where an interval has no width."""

COLUMNS = [
    Column("setting", "on the grid's front"), Column("nll_hard", "nats hard"), Column("cost", "cost"),
    Column("points", "points", "d"), Column("by", "reached by"),
]


def reached(lines: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each line of a front how many points of a search it took to reach it, None if none has, and which did."""
    made = []
    for line in lines:
        most = {name: line[name] + max(line[f"{name}_pm"] or 0.0, FINEST) for name in ("nll_hard", "cost")}
        hits = [i for i, row in enumerate(found) if all(row.get(name, float("inf")) <= most[name] for name in most)]
        texts, _ = outcome.with_intervals([line], {"nll_hard": ("", ".4f"), "cost": ("", ".1%")})
        made.append({"setting": line["setting"], "points": hits[0] + 1 if hits else None,
                     "by": found[hits[0]]["label"] if hits else None, "most": most, **texts[0]})
    return made


def hypervolume(found: Sequence[dict[str, Any]], worst: tuple[float, float]) -> float:
    """Area in cost times nats that some row beats in both, up to `worst` (cost, nats)."""
    area, best = 0.0, worst[1]
    for row in sorted((row for row in found if not row.get("diverged")), key=lambda row: row["cost"]):
        if row["cost"] < worst[0] and row["nll_hard"] < best:
            area += (worst[0] - row["cost"]) * (best - row["nll_hard"])
            best = row["nll_hard"]
    return area


def main() -> None:
    with common.user_mistakes():
        lines = outcome.stored_lines(BESIDE.value)
        grid, found = (_rows(name, place.value) for name, place in (("beside", BESIDE), ("workdir", WORKDIR)))
    best = outcome.front(lines)
    made = reached([line for line in lines if line["setting"] in best], found)
    good = [row for row in grid if "diverged" not in row]
    worst = max(row["cost"] for row in good), max(row["nll_hard"] for row in good)
    areas = [hypervolume(found[: i + 1], worst) for i in range(len(found))]
    print(analysis.terminal_table(made, COLUMNS))
    print(f"hypervolume of the search's {len(found)} points: {areas[-1]:.4f}")
    said = {"points_of_grid": len(grid), "points": len(found), "front": made, "hypervolumes": areas}
    for name, rows in ((f"{len(grid)} points", good), ("settings", [line for line in lines if "cost" in line])):
        whole = hypervolume(rows, worst)
        enough = next((i + 1 for i, area in enumerate(areas) if area >= whole), None)
        print(f"of the grid's {name}: {whole:.4f}, which the search has after {enough or 'more'} points")
        said |= {f"hypervolume of {name}": whole, f"points for that of {name}": enough}
    if JSON.value:
        analysis.write_json(JSON.value, said)


def _rows(field: str, folder: str) -> list[dict[str, Any]]:
    found = json.loads((pathlib.Path(folder) / "rows.json").read_text(encoding="utf-8"))
    expect(any("diverged" not in row for row in found), field, "a point that has come to its end", folder)
    return found


if __name__ == "__main__":
    WORKDIR = common.define_path("workdir", None, "Of the search.")
    BESIDE = common.define_path("beside", None, "The results of the grid.")
    JSON = common.define_path("json", None, "Where the result goes.")
    flags.mark_flags_as_required(["workdir", "beside"])
    common.run(main)
