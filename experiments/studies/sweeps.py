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
from meta_attention_jax import analysis
from meta_attention_jax.config import config_to_dict, read_stored
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.fields import expect, plain
from meta_attention_jax.sweeps.space import Point, Sweep, labels, program
from meta_attention_jax.sweeps.together import Lost, Moved, train_together
from meta_attention_jax.training import backbone, build
from meta_attention_jax.training.checkpoint import Checkpoints, Damaged
from meta_attention_jax.training.job import Job, prepare
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.processes import Busy, hold
from meta_attention_jax.training.restore import initial_params


def load_sweep(path: str | pathlib.Path) -> Sweep:
    """What the config file's `get_sweep()` returns."""
    spec = importlib.util.spec_from_file_location("_sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = callable(getattr(module, "get_sweep", None))
    expect(found, "config", "a file that defines get_sweep()", str(path))
    try:
        points = module.get_sweep()
    except Exception as error:  # The user's own code.
        if isinstance(error, ValueError) and ": expected " in str(error):  # Of the algebra.
            raise
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"config: expected a get_sweep() that runs in {str(path)!r}, got {got}.") from None
    ok = isinstance(points, list) and all(isinstance(point, dict) for point in points)
    expect(ok, "config", "get_sweep() to return a list of dicts of overrides", points)
    points = [{field: plain(value) for field, value in point.items()} for point in points]
    labels(points)  # Says what is wrong with them.
    return points


def stored_points(root: pathlib.Path) -> dict[str, Point]:
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


def open_datasets(configs: Iterable[ConfigDict]) -> dict[str, Dataset]:
    """Every distinct dataset of the points, once; nothing is written."""
    distinct = {_data(config): config for config in configs}
    return {key: build.build_dataset(config) for key, config in distinct.items()}


def data_of(root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> dict[str, Data]:
    """What the points read, by label, for `pinned.pin`."""
    return {label: Data(datasets[_data(config)], [root / "points" / label]) for label, config in configs.items()}


def check_starts(root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> None:
    """Reads what new points start from: a mistake in it must come before anything is written."""
    seen = []
    for label, config in configs.items():
        dataset = datasets[_data(config)]
        start = config.train.init_from, build.build_spec(config, dataset).model, dataset
        if config.train.init_from and start not in seen and not (root / "points" / label).exists():
            initial_params(config.train.init_from, start[1], dataset.tokenizer, backbone.load(config))
            seen.append(start)


def prepared(root: pathlib.Path, configs: Mapping[str, ConfigDict], datasets: Mapping[str, Dataset]) -> dict[str, Job]:
    """Jobs of the points by label, but for those that diverged."""
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
    with contextlib.closing(Checkpoints(path / "checkpoints", read_only=True)) as checkpoints:
        return checkpoints.latest or 0


def train_points(root: pathlib.Path, jobs: Mapping[str, Job], *, together: bool = True, at_once: int = 0) -> None:
    """Trains what is not finished: the same program from the same step on as one group, of `at_once` points
    at most (0: as many as fit in memory), or one point after the other.

    A point that diverges leaves `points/<label>.diverged`; one whose checkpoints are all damaged is named and
    stays as it is.
    """
    left = dict(jobs)
    while left:
        # Groups that met a damaged checkpoint: their points are no longer at one step, or fewer.
        left = _train_left(root, left, together, at_once)


def _train_left(root: pathlib.Path, jobs: Mapping[str, Job], together: bool, at_once: int) -> dict[str, Job]:
    """Trains all but the groups that it returns."""
    again: dict[str, Job] = {}
    groups: dict[Any, list[str]] = {}
    for label, job in jobs.items():
        start = steps_done(job.path)
        # Those that have diverged since may be here a second time.
        if start < job.config.train.steps and not failed(root, label).exists():
            same = program(job.config) if together else None
            groups.setdefault((same or label, start), []).append(label)
    parts = [(members[i : i + (at_once or len(members))], start) for (_, start), members in groups.items()
             for i in range(0, len(members), at_once or len(members))]
    for count, (members, start) in enumerate(parts, 1):
        print(f"\n[{count}/{len(parts)}] {members[0]}" + (" ..." if len(members) > 1 else ""))
        if len(members) > 1:
            group = {label: jobs[label] for label in members}
            try:
                train_group(root, group, start)
            except Moved:
                again |= group
            except Lost as error:
                print(f"{error.name}: {error}")
                again |= {label: job for label, job in group.items() if label != error.name}
            continue
        label = members[0]
        try:
            train(jobs[label], label=label, final=final.of_run)
        except Busy:
            print(_busy(label))
        except (Damaged, Diverged) as error:
            print(f"{label}: {error}")
            if isinstance(error, Diverged):
                analysis.write_text(failed(root, label), str(error))
    return again


def _busy(label: str) -> str:
    return f"{label}: left to the process that trains it."


def train_group(root: pathlib.Path, jobs: Mapping[str, Job], start: int) -> None:
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
                failed=lambda label, sentence: analysis.write_text(failed(root, label), sentence), final=final.of_run,
            )
