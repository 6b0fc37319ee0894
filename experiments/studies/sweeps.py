"""How the points of a sweep are trained, and what is concluded from its directory. No flags."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.common import Data, spared
from experiments.studies.comparison import TOLERANCE, choose
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import interval
from meta_attention_jax.config import config_to_dict, read_config, read_stored
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.scalars import plain
from meta_attention_jax.sweeps.space import Point, Sweep, labels, program
from meta_attention_jax.sweeps.together import Lost, Moved, train_together
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints, Damaged
from meta_attention_jax.training.job import Job, prepare
from meta_attention_jax.training.lock import Busy, hold
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.restore import initial_params

if TYPE_CHECKING:
    import pandas

RULE = f"the cheapest within {TOLERANCE} nats of the best, hard, on validation"

MEASURES = {
    "nll_hard": ("nats hard", ".4f"),
    "nll_soft": ("nats soft", ".4f"),
    "gap": ("gap", "+.4f"),
    "cost": ("cost", ".1%"),
    "routing_entropy": ("routing entropy", ".1%"),
    "usage_entropy": ("usage entropy", ".1%"),
    "full": ("full", ".1%"),
    "kl": ("KL, nats", ".4f"),
}
"""What is averaged over seeds, on validation: title and format. Of the hard run, but for the KL."""


def load_sweep(path: str | pathlib.Path) -> Sweep:
    """What the config file's `get_sweep()` returns.

    Raises:
      ValueError: no such function, one that does not run, or something else than a list of dicts.
    """
    spec = importlib.util.spec_from_file_location("_sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_sweep", None)):
        raise ValueError(f"config: expected a file that defines get_sweep(), got {str(path)!r}.")
    try:
        points = module.get_sweep()
    except Exception as error:  # The user's own code.
        if isinstance(error, ValueError) and ": expected " in str(error):  # Of the algebra.
            raise
        raise ValueError(
            f"config: expected a get_sweep() that runs in {str(path)!r}, got "
            f"{type(error).__name__}: {error}."
        ) from None
    if not (isinstance(points, list) and all(isinstance(point, dict) for point in points)):
        raise ValueError(
            f"config: expected get_sweep() to return a list of dicts of overrides, got {points!r}."
        )
    points = [{field: plain(value) for field, value in point.items()} for point in points]
    labels(points)  # Says what is wrong with them.
    return points


def stored_points(root: pathlib.Path) -> dict[str, Point]:
    """Points by label of the sweep that is in the directory already; none in a new one.

    Raises:
      ValueError: a damaged `sweep.json`.
    """
    path = root / "sweep.json"
    if not path.exists():
        return {}
    points = read_stored(path, "this sweep").get("points")
    if not (isinstance(points, dict) and all(isinstance(point, dict) for point in points.values())):
        raise ValueError(f"workdir: expected this sweep in {str(path)!r}, got something else.")
    return points


def settings(points: Sequence[Point]) -> list[str]:
    """The label of every point without its seed: what seeds are averaged of."""
    bare = [{k: v for k, v in point.items() if k != "seed"} for point in points]
    unique = []
    for point in bare:
        if point not in unique:
            unique.append(point)
    names = labels(unique)
    return [names[unique.index(point)] for point in bare]


def _data(config: ConfigDict) -> str:
    """What a dataset depends on; the window too, since `recall` keeps its distance to it."""
    data = config_to_dict(config)["data"]
    return json.dumps([data, build.data_seed(config), config.model.window])


def open_datasets(configs: Iterable[ConfigDict]) -> dict[str, Dataset]:
    """Every distinct dataset of the points, once; nothing is written.

    Raises:
      ValueError: data that cannot be had.
    """
    distinct = {_data(config): config for config in configs}
    return {key: build.build_dataset(config) for key, config in distinct.items()}


def data_of(
    root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]
) -> dict[str, Data]:
    """What the points read, by label, for `common.pin`."""
    return {
        label: Data(datasets[_data(config)], [root / "points" / label])
        for label, config in configs.items()
    }


def check_starts(
    root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]
) -> None:
    """Reads what new points start from: a mistake in it must come before anything is written.

    Raises:
      ValueError: as `restore.initial_params`.
    """
    seen = []
    for label, config in configs.items():
        dataset = datasets[_data(config)]
        start = config.train.init_from, build.build_spec(config, dataset).model, dataset
        if config.train.init_from and start not in seen and not (root / "points" / label).exists():
            initial_params(config.train.init_from, start[1], dataset.tokenizer)
            seen.append(start)


def prepared(
    root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]
) -> dict[str, Job]:
    """Jobs of the points by label, but for those that diverged.

    Raises:
      ValueError: as `job.prepare`.
    """
    return {
        label: prepare(config, root / "points" / label, datasets[_data(config)])
        for label, config in configs.items()
        if not failed(root, label).exists()
    }


def failed(root: pathlib.Path, label: str) -> pathlib.Path:
    """The file that says that a point diverged."""
    return root / "points" / f"{label}.diverged"


def steps_done(path: pathlib.Path) -> int:
    """Step of the newest checkpoint of a run, 0 without any."""
    if not (path / "checkpoints").is_dir():
        return 0
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    try:
        return checkpoints.latest or 0
    finally:
        checkpoints.close()


def train_points(
    root: pathlib.Path, jobs: Mapping[str, Job], *, together: bool = True, at_once: int = 0
) -> None:
    """Trains what is not finished: the same program from the same step on as one group.

    Args:
      root: of the sweep; a point that diverges leaves `points/<label>.diverged`, one whose
        checkpoints are all damaged is named and stays as it is.
      jobs: of `prepared`.
      together: False trains one point after the other.
      at_once: points of a group at most; 0 is as many as fit in memory.
    """
    left = dict(jobs)
    while left:
        # Groups that met a damaged checkpoint: their points are no longer at one step, or fewer.
        left = _train_left(root, left, together, at_once)


def _train_left(
    root: pathlib.Path, jobs: Mapping[str, Job], together: bool, at_once: int
) -> dict[str, Job]:
    """Trains all but the groups that it returns."""
    again: dict[str, Job] = {}
    groups: dict[Any, list[str]] = {}
    for label, job in jobs.items():
        start = steps_done(job.path)
        # Those that have diverged since may be here a second time.
        if start < job.config.train.steps and not failed(root, label).exists():
            same = program(job.config) if together else None
            groups.setdefault((same or label, start), []).append(label)
    parts = [
        (members[i : i + (at_once or len(members))], start)
        for (_, start), members in groups.items()
        for i in range(0, len(members), at_once or len(members))
    ]
    for count, (members, start) in enumerate(parts, 1):
        print(f"\n[{count}/{len(parts)}] {members[0]}" + (" ..." if len(members) > 1 else ""))
        if len(members) > 1:
            group = {label: jobs[label] for label in members}
            try:
                _train_group(root, group, start)
            except Moved:
                again |= group
            except Lost as error:
                print(f"{error.name}: {error}")
                again |= {label: job for label, job in group.items() if label != error.name}
            continue
        try:
            train(jobs[members[0]], label=members[0])
        except Busy:
            print(_busy(members[0]))
        except Damaged as error:
            print(f"{members[0]}: {error}")
        except Diverged as error:
            print(f"{members[0]}: {error}")
            analysis.write_text(failed(root, members[0]), str(error))
    return again


def _busy(label: str) -> str:
    return f"{label}: left to the process that trains it."


def _train_group(root: pathlib.Path, jobs: Mapping[str, Job], start: int) -> None:
    """Trains as one program those that no other process has, or has had since this one looked."""
    with contextlib.ExitStack() as stack:
        mine = {}
        for label, job in jobs.items():
            try:
                stack.enter_context(hold(job.path))
            except Busy:
                print(_busy(label))
                continue
            now = steps_done(job.path)
            if now == start and not failed(root, label).exists():
                mine[label] = job
            elif now < job.config.train.steps:
                print(f"{label}: another process left it at step {now}; start the command again.")
        if mine:
            train_together(
                list(mine.values()), names=list(mine), start=start, label=f"{len(mine)} points",
                failed=lambda label, sentence: analysis.write_text(failed(root, label), sentence),
            )


Points = Sequence[Point] | Mapping[str, Point]
"""Of a sweep, by their labels where those are not `labels` of the points."""


def rows(root: pathlib.Path, points: Points) -> list[dict[str, Any]]:
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
            warnings.warn(
                f"{label}: expected the files of a run, got damaged ones ({reason}).", stacklevel=2
            )
            continue
        if measured is not None:
            found.append({**row, **measured})
    return found


def _measured(path: pathlib.Path) -> Optional[dict[str, Any]]:
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
            values = [row[name] for row in good if row.get(name) is not None]
            if values:
                line[name], line[f"{name}_pm"] = interval(values)
        tested = [row["test"] for row in good if "test" in row]
        for name in ("nll_hard", "cost") if tested else ():
            line[f"test_{name}"], line[f"test_{name}_pm"] = interval([t[name] for t in tested])
        made.append(line)
    return made


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
    return choose([
        {"settings": line["setting"], "nll": line["nll_hard"], "cost": line["cost"]}
        for line in candidates
    ])


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
    """What a sweep has found so far.

    Attributes:
      rows: of the points.
      lines: of the settings, with `front` and `chosen` marked.
      front: settings that nothing beats in both cost and nats.
      pick: the chosen setting; None if there is none, or while points are left.
      total: points of the sweep.
    """

    rows: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    front: list[str]
    pick: Optional[str]
    total: int

    @property
    def title(self) -> str:
        """How much of the sweep this is, where it is not all; "" where it is."""
        left = self.total - len(self.rows)
        return f" ({len(self.rows)} of {self.total} points)" if left else ""

    def frame(self) -> pandas.DataFrame:
        """One row per setting: the swept fields as columns, then seeds, means and half-widths."""
        import pandas

        fields = dict.fromkeys(field for line in self.lines for field in line["point"])
        return pandas.DataFrame([
            {
                "setting": line["setting"],
                **{field: line["point"].get(field) for field in fields},
                **{name: value for name, value in line.items() if name not in ("setting", "point")},
            }
            for line in self.lines
        ])

    @property
    def done(self) -> list[dict[str, Any]]:
        """Lines of which at least one seed has ended well."""
        return [line for line in self.lines if line["seeds"]]


def result(root: pathlib.Path, points: Points) -> Result:
    """From the directory alone. Scores on the test split are those of the pick: a sweep that has grown
    may have had another before."""
    return concluded(rows(root, points), len(points))


def concluded(found: list[dict[str, Any]], total: int) -> Result:
    """What the rows of a sweep of `total` points say."""
    pick = chosen(lines(found)) if len(found) == total else None
    found = [row if row["setting"] == pick else {**row, "test": None} for row in found]
    found = [{k: v for k, v in row.items() if k != "test" or v is not None} for row in found]
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
    columns += [analysis.Column(name, title_) for name, (title_, _) in names.items()]
    columns += [analysis.Column("front", "front"), analysis.Column("chosen", "")]
    written = [
        {**line, **{name: analysis.with_interval(line, name, form) for name, (_, form) in names.items()}}
        for line in found.lines
    ]
    return written, columns


def drawers(found: Result, title: str) -> dict[str, Callable[[], Figure]]:
    """What draws `pareto`, and `against` where a number was swept."""
    field = swept(found.lines)
    made = {"pareto": lambda: analysis.pareto_figure(found.done, found.front, found.pick, field, title)}
    if field and any(field in line["point"] for line in found.done):
        made["against"] = lambda: analysis.against_figure(found.done, field, found.pick, title)
    return made


def figures(found: Result, title: str) -> dict[str, Figure]:
    """The figures of `drawers`."""
    return {name: draw() for name, draw in drawers(found, title).items()}


def write_results(root: pathlib.Path, points: Points, title: str) -> None:
    """rows.json, table.csv, table.md, pareto.png, against.png; prints the table."""
    found = result(root, points)
    analysis.write_json(root / "rows.json", found.rows)
    if not found.done:
        print("no point has run to its end")
        return
    analysis.write_text(root / "table.csv", found.frame().to_csv(index=False))
    written, columns = shown(found)
    analysis.write_text(root / "table.md", analysis.markdown_table(written, columns))
    print(analysis.terminal_table(written, columns, width=160))
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
