"""How the points of a sweep are opened and trained. No flags."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.studies import final
from experiments.studies.pinned import Data
from experiments.studies.scores import measure
from meta_attention_jax import analysis
from meta_attention_jax.config import config_to_dict, read_stored
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.fields import expect, plain
from meta_attention_jax.files import Place
from meta_attention_jax.sweeps.space import Point, Range, Ranges, Sweep, labels, program
from meta_attention_jax.sweeps.together import TOGETHER, Lost, Moved, train_together
from meta_attention_jax.training import backbone, build
from meta_attention_jax.training.checkpoint import Damaged, newest
from meta_attention_jax.training.job import Job, prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.parallel import device_per_core
from meta_attention_jax.training.processes import Busy, Taken, hold
from meta_attention_jax.training.restore import initial_params


def load_sweep(path: str | pathlib.Path) -> Sweep:
    """What the config file's `get_sweep()` returns."""
    points = _loaded(path, "get_sweep")
    ok = isinstance(points, list) and all(isinstance(point, dict) for point in points)
    expect(ok, "config", "get_sweep() to return a list of dicts of overrides", points)
    points = [{field: plain(value) for field, value in point.items()} for point in points]
    labels(points)  # Says what is wrong with them.
    return points


def load_search(path: str | pathlib.Path) -> Ranges:
    """What the config file's `get_search()` returns."""
    ranges = _loaded(path, "get_search")
    ok = isinstance(ranges, dict) and any(isinstance(one, Range) for one in ranges.values())
    expect(ok, "config", "get_search() to return a dict of fields, one with a range at least", ranges)
    return {field: plain(one) for field, one in ranges.items()}


def _loaded(path: str | pathlib.Path, name: str) -> Any:
    """What a function of the config file returns."""
    spec = importlib.util.spec_from_file_location("_sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    expect(callable(found), "config", f"a file that defines {name}()", str(path))
    try:
        return found()
    except Exception as error:  # The user's own code.
        if isinstance(error, ValueError) and ": expected " in str(error):  # Of the algebra.
            raise
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"config: expected a {name}() that runs in {str(path)!r}, got {got}.") from None


def stored_points(root: Place) -> dict[str, Point]:
    """Points by label of the sweep that is in the directory already; none in a new one."""
    path = root / "sweep.json"
    if not path.exists():
        return {}
    points = read_stored(path, "this sweep").get("points")
    if not (isinstance(points, dict) and all(isinstance(point, dict) for point in points.values())):
        raise ValueError(f"workdir: expected this sweep in {str(path)!r}, got something else.")
    return points


def _data(config: ConfigDict) -> str:
    """What a dataset depends on; the window too, since `recall` keeps its distance to it."""
    data = config_to_dict(config)["data"]
    return json.dumps([data, build.data_seed(config), config.model.window, config.retrofit.backbone])


def open_datasets(configs: Iterable[ConfigDict], known: Mapping[str, Dataset] = {}) -> dict[str, Dataset]:
    """Every distinct dataset of the points, once, of those that are not `known`, and these; nothing is written."""
    distinct = {_data(config): config for config in configs}
    return {**known, **{key: build.build_dataset(one) for key, one in distinct.items() if key not in known}}


def data_of(root: Place, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> dict[str, Data]:
    """What the points read, by label, for `pinned.pin`."""
    return {label: Data(datasets[_data(config)], [root / "points" / label]) for label, config in configs.items()}


def check_starts(root: Place, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> None:
    """Reads what new points start from: a mistake in it must come before anything is written."""
    seen = []
    for label, config in configs.items():
        dataset = datasets[_data(config)]
        start = config.train.init_from, build.build_spec(config, dataset).model, dataset
        if config.train.init_from and start not in seen and not (root / "points" / label).exists():
            initial_params(config.train.init_from, start[1], dataset.tokenizer, backbone.load(config))
            seen.append(start)


def prepared(root: Place, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> dict[str, Job]:
    """Jobs of the points by label, of those that diverged too: they keep their places in a program."""
    return {
        label: prepare(config, root / "points" / label, datasets[_data(config)]) for label, config in configs.items()
    }


def failed(root: Place, label: str) -> Place:
    """The file that says that a point diverged."""
    return root / "points" / f"{label}.diverged"


def groups(configs: Mapping[str, ConfigDict], *, together: bool = True, at_once: int = 0) -> list[list[str]]:
    """Labels of the points of one program each, `at_once` of them at most (0: all), in the order of the points; each
    alone unless `together`."""
    found: dict[Any, list[str]] = {}
    for label, config in configs.items():
        same = program(config) if together else None
        found.setdefault(same or label, []).append(label)
    return [
        members[i : i + (at_once or len(members))]
        for members in found.values()
        for i in range(0, len(members), at_once or len(members))
    ]


def train_points(root: Place, jobs: Mapping[str, Job], *, together: bool = True, at_once: int = 0) -> None:
    """Trains what is not finished, one of `groups` after the other.

    A point that diverges leaves `points/<label>.diverged`; one whose checkpoints are all damaged is named and
    stays as it is.
    """
    parts = groups({label: job.config for label, job in jobs.items()}, together=together, at_once=at_once)
    for count, members in enumerate(parts, 1):
        group = {label: jobs[label] for label in members}
        if _unfinished(root, group):
            print(f"\n[{count}/{len(parts)}] {members[0]}" + (" ..." if len(members) > 1 else ""))
            train_group(root, group)


def train_configs(root: Place, configs: Mapping[str, ConfigDict], cores: int) -> bool:
    """`train_group` in a process that has nothing yet, on so many cores at most where there is no accelerator."""
    device_per_core(cores)
    return train_group(root, prepared(root, configs, open_datasets(configs.values())))


def train_group(root: Place, jobs: Mapping[str, Job]) -> bool:
    """Trains to the end what is not finished of one of `groups`; whether another process has some of it, which is left
    to it.

    A process that was killed while it saved leaves points at several steps. Those behind catch up first, each in its
    place in the program in which it began: whatever the interruptions, the bits in the end are the same, where a group
    fits into memory at once and one process began it (else what had not begun is divided anew).
    """
    if len(jobs) == 1:
        return any(_left_alone(root, label, job) for label, job in jobs.items())
    with contextlib.ExitStack() as stack:
        mine, busy = {}, False
        for label in _unfinished(root, jobs):
            try:
                stack.enter_context(hold(jobs[label].path))
                mine[label] = jobs[label]
            except Busy:
                print(_busy(label))
                busy = True
        while steps := _unfinished(root, mine):
            start = min(steps.values())
            places = _places(jobs)
            begun = next(places.get(label) for label in steps if steps[label] == start)
            ours = {label: step for label, step in steps.items() if places.get(label) == begun}
            now = [label for label, step in ours.items() if step == start]
            names = begun or now
            try:
                train_together(
                    [jobs[label] for label in names], names=names, only=now, start=start, label=f"{len(now)} points",
                    stop_after=min((step for step in ours.values() if step > start), default=None),
                    failed=lambda label, sentence: analysis.write_text(failed(root, label), sentence),
                    final=final.of_run,
                )
            except Moved:  # A damaged checkpoint is set aside: they are no longer at one step.
                pass
            except Lost as error:
                print(f"{error.name}: {error}")
                del mine[error.name]
            except Taken as error:
                print(f"{error} The rest of its group is left as well.")
                return False
    return busy


def steps_done(path: Place) -> int:
    """The newest checkpoint of a run, 0 without any."""
    return newest(path / "checkpoints")


def _unfinished(root: Place, jobs: Mapping[str, Job]) -> dict[str, int]:
    """Steps done, of the points that have some to do."""
    steps = {label: steps_done(job.path) for label, job in jobs.items() if not failed(root, label).exists()}
    return {label: step for label, step in steps.items() if step < jobs[label].config.train.steps}


def _places(jobs: Mapping[str, Job]) -> dict[str, list[str]]:
    """By label the points with which one began as one program, if all of them are here."""
    found: dict[str, list[str]] = {}
    for job in jobs.values():
        records = read_metrics(job.path) if (job.path / "metrics.jsonl").is_file() else []
        names = next((r[TOGETHER] for r in records if r["event"] == "start" and TOGETHER in r), [])
        if jobs.keys() >= set(names):
            found |= {label: names for label in names}
    return found


def _left_alone(root: Place, label: str, job: Job) -> bool:
    """`train_group` of a group of one."""
    if not _unfinished(root, {label: job}):
        return False
    try:
        train(job, label=label, final=final.of_run)
    except Busy as error:
        print(_busy(label))
        return not isinstance(error, Taken)  # Nor taken back: two would go on so for ever.
    except (Damaged, Diverged) as error:
        print(f"{label}: {error}")
        if isinstance(error, Diverged):
            analysis.write_text(failed(root, label), str(error))
    return False


def read_test(path: Place, config: ConfigDict, batches: int) -> None:
    """Reads the test split for a point that has come to its end, once; one that is damaged is named."""
    try:
        measure(path, config, step=config.train.steps, max_batches=batches)
    except Damaged as error:
        print(f"{path.name}: {error}")


def _busy(label: str) -> str:
    return f"{label}: left to the process that trains it."
