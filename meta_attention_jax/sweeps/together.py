"""Runs that differ in array inputs alone, trained as one program: `vmap` of the training step, on CPUs a loop over it.

Every run keeps its own directory, as if it had been trained alone; the order of the data is shared. Several devices
share the points, each training its own; nothing is communicated. Evaluation in mode hard runs all mechanisms and
selects, since packed dispatch has trip counts of its own for every point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Optional

import jax
import numpy as np

from meta_attention_jax.console import say
from meta_attention_jax.files import Place
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.sweeps.group import Group, device_bytes, point_of, points_that_fit, to_host
from meta_attention_jax.sweeps.space import program
from meta_attention_jax.training.backbone import merge
from meta_attention_jax.training.checkpoint import Damaged
from meta_attention_jax.training.drive import Tally, drive
from meta_attention_jax.training.interrupt import interruptible
from meta_attention_jax.training.job import Job
from meta_attention_jax.training.logs import Progress
from meta_attention_jax.training.loop import Book, describe, divergence, headline, live_line, trackers_of
from meta_attention_jax.training.parallel import for_points
from meta_attention_jax.training.step import TrainState
from meta_attention_jax.training.trackers import Final, opened

MEMORY_SHARE = 0.8  # Of a device's memory, what a program may need; the rest is for data and for what was not counted

TOGETHER = "together"  # In a run's "start" record: the names of all points of the program, in their places.


class Lost(Damaged):
    """None of the checkpoints of a point can be read; `name` is the point's."""

    def __init__(self, name: str, error: Damaged):
        super().__init__(str(error))
        self.name = name


class Moved(RuntimeError):
    """The newest checkpoint of a job that can be read is not the one that was expected."""


@without_mesh
def train_together(
    jobs: Sequence[Job],
    *,
    label: str,
    names: Sequence[str],
    only: Optional[Collection[str]] = None,
    start: int = 0,
    stop_after: Optional[int] = None,
    progress: bool = True,
    memory: Optional[int] = None,
    failed: Optional[Callable[[str, str], None]] = None,
    final: Optional[Callable[[Place], Final]] = None,
) -> list[Optional[str]]:
    """Trains all to `train.steps`, or to `stop_after`, with checkpoints; every job's directory is that of an ordinary
    run.

    Returns what went wrong with each, None where nothing did: a point that diverges is left where its last checkpoint
    is, and the others go on.

    Args:
      jobs: of `job.prepare`, of one `space.program`; those that are trained have a checkpoint at step `start` and, if
        other processes may train them too, are held by this one (`processes.hold`) since that was seen.
      names: of the points, for what is said of them; the logs hold who was trained together.
      only: names of those that are trained, None for all. The others keep their places in the program and nothing is
        written of them: the program of the same points gives the same bits, one of fewer others.
      memory: bytes per device that a program may need; None is a share of what the device has. Groups that need more
        are trained in parts.
      failed: called with a point's name and what went wrong, as soon as it is known.
      final: as of `loop.train`, for each.

    Raises:
      Interrupted: SIGTERM or SIGINT, after a save of all that have not diverged.
      Moved: newer checkpoints of a job were damaged and are set aside; nothing was trained.
      Taken: another process has taken over one of them, in a bucket.
      Lost: none of a job's checkpoints can be read; nothing was trained.
    """
    if only is not None and not set(only) & set(names):  # A part that has none of them.
        return [None] * len(jobs)
    programs = {program(job.config) for job in jobs}
    if len(programs) != 1 or None in programs:
        raise ValueError("jobs: expected points of one program, got several, or one to train alone.")
    alone = jobs[0].parallel.devices
    devices = list(alone) if jobs[0].config.parallel.devices else for_points(alone)
    group, memory = _placed(jobs, devices) if memory is None else (Group(jobs, devices), memory)
    devices = list(group.mesh.devices.flat)
    if memory is not None and len(jobs) > len(devices) and (needed := group.needed()) > memory:
        one = Group(jobs[: len(devices)], devices).needed()
        most = points_that_fit(needed, one, len(group.padded) // group.mesh.size, memory)
        parts = -(-len(jobs) // (most * len(devices)))
        size = -(-len(jobs) // (parts * len(devices))) * len(devices)
        options = dict(start=start, stop_after=stop_after, progress=progress, failed=failed, memory=memory, final=final)
        return [
            failure
            for i in range(0, len(jobs), size)
            for failure in train_together(
                jobs[i : i + size], label=label, names=names[i : i + size], only=only, **options
            )
        ]
    with contextlib.ExitStack() as stack_:
        asked = stack_.enter_context(interruptible())  # As in `loop.train`.
        trackers = stack_.enter_context(opened(trackers_of(jobs[0].config)))
        books = {
            index: Book(job, stack_, trackers, name)
            for index, (job, name) in enumerate(zip(jobs, names, strict=True))
            if only is None or name in only
        }
        if start:
            template = group.abstract_point()
            # Over the host: one device would not hold the states of all.
            restored = {index: to_host(_restored(book, start, template)) for index, book in books.items()}
            one = next(iter(restored.values()))
            states = group.from_host([restored.get(index, one) for index in range(len(jobs))])
        else:
            states = group.states()
        about = describe(jobs[0], merge(jobs[0].frozen, group.abstract_point().params))
        for book in books.values():
            book.open_log(start, {**about, TOGETHER: list(names)})
        if progress:
            where = f"{group.mesh.size} x {devices[0].platform}"
            say(headline(label, about, where, job=jobs[0], start=start, runs=len(books)))
            say(str(jobs[0].dataset))
        config = jobs[0].config
        line = live_line(label, config, stack_, start=start, enabled=progress, runs=len(books))
        stop = min(stop_after or config.train.steps, config.train.steps)
        many = _Many(group, books, states, line, failed or (lambda name, sentence: None))
        del states  # The step takes them over.
        drive(many, config.train, asked, start=start, stop=stop)
        for index in many.alive:
            books[index].finish(stop, final)
        return [books[index].failure if index in books else None for index in range(len(jobs))]


def _placed(jobs: Sequence[Job], devices: Sequence[jax.Device]) -> tuple[Group, Optional[int]]:
    """The group, and the bytes that each of its devices may use, None if unknown. CPU devices have one host: they are
    fewer where that would not hold what all need."""
    while True:
        group, has = Group(jobs, devices), device_bytes(devices[0])
        if has is None or devices[0].platform != "cpu":
            return group, None if has is None else int(MEMORY_SHARE * has)
        size = group.mesh.size
        memory = int(MEMORY_SHARE * has / size)
        if size == 1 or group.needed() <= memory:
            return group, memory
        devices = list(group.mesh.devices.flat)[: (size + 1) // 2]


def _restored(book: Book, start: int, template: TrainState) -> TrainState:
    """The newest state of a point, which is at step `start`."""
    try:
        found, state = book.checkpoints.restore_newest(template)
    except Damaged as error:
        raise Lost(book.name, error) from error
    if found != start:
        raise Moved(found)
    return state


class _Many:
    """All points between their first and their last step, as `drive` works them."""

    def __init__(
        self, group: Group, books: dict[int, Book], states: TrainState, line: Progress,
        failed: Callable[[str, str], None],
    ):
        self.group, self.books, self.states, self.line, self.failed = group, books, states, line, failed
        self.tally = Tally(jax.device_get)
        self.evaluations: list[dict[str, Any]] = []

    @property
    def alive(self) -> list[int]:
        """Points that are trained and have not diverged."""
        return [index for index, book in self.books.items() if book.failure is None]

    def step(self, number: int) -> None:
        batch = self.group.replicate(self.group.jobs[0].dataset.train_batch(number))
        self.states, metrics = self.group.step(self.states, batch, self.group.hypers, self.group.frozen)
        self.tally.add(metrics)

    def log(self, done: int) -> bool:
        sums, finite, scalars = self.tally.read()
        for index in self.alive:
            book = self.books[index]
            own = jax.tree.map(lambda flags: flags[:, index], finite)
            book.failure = divergence(done - len(own["loss"]) + 1, own, book.good)
            if book.failure is not None:
                self.line.say(f"{book.name}: {book.failure}")
                self.failed(book.name, book.failure)
        records = []
        for index in self.alive:
            own = {name: float(values[index]) for name, values in scalars.items()}
            records.append({**self.group.report(index, sums, beta=own["beta"]), **own})
            self.books[index].write("train", done, records[-1])
        if records:
            self.line.update(done, _status(records, len(self.books)))
        return bool(records)

    def evaluate(self, done: int) -> None:
        self.evaluations = self.group.evaluate(self.states)
        for index in self.alive:
            self.books[index].write("eval", done, self.evaluations[index])

    def save(self, done: int, *, evaluated: bool = True) -> None:
        for index in self.alive:
            evaluation = self.evaluations[index] if evaluated else None
            self.books[index].save(done, point_of(self.states, index), evaluation)


def _status(records: list[dict[str, Any]], count: int) -> str:
    """Range of nats and mean share of hard tokens of those that go on."""
    nats = [record["nll"] for record in records]
    hard = np.mean([record["hard_fraction"] for record in records])
    lost = f" · {count - len(records)} diverged" if len(records) < count else ""
    return f"nll {min(nats):.3f} to {max(nats):.3f} · hard {hard:.0%}{lost}"
