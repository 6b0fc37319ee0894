"""Trains all points of a sweep: those that differ in array inputs alone as one vmapped program.

python -m experiments.sweep --config=configs/sweep_concentration.py --workdir=runs/sweep
    [--shard=0/4] [--points_at_once=8] [--notogether] [--test_batches=32]

The config file says what is swept: besides `get_config()` it has a `get_sweep()`, made of `product`, `zipped`, `chain`,
`sweep`, `point` and `log_spaced` (`meta_attention_jax.sweeps.space`). The order of the data is that of the config's own
seed for all points; `seed` of a point is that of parameters and samples.

Every point is an ordinary run directory, `points/<label>`. Interrupted, start it again; a point that diverges is
reported (`points/<label>.diverged`), as is one whose checkpoints are all damaged, and the others go on. With
--shard=i/n this process takes every n-th point (an array job of any scheduler); whoever is last writes all results:
`rows.json`, `table.csv`, `table.md`, `pareto.png`, `against.png`. The test split is read for the chosen setting alone,
once no point is left. A sweep may gain points afterwards, but lose and change none; what it then chooses is chosen
after the test split was read.
"""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import common
from experiments.studies import outcome, pinned, sweeps
from experiments.studies.comparison import parse_shard
from experiments.studies.scores import measure
from meta_attention_jax.config import config_to_dict
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Damaged

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_sweep().", lock_config=True)
WORKDIR = common.define_path("workdir", None, "Where all points and the results go.")
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: this process takes every n-th point, from i on.")
AT_ONCE = flags.DEFINE_integer("points_at_once", 0, "At most; 0 is as many as fit in memory.", 0)
TOGETHER = flags.DEFINE_bool("together", True, "False trains one point after the other.")
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split; 0 leaves it unread.", 0)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    base = CONFIG.value
    with common.user_mistakes():
        index, number = parse_shard(SHARD.value)
        points = sweeps.load_sweep(config_flags.get_config_filename(flags.FLAGS["config"]))
        stored = sweeps.stored_points(root)
        points = dict(zip(algebra.kept_labels(points, stored, base), points))
        configs = {name: algebra.configured(base, point) for name, point in points.items()}
        for config in configs.values():
            common.check_fields(config)
            build.check(config)
        datasets = sweeps.open_datasets(configs.values())
        sweeps.check_starts(root, configs, datasets)
        shared = {"config": config_to_dict(base), "points": {n: stored.get(n, p) for n, p in points.items()}}
        data = sweeps.data_of(root, configs, datasets)
        pinned.pin(root / "sweep.json", shared, "this sweep", grows="points", data=data)
        # Points of one program lie side by side, so that every shard has some of each.
        order = sorted(points, key=lambda n: repr(algebra.program(configs[n])))
        mine = [name for name in points if name in order[index::number]]
        jobs = sweeps.prepared(root, {name: configs[name] for name in mine}, datasets)
    sweeps.train_points(root, jobs, together=TOGETHER.value, at_once=AT_ONCE.value)
    found = outcome.rows(root, points)
    if len(found) == len(points) and TEST_BATCHES.value:
        pick = outcome.chosen(outcome.lines(found))
        for row in found:
            if row["setting"] == pick:
                label, config = row["label"], configs[row["label"]]
                try:
                    path = root / "points" / label
                    measure(path, config, step=config.train.steps, max_batches=TEST_BATCHES.value)
                except Damaged as error:
                    print(f"{label}: {error}")
    print()
    outcome.write_results(root, points, base.name)


if __name__ == "__main__":
    common.run(main)
