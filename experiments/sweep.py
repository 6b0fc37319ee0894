"""Trains all points of a sweep: those that differ in array inputs alone as one program, vmapped; on CPUs they take
turns, a core each.

python -m experiments.sweep --config=configs/sweep_concentration.py --workdir=runs/sweep
    [--engine=ray [--address=auto] [--devices_per_group=1]] [--group=0]
    [--points_at_once=8] [--notogether] [--test_batches=32]
    [--search=optuna [--trials=64] [--objectives=nats,cost] [--sampler=tpe] [--trials_at_once=8]]

The config file says what is swept: besides `get_config()` it has a `get_sweep()`, made of `product`, `zipped`, `chain`,
`sweep`, `point` and `log_spaced` (`meta_attention_jax.sweeps.space`). The order of the data is that of the config's own
seed for all points; `seed` of a point is that of parameters and samples.

Every point is an ordinary run directory, `points/<label>`. Interrupted, start it again; a point that diverges is
reported (`points/<label>.diverged`), as is one whose checkpoints are all damaged, and the others go on. Points of one
program, --points_at_once of them at most, are a group. With --engine=ray every group is a task of a Ray cluster (extra
`ray`) whose machines see the directory and this code under the same paths, tried again where a worker dies; --group=i
trains one alone, for an array job of any scheduler. A second command in the same directory leaves to the first what
that one trains. Whoever is last writes all results: `rows.json`, `table.csv`, `table.md`, `pareto.png`, `against.png`.
The test split is read for the chosen setting alone, once no point is left. A sweep may gain points afterwards, but lose
and change none; what it then chooses is chosen after the test split was read.

With --search=optuna (extra `optuna`) the file has a `get_search()`: ranges of fields instead of points (`uniform`,
`log_uniform`, `integers`, `choice`). Batches of --trials_at_once points are proposed from what those before have scored
on validation, by NSGA-II for several --objectives, by TPE for one, and trained like those of a grid. A point that
diverges counts as failed, one that is proposed again is not trained again. `sweep.json` has the points of every batch,
before it is trained: started again, the search goes on as if it had never stopped; with more --trials too, if those
before were whole batches.
Results are written after every batch. `optuna.log` is Optuna's journal, written anew at every start, for other tools.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Optional

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import common
from experiments.studies import outcome, pinned, searching, sweeps
from meta_attention_jax.config import config_to_dict
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, at, in_bucket
from meta_attention_jax.sweeps import engine
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.search import SAMPLERS
from meta_attention_jax.training import backbone, build
from meta_attention_jax.training.parallel import device_per_core

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_sweep().", lock_config=True)
WORKDIR = common.define_path("workdir", None, "Where all points and the results go.", buckets=True)
ENGINE = flags.DEFINE_enum("engine", "local", ("local", "ray"), "What trains the groups.")
ADDRESS = flags.DEFINE_string("address", None, "Of the Ray cluster; absent, one on this machine is started.")
DEVICES = flags.DEFINE_integer("devices_per_group", 1, "With Ray: accelerators, or cores without any.", 1)
GROUP = flags.DEFINE_integer("group", None, "Train this one alone, from 0.")
AT_ONCE = flags.DEFINE_integer("points_at_once", 0, "Of a group, at most; 0 is as many as fit in memory.", 0)
TOGETHER = flags.DEFINE_bool("together", True, "False trains one point after the other.")
SEARCH = flags.DEFINE_enum("search", "grid", ("grid", "optuna"), "What proposes the points.")
TRIALS = flags.DEFINE_integer("trials", 64, "Of a search, in all.", 1)
OBJECTIVES = flags.DEFINE_list("objectives", ["nats", "cost"], "Of a search: of nats, soft_nats, cost; minimised.")
SAMPLER = flags.DEFINE_enum("sampler", None, SAMPLERS, "Of a search; absent, tpe for one objective.")
TRIALS_AT_ONCE = flags.DEFINE_integer("trials_at_once", 8, "Of a search: asked for and trained together.", 1)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split; 0 leaves it unread.", 0)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    root, base = at(WORKDIR.value), CONFIG.value
    searches = SEARCH.value == "optuna"
    with common.user_mistakes():
        on_ray = ENGINE.value == "ray"
        if not on_ray:
            device_per_core()
        for flag in () if on_ray else (ADDRESS, DEVICES):
            expect(not flag.present, flag.name, "--engine=ray with it", flag.value)
        for flag in () if searches else (TRIALS, OBJECTIVES, TRIALS_AT_ONCE, SAMPLER):
            expect(not flag.present, flag.name, "--search=optuna with it", flag.value)
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        if searches:
            expect(GROUP.value is None, "group", "--search=grid with it", GROUP.value)
            expect(not in_bucket(root), "workdir", "a path of this machine for --search=optuna", str(root))
            ranges = sweeps.load_search(path)
            searching.check(base, ranges, OBJECTIVES.value)
        else:
            points, stored = sweeps.load_sweep(path), sweeps.stored_points(root)
            points = dict(zip(algebra.kept_labels(points, stored, base), points))
        asks = engine.connect(ADDRESS.value, DEVICES.value) if on_ray else None
    train = functools.partial(_train, root, base, asks, {})
    if searches:
        points = searching.search(
            root, base, ranges, OBJECTIVES.value, sampler=SAMPLER.value or SAMPLERS[len(OBJECTIVES.value) == 1],
            trials=TRIALS.value, at_once=TRIALS_AT_ONCE.value, train=train,
        )
        errors = []  # A search that has come here has trained all.
    else:
        shared = {"config": config_to_dict(base), "points": {n: stored.get(n, p) for n, p in points.items()}}
        errors = train(points, shared)
    found = outcome.rows(root, points)
    if len(found) == len(points) and TEST_BATCHES.value:
        pick = outcome.chosen(outcome.lines(found))
        calls = {
            row["label"]: (root / "points" / row["label"], algebra.configured(base, row["point"]), TEST_BATCHES.value)
            for row in found if row["setting"] == pick
        }
        if on_ray:
            errors += engine.on_ray(sweeps.read_test, calls, asks)
        else:
            for call in calls.values():
                sweeps.read_test(*call)
    print()
    outcome.write_results(root, points, base.name)
    if errors:
        common.fail(f"engine: expected all groups to come to their end, got {len(errors)} that did not: {errors[0]}")


def _train(
    root: Place, base: ConfigDict, asks: Optional[Mapping[str, Any]], datasets: dict[str, Any],
    points: Mapping[str, algebra.Point], shared: Mapping[str, Any],
) -> list[str]:
    """Checks the points, pins what is `shared`, and trains them; what went wrong on Ray, which `asks` says there is."""
    on_ray = asks is not None
    with common.user_mistakes():
        configs = {name: algebra.configured(base, point) for name, point in points.items()}
        for config in configs.values():
            common.check_fields(config)
            if on_ray:  # Of their devices the workers know.
                backbone.complete(config)
                build.validate_without_devices(config)
            else:
                build.check(config)
        groups = sweeps.groups(configs, together=TOGETHER.value, at_once=AT_ONCE.value)
        if GROUP.value is not None:
            expect(0 <= GROUP.value < len(groups), "group", f"one of {len(groups)}, from 0", GROUP.value)
            groups = [groups[GROUP.value]]
        datasets |= sweeps.open_datasets(configs.values(), datasets)
        if not on_ray:
            sweeps.check_starts(root, configs, datasets)
        data = sweeps.data_of(root, configs, datasets)
        what = "this search" if "search" in shared else "this sweep"
        pinned.pin(root / "sweep.json", shared, what, [key for key in searching.GROWING if key in shared], data)
        mine = {members[0]: {name: configs[name] for name in members} for members in groups}
        if not on_ray:
            jobs = sweeps.prepared(root, {n: c for group in mine.values() for n, c in group.items()}, datasets)
    if on_ray:
        calls = {name: (root, group, DEVICES.value) for name, group in mine.items()}
        return engine.on_ray(sweeps.train_configs, calls, asks)
    sweeps.train_points(root, jobs, together=TOGETHER.value, at_once=AT_ONCE.value)
    return []


if __name__ == "__main__":
    common.run(main)
