"""What is concluded from the directory of a sweep: rows, lines over seeds, the pick, pictures. No flags."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from matplotlib.figure import Figure

from experiments.common import spared
from experiments.studies.comparison import MEANS, TOLERANCE, choose, with_intervals
from experiments.studies.sweeps import failed
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import interval
from meta_attention_jax.config import read_config, read_stored
from meta_attention_jax.files import Place, at
from meta_attention_jax.sweeps.space import Point, labels
from meta_attention_jax.training.logs import read_metrics

if TYPE_CHECKING:
    import pandas

RULE = f"the cheapest within {TOLERANCE} nats of the best, hard, on validation"

MEASURES = {
    **{name: MEANS[name] for name in ("nll_hard", "nll_soft")},
    "gap": ("gap", "+.4f"),
    **{name: MEANS[name] for name in ("cost", "routing_entropy", "usage_entropy")},
    "full": ("full", ".1%"),
    "kl": ("KL, nats", ".4f"),
}
"""What is averaged over seeds, on validation: title and format. Of the hard run, but for the KL."""


def settings(points: Sequence[Point]) -> list[str]:
    """The label of every point without its seed: what seeds are averaged of."""
    bare = [{k: v for k, v in point.items() if k != "seed"} for point in points]
    unique = [point for i, point in enumerate(bare) if point not in bare[:i]]
    names = labels(unique)
    return [names[unique.index(point)] for point in bare]


Points = Sequence[Point] | Mapping[str, Point]
"""Of a sweep, by their labels where those are not `labels` of the points."""


def rows(root: Place, points: Points) -> list[dict[str, Any]]:
    """One row per point that has run to its end or diverged, from the directory alone. One whose
    files are damaged is named in a warning, and left out."""
    found = []
    if not isinstance(points, Mapping):
        points = dict(zip(labels(points), points))
    for (label, point), setting in zip(points.items(), settings(list(points.values()))):
        path = root / "points" / label
        row = {"label": label, "setting": setting, "point": point, "seed": point.get("seed")}
        if failed(root, label).exists():
            found.append({**row, "diverged": failed(root, label).read_text(encoding="utf-8")})
            continue
        if not (path / "metrics.jsonl").exists():
            continue
        try:
            measured = _measured(path)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"{label}: expected the files of a run, got damaged ones ({reason}).", stacklevel=2)
            continue
        if measured is not None:
            found.append({**row, **measured})
    return found


def _measured(path: Place) -> Optional[dict[str, Any]]:
    """What a point has to show at its end; None before."""
    steps = read_config(path / "config.json")["train"]["steps"]
    # The last evaluation is logged before its checkpoint is complete.
    if not (path / "checkpoints" / str(steps)).is_dir():
        return None
    last = [r for r in read_metrics(path) if r["event"] == "eval"]
    hard, soft = last[-1]["hard"], last[-1]["soft"]
    if hard["nll"] is None or soft["nll"] is None:  # What JSON holds of NaN and infinity.
        return {"diverged": f"step {steps}: the evaluation is not finite."}
    row = {
        "nll_hard": hard["nll"], "nll_soft": soft["nll"], "gap": hard["nll"] - soft["nll"],
        "full": hard.get("fraction/full"), "kl": soft["kl"],
        **{name: hard[name] for name in ("cost", "routing_entropy", "usage_entropy")},
    }
    if "kinds" in hard:
        row["accuracy"] = hard["kinds"]["accuracy"]
    if (path / "test.json").exists():
        row["test"] = read_stored(path / "test.json", "a result")
    return row


def lines(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per setting: means over seeds with 95 % intervals (t), and runs that diverged."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["setting"], []).append(row)
    made = []
    for setting, group in groups.items():
        good = [row for row in group if "diverged" not in row]
        line = {
            "setting": setting,
            "point": {k: v for k, v in group[0]["point"].items() if k != "seed"},
            "seeds": len(good),
            "diverged": len(group) - len(good),
        }
        for name in MEASURES:
            if values := [row[name] for row in good if row.get(name) is not None]:
                line[name], line[f"{name}_pm"] = interval(values)
        tested = [row["test"] for row in good if "test" in row]
        for name in ("nll_hard", "cost") if tested else ():
            line[f"test_{name}"], line[f"test_{name}_pm"] = interval([t[name] for t in tested])
        made.append(line)
    return made


def stored_lines(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """`lines` of the results that a sweep has written."""
    path = at(folder) / "rows.json"
    try:
        return lines(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"beside: expected the results of a sweep in {str(path)!r}, got none.") from None


def front(made: Sequence[dict[str, Any]]) -> list[str]:
    """Settings that no other beats in both cost and hard nats, by rising cost; of those whose seeds
    all went well, for a mean over the survivors is not that of the setting."""
    known = [line for line in made if line["seeds"] and not line.get("diverged")]
    best = []
    for line in sorted(known, key=lambda line: (line["cost"], line["nll_hard"])):
        if not best or line["nll_hard"] < best[-1]["nll_hard"]:
            best.append(line)
    return [line["setting"] for line in best]


def chosen(made: Sequence[dict[str, Any]]) -> Optional[str]:
    """The cheapest setting within TOLERANCE nats of the best in mean hard nats on validation, of the
    points without a name (those with one are baselines) whose seeds all went well; None if none."""
    candidates = [line for line in made if "name" not in line["point"]] or list(made)
    candidates = [line for line in candidates if line["seeds"] and not line["diverged"]]
    if not candidates:
        return None
    return choose([{"settings": line["setting"], "nll": line["nll_hard"], "cost": line["cost"]} for line in candidates])


def swept(made: Sequence[dict[str, Any]]) -> Optional[str]:
    """The first field with several numbers among the points without a name: the axis of pictures."""
    plain = [line["point"] for line in made if "name" not in line["point"]]
    for field in dict.fromkeys(field for point in plain for field in point):
        values = {point[field] for point in plain if isinstance(point.get(field), (int, float))}
        if len(values) > 1:
            return field
    return None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a sweep has found so far."""

    rows: list[dict[str, Any]]  # Of the points.
    lines: list[dict[str, Any]]  # Of the settings, with `front` and `chosen` marked.
    front: list[str]  # Settings that nothing beats in both cost and nats.
    pick: Optional[str]  # The chosen setting; None if there is none, or while points are left.
    total: int  # Points of the sweep.

    @property
    def title(self) -> str:
        """How much of the sweep this is, where it is not all; "" where it is."""
        left = self.total - len(self.rows)
        return f" ({len(self.rows)} of {self.total} points)" if left else ""

    def frame(self) -> pandas.DataFrame:
        """One row per setting: the swept fields as columns, then seeds, means and half-widths."""
        import pandas

        fields = dict.fromkeys(field for line in self.lines for field in line["point"])
        first = lambda line: {field: line["point"].get(field) for field in fields}  # noqa: E731
        rows = [{"setting": line["setting"], **first(line), **line} for line in self.lines]
        return pandas.DataFrame(rows).drop(columns="point", errors="ignore")

    @property
    def done(self) -> list[dict[str, Any]]:
        """Lines of which at least one seed has ended well."""
        return [line for line in self.lines if line["seeds"]]


def result(root: Place, points: Points) -> Result:
    """From the directory alone. Scores on the test split are those of the pick: a sweep that has grown
    may have had another before."""
    return concluded(rows(root, points), len(points))


def concluded(found: list[dict[str, Any]], total: int) -> Result:
    """What the rows of a sweep of `total` points say."""
    pick = chosen(lines(found)) if len(found) == total else None
    found = [{k: v for k, v in row.items() if k != "test" or row["setting"] == pick} for row in found]
    made = lines(found)
    best = front(made)
    for line in made:
        line["front"] = "yes" if line["setting"] in best else ""
        line["chosen"] = "chosen" if line["setting"] == pick else ""
    return Result(rows=found, lines=made, front=best, pick=pick, total=total)


def shown(found: Result) -> tuple[list[dict[str, Any]], list[analysis.Column]]:
    """The lines as text, and the columns of their table."""
    columns = [analysis.Column("setting", "setting"), analysis.Column("seeds", "seeds", "d"),
               analysis.Column("diverged", "diverged", "d")]
    names = dict(MEASURES)
    if any("test_cost" in line for line in found.lines):
        names |= {"test_nll_hard": ("nats hard, test", ".4f"), "test_cost": ("cost, test", ".1%")}
    texts, means = with_intervals(found.lines, names)
    return texts, columns + means + [analysis.Column("front", "front"), analysis.Column("chosen", "")]


def drawers(found: Result, title: str) -> dict[str, Callable[[], Figure]]:
    """What draws `pareto`, and `against` where a number was swept."""
    field = swept(found.lines)
    made = {"pareto": lambda: analysis.pareto_figure(found.done, found.front, found.pick, field, title)}
    points = [line["point"] for line in found.done if field in line["point"]]
    lines = {json.dumps({k: v for k, v in point.items() if k != field}, sort_keys=True) for point in points}
    if len(lines) < len(points) or len(points) == 1:  # Lines of a mark each, as in a search, would say nothing.
        made["against"] = lambda: analysis.against_figure(found.done, field, found.pick, title)
    return made


def figures(found: Result, title: str) -> dict[str, Figure]:
    """The figures of `drawers`."""
    return {name: draw() for name, draw in drawers(found, title).items()}


def write_results(root: Place, points: Points, title: str, unasked: int = 0) -> None:
    """rows.json, table.csv, table.md, pareto.png, against.png; prints the table, or the front alone while a search has
    `unasked` points to come."""
    found = concluded(rows(root, points), len(points) + unasked)
    analysis.write_json(root / "rows.json", found.rows)
    if not found.done:
        print("no point has run to its end")
        return
    analysis.write_text(root / "table.csv", found.frame().to_csv(index=False))
    written, columns = shown(found)
    analysis.write_text(root / "table.md", analysis.markdown_table(written, columns))
    said = [line for line in written if line["front"] or not unasked]
    print(analysis.terminal_table(said, columns, width=160))
    told = []
    for name, draw in drawers(found, title + found.title).items():
        with spared(f"{name}.png"):
            analysis.save(draw(), root / f"{name}.png")
            told.append(f"{root}/{name}.png")
    print(f"table: {root}/table.md   rows: {root}/rows.json   pictures: {', '.join(told)}")
    if found.title:
        print(f"so far{found.title}: nothing is chosen yet")
    if found.pick:
        print(f"chosen: {found.pick}, {RULE}")
