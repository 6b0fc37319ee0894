"""Orbax checkpoints behind one thin class: the latest N and the best, written in the background.

Layout of `checkpoints/<step>/`: `state` (the whole `TrainState`), `config` (JSON), `metrics` (JSON, with the validation
nats that decide what is best). A folder of gs:// Orbax reads and writes itself; of s3:// it knows nothing, so that
there this process saves on its own disk and copies, while training waits.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import jax
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from meta_attention_jax import files
from meta_attention_jax.training import processes

METRIC = "nll"

_ZARR = {".zarray": "zarr", "zarr.json": "zarr3"}

_WHOLE = "_CHECKPOINT_METADATA"  # Of a step; where folders are copied, it is copied last.

_LOOKS = 10  # At what is copied, while a step is deleted meanwhile.

_NOT_REACHED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
"""What a bucket says that does not answer: nothing is known of its checkpoints."""


def _metric(metrics: Mapping[str, Any]) -> float:
    nll = float(metrics[METRIC])
    if math.isnan(nll):  # Never written; it would make every comparison false.
        raise ValueError(f"{METRIC} is NaN")
    return nll


class _Manager(ocp.CheckpointManager):
    """Passes over metrics that cannot be read: those of one step must not hide all the others."""

    def metrics(self, step: int) -> Optional[Mapping[str, Any]]:
        try:
            self.check_metrics(step)
            return super().metrics(step)
        except Exception:  # As in `_readable`; whoever restores the step hears of it.
            return None

    def check_metrics(self, step: int) -> None:
        """Raises something if the metrics of a step are there and damaged."""
        found = super().metrics(step)
        if found is not None:
            _metric(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a folder opened for reading is read only."""
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Damaged(ValueError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """Saves and restores training states of one run directory, in the folder of all steps, which is made when missing
    unless `read_only`."""

    def __init__(self, directory: str | os.PathLike[str], *, keep_latest: int = 2, read_only: bool = False):
        self.place = files.at(directory)
        self._stack = contextlib.ExitStack()
        if not files.in_bucket(self.place):
            self.place = self.place.absolute()
        self._copies = str(self.place).startswith("s3://")
        stage = files.staged(self.place) if self._copies else contextlib.nullcontext(None)
        self._stage = self._stack.enter_context(stage)
        self.directory = self._stage.folder if self._copies else self.place
        if self._copies:
            self._begin()
        policy = preservation_policy.AnyPreservationPolicy([
            preservation_policy.LatestN(keep_latest),
            preservation_policy.BestN(get_metric_fn=_metric, reverse=True, n=1),
        ])
        with _quiet() if read_only else contextlib.nullcontext():
            self._manager = _Manager(
                self.directory, item_names=("state", "config"),
                item_handlers={"state": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy, best_fn=_metric, best_mode="min", create=not read_only,
                    read_only=read_only,
                ),
            )

    def save(self, step: int, state: Any, *, config: Mapping[str, Any], nll: float) -> None:
        """Starts writing `state`; nll (nats, validation) decides what is best. A NaN would make every comparison false
        and so corrupt "best": it is written as infinity. With less room on the disk than the state has bytes nothing is
        written, but OSError raised."""
        nll = float(nll)
        # Seen before, it is one error; met halfway, it is one in every thread of the writer.
        self._manager.wait_until_finished()  # Or its writing would not be counted.
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        processes.together(functools.partial(self._check_room, step, needed))
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(dict(config))),
            metrics={METRIC: math.inf if math.isnan(nll) else nll},
        )
        if self._copies:
            self._copy()

    def _begin(self) -> None:
        """Fetches all but the arrays, of steps that are complete; whoever trains the run may be deleting one."""
        for left in reversed(range(_LOOKS)):
            complete = {name.split("/")[0] for name in self._stage.names() if name.endswith(f"/{_WHOLE}")}
            try:
                self._stage.fetch(lambda name: name.split("/")[0] in complete and "/state/" not in name)
                break
            except FileNotFoundError:
                if not left:
                    raise
        for path in self.directory.iterdir():
            if path.name not in complete:
                shutil.rmtree(path)

    def _copy(self) -> None:
        self._manager.wait_until_finished()
        self._stage.push(last=_WHOLE)
        gone = {name.split("/")[0] for name in self._stage.names()} - {path.name for path in self.directory.iterdir()}
        for step in gone:  # What says that it is complete goes first.
            (self.place / step / _WHOLE).unlink(missing_ok=True)
            (self.place / step).rmtree(missing_ok=True)

    def _fetch(self, step: int) -> None:
        if self._copies:
            self._stage.fetch(lambda name: name.startswith(f"{step}/state/"))

    def _check_room(self, step: int, needed: int) -> None:
        if files.in_bucket(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"expected {needed:,} bytes for the checkpoint of step {step}, got {free:,}",
                str(self.directory),
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """All complete steps, in order."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def latest(self) -> Optional[int]:
        """Newest complete step; None without any."""
        return self._manager.latest_step()

    @property
    def best(self) -> Optional[int]:
        """Step of the lowest validation nats; None without any."""
        return self._manager.best_step()

    def resolve(self, step: int | str) -> int:
        """A step number from "latest", "best" or a number."""
        steps = list(self.steps)
        if not steps:
            raise ValueError(f"workdir: expected checkpoints under {self.place}, got none.")
        found = {"latest": self.latest, "best": self.best}.get(step, step)
        if str(found) not in map(str, steps):
            raise ValueError(f"step: expected 'latest', 'best' or one of {steps}, got {step!r}.")
        return int(found)

    def restore(self, template: Any, step: int) -> Any:
        """The state at `step`, with the shapes, types and placement of `template`; Damaged if it cannot be read."""
        self._fetch(step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        with self._readable(step):
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]

    def restore_newest(self, template: Any) -> tuple[int, Any]:
        """(step, state) of the newest checkpoint that can be read; (0, None) without any. Newer ones are damaged: they
        are set aside, and a warning names them. Damaged if none can be read; all stay where they are."""
        passed: list[int] = []
        for step in reversed(self.steps):
            try:
                if processes.several():
                    # Before they restore together, where one that fails would leave the others waiting.
                    processes.together(functools.partial(self._check_share, step))
                state = self.restore(template, step)
            except ValueError as error:
                if step == self.steps[0]:
                    raise Damaged(str(error)) from error
                if processes.leads():
                    warnings.warn(f"{error} The step before it is taken.", stacklevel=2)
                passed.append(step)
                continue
            for damaged in passed:
                self.set_aside(damaged)
            return step, state
        return 0, None

    def _check_share(self, step: int) -> None:
        """Reads the arrays of a step that fall to this process, all of them whole, and forgets them; Damaged if one
        cannot be read."""
        with self._readable(step):
            # Not as an address, where "#", "%" and "?" of a name mean something.
            place = {"driver": "file", "path": f"{self.directory / str(step) / 'state'}/"}
            if files.in_bucket(self.directory):
                bucket, _, name = place["path"].removeprefix("gs://").partition("/")
                place = {"driver": "gcs", "bucket": bucket, "path": name}
            base = {"driver": "ocdbt", "base": place}
            names = sorted(key.decode() for key in tensorstore.KvStore.open(base).result().list().result())
            arrays = [tuple(name.rsplit("/", 1)) for name in names if name.endswith(tuple(_ZARR))]
            if not arrays:
                raise ValueError("no arrays")
            for path, file in arrays[jax.process_index() :: jax.process_count()]:
                kvstore = {**base, "path": f"{path}/"}
                spec = {"driver": _ZARR[file], "kvstore": kvstore}
                tensorstore.open(spec, open=True, read=True).result().read().result()

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint to `damaged/` beside the folder: in its place it would keep new ones of its step from
        being written."""

        def move() -> None:
            place = self.place.parent / "damaged" / str(step)
            while place.exists():
                place = place.with_name(f"{place.name}_")
            files.move(self.place / str(step), place)
            if self._copies:
                shutil.rmtree(self.directory / str(step))

        processes.together(move if processes.leads() else lambda: None)
        self._manager.reload()

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Checks the metrics of a step, and raises what goes wrong with its files as `Damaged`."""
        try:
            self._manager.check_metrics(step)
            yield
        except MemoryError:
            raise
        except Exception as error:  # Orbax has no class of its own for what is wrong with a file.
            if any(word in str(error) for word in ("RESOURCE_EXHAUSTED", *_NOT_REACHED)):
                raise
            reason = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")[:160]
            raise Damaged(
                f"step: expected a complete checkpoint in {str(self.place / str(step))!r}, "
                f"got a damaged one ({type(error).__name__}: {reason})."
            ) from error

    def restore_params(self, step: int) -> Any:
        """The parameters at `step` on this process's first device, without knowing their tree; nothing else is read.
        Damaged if they cannot be."""
        self._fetch(step)
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        with self._readable(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = {"params": self._manager.item_metadata(step)["state"].tree["params"]}
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
            how = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            return reader.restore(self.directory / str(step) / "state", args=args)["params"]

    def wait(self) -> None:
        """Returns when everything started has been written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        with self._stack:
            self._manager.wait_until_finished()
            self._manager.close()


def newest(directory: str | os.PathLike[str]) -> int:
    """The newest complete step in the folder of all steps, 0 without any or without the folder."""
    if not files.at(directory).is_dir():
        return 0
    with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
        return checkpoints.latest or 0
