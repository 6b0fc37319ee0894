"""Trains all points of a sweep: those that differ in array inputs alone as one vmapped program.

python -m experiments.sweep --config=configs/sweep_concentration.py --workdir=runs/sweep
    [--shard=0/4] [--points_at_once=8] [--notogether] [--test_batches=32]

The config file says what is swept: besides `get_config()` it has a `get_sweep()`, made of `product`,
`zipped`, `chain`, `sweep`, `point` and `log_spaced` (`meta_attention_jax.training.points`). The order
of the data is that of the config's own seed for all points; `seed` of a point is that of parameters
and samples.

Every point is an ordinary run directory, `points/<label>`. Interrupted, start it again; a point that
diverges is reported (`points/<label>.diverged`) and the others go on. With --shard=i/n this process
takes every n-th point (an array job of any scheduler); whoever is last writes all results: `rows.json`,
`table.csv`, `table.md`, `pareto.png`, `against.png`. The test split is read for the chosen setting
alone, once no point is left.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import common, sweeps
from experiments.comparison import parse_shard
from experiments.scores import scores
from meta_attention_jax import analysis
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build, points as algebra
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.config import config_difference, config_to_dict
from meta_attention_jax.training.loop import Diverged, Job, prepare, train
from meta_attention_jax.training.together import train_together

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_sweep().", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where all points and the results go.")
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: this process takes every n-th point, from i on.")
AT_ONCE = flags.DEFINE_integer("points_at_once", 0, "At most; 0 is as many as fit in memory.", 0)
TOGETHER = flags.DEFINE_bool("together", True, "False trains one point after the other.")
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split; 0 leaves it unread.", 0)
flags.mark_flags_as_required(["config", "workdir"])


def pin(root: pathlib.Path, points: algebra.Sweep) -> None:
    """Writes what the directory is a sweep of, or checks that it is the same.

    Raises:
      ValueError: another sweep's directory, or one with other files.
    """
    mine = {"config": config_to_dict(CONFIG.value), "points": points}
    mine = json.loads(json.dumps(mine))
    path = root / "sweep.json"
    if not path.exists():
        if root.exists() and any(root.iterdir()):
            raise ValueError(
                f"workdir: expected a new directory or one of this sweep, got {str(root)!r}."
            )
        analysis.write_json(path, mine)
        return
    stored = json.loads(path.read_text())
    for field, old, new in config_difference(stored, mine):
        raise ValueError(f"{field}: expected {old!r}, as in {str(path)!r}, got {new!r}.")


def steps_done(job: Job) -> int:
    """Step of the newest checkpoint, 0 without any."""
    if not (job.path / "checkpoints").is_dir():
        return 0
    checkpoints = Checkpoints(job.path / "checkpoints", read_only=True)
    try:
        return checkpoints.latest or 0
    finally:
        checkpoints.close()


def grouped(jobs: dict[str, Job]) -> list[tuple[list[str], int]]:
    """(labels, step) of what is trained at once: the same program from the same step on; of those
    that have to be trained alone, one each."""
    groups: dict[Any, list[str]] = {}
    for label, job in jobs.items():
        same = algebra.program(job.config) if TOGETHER.value else None
        key = (same, steps_done(job)) if same is not None else label
        groups.setdefault(key, []).append(label)
    made = []
    for key, members in groups.items():
        start = key[1] if isinstance(key, tuple) else steps_done(jobs[members[0]])
        size = AT_ONCE.value or len(members)
        made += [(members[i : i + size], start) for i in range(0, len(members), size)]
    return made


def failed(root: pathlib.Path, label: str) -> pathlib.Path:
    """The file that says that a point diverged."""
    return root / "points" / f"{label}.diverged"


def train_group(root: pathlib.Path, jobs: dict[str, Job], members: list[str], start: int) -> None:
    """Trains a group; a single point as any other run."""
    if len(members) == 1:
        try:
            train(jobs[members[0]], label=members[0])
            failures = [None]
        except Diverged as error:
            failures = [str(error)]
            print(f"{members[0]}: {error}")
    else:
        failures = train_together(
            [jobs[label] for label in members], names=members, start=start,
            label=f"{len(members)} points",
        )
    for label, failure in zip(members, failures):
        if failure is not None:
            analysis.write_text(failed(root, label), failure)


def main() -> None:
    root = pathlib.Path(WORKDIR.value)
    base = CONFIG.value
    with common.user_mistakes():
        index, number = parse_shard(SHARD.value)
        points = sweeps.load_sweep(config_flags.get_config_filename(flags.FLAGS["config"]))
        names = algebra.labels(points)
        configs = {n: algebra.configured(base, p) for n, p in zip(names, points)}
        for config in configs.values():
            build.check(config)
        pin(root, points)
        # Points of one program lie side by side, so that every shard has some of each.
        order = sorted(names, key=lambda n: repr(algebra.program(configs[n])))
        mine = [name for name in names if name in order[index::number]]
        jobs: dict[str, Job] = {}
        datasets: dict[str, Any] = {}
        for name in mine:
            if failed(root, name).exists():
                continue
            config = configs[name]
            key = json.dumps(config_to_dict(config)["data"]) + f"{build.data_seed(config)}"
            # The dataset of another run knows its window: `recall` keeps its distance to it.
            key += f"{config.model.window}"
            job = prepare(config, root / "points" / name, datasets.get(key))
            datasets[key] = job.dataset
            jobs[name] = job
    jobs = {name: job for name, job in jobs.items() if steps_done(job) < job.config.train.steps}
    groups = grouped(jobs)
    for count, (members, start) in enumerate(groups, 1):
        print(f"\n[{count}/{len(groups)}] {members[0]}" + (" ..." if len(members) > 1 else ""))
        train_group(root, jobs, members, start)
    found = sweeps.rows(root, points)
    if len(found) == len(points) and TEST_BATCHES.value:
        pick = sweeps.chosen(sweeps.lines(found))
        for row in found:
            path = root / "points" / row["label"]
            if row["setting"] == pick and not (path / "test.json").exists():
                measured = scores(load_run(path), "test", max_batches=TEST_BATCHES.value)
                analysis.write_json(path / "test.json", measured)
    print()
    sweeps.write_results(root, points, base.name)


if __name__ == "__main__":
    common.run(main)
