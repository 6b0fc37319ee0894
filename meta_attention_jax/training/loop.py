"""One training run in one directory, resumable at any checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax.config import config_to_dict
from meta_attention_jax.console import say
from meta_attention_jax.files import Place, in_bucket, staged
from meta_attention_jax.objective import flatten_scalars, summarise
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training import build, processes
from meta_attention_jax.training.backbone import merge
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.drive import Tally, drive
from meta_attention_jax.training.evaluation import Evaluator, in_both_modes
from meta_attention_jax.training.interrupt import interruptible
from meta_attention_jax.training.job import Job
from meta_attention_jax.training.logs import LOG, MetricsLog, Progress, read_metrics, status_line
from meta_attention_jax.training.processes import hold
from meta_attention_jax.training.rules import final_threshold
from meta_attention_jax.training.step import STACKED, Finite, TrainState, count_parameters, init_state, num_dense_rows
from meta_attention_jax.training.trackers import Final, Trackers, opened

PROFILED_STEPS = 3


class Diverged(RuntimeError):
    """NaN or infinity in the loss, the gradients or the parameters."""


def describe(job: Job, params: Any) -> dict[str, Any]:
    """What runs, once per run: data, sizes, the controller's share, and which full attention."""
    config, dataset = job.config, job.dataset
    flops = build.build_flops(config, dataset.vocab_size)
    parameters, controller = count_parameters(params)
    return {
        "data": dataset.about(),
        "full_attention": build.full_attention(config),
        "packed_kernel": build.packed_kernel(config),
        "parameters": parameters,
        "controller_parameter_share": controller / parameters,
        "flops_per_token": build.soft_flops(config, flops),
        "controller_flop_share": flops.controller_share,
    }


def headline(
    label: str, about: Mapping[str, Any], where: str, *, job: Job, start: int, runs: Optional[int] = None
) -> str:
    """The first line of a log: of one run, or of `runs` that are one program."""
    what = f"{about['parameters']:,} parameters ({about['controller_parameter_share']:.1%} controller)"
    if runs is not None:
        what = f"{runs} run{'s' * (runs != 1)} of {what} as one program"
    state = "finished" if start >= job.config.train.steps else "resumed"
    return (
        f"{label}: {what}, full attention {about['full_attention']}, {_gate_in_nats(job.config)}{where}"
        + (f", {state} at step {start}" if start else "")
        + (f", from {job.config.train.init_from}" if job.initial is not None else "")
        + (f", {processes.TAKEN_OVER}" if in_bucket(job.path) else "")
    )


def _gate_in_nats(config: ConfigDict) -> str:
    if config.gate.unit != "nats":
        return ""
    theta = final_threshold(config)
    harden = "every token hard" if theta == 1 else f"theta {theta:.3g}"
    when = " in gated mode, none in training" if config.gate.kind == "none" else ""
    return f"gate at {config.gate.threshold:g} nats ({harden}{when}), "


def _where(job: Job) -> str:
    parallel = job.parallel
    devices = f"{len(parallel.devices)} x {jax.default_backend()} by {parallel.mode}"
    if processes.several():
        devices += f" in {jax.process_count()} processes"
    if parallel.shard_axis is not None:
        devices += f", parameters over {parallel.mesh.shape[parallel.shard_axis]}"
    return devices


def divergence(first: int, finite: Finite, good: Optional[int]) -> Optional[str]:
    """What is said of a run whose numbers, from step `first` on, are not finite; None if they are. `good` is the step
    of its last checkpoint."""
    found = not_finite(finite)
    if found is None:
        return None
    index, words = found
    kept = f"the last good checkpoint is step {good}" if good else "no checkpoint is kept"
    return (
        f"step {first + index}: expected finite numbers, got NaN or infinity in {words}; {kept}; "
        "--debug_nans of experiments.train finds the operation that makes a NaN."
    )


def not_finite(finite: Finite) -> Optional[tuple[int, str]]:
    """(index of the first step with something that is not finite, what it is in words), from `finite_parts` with a
    leading axis of steps; None if all is finite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(finite)]
    good = np.all([leaf.reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)
    if good.all():
        return None
    index = int(np.argmin(good))
    return index, _words(jax.tree.map(lambda leaf: np.asarray(leaf)[index], finite))


def _words(finite: Finite) -> str:
    """Of one step: the quantity that comes first in it, and where in the model. Routing tells the layer, where a
    controller looks at it."""
    if not finite["loss"]:
        layers = np.flatnonzero(~finite["routing"])
        if not len(layers):
            return "the loss, though the routing of all layers is finite"
        before = f", after layer {layers[0] - 1}" if layers[0] else ""
        return f"the loss, first seen in the routing of layer {layers[0]}{before}"
    if not finite["penalty"].all():
        layers = ", ".join(map(str, np.flatnonzero(~finite["penalty"])))
        return f"the KL or penalty of layer {layers}"
    for quantity in ("gradients", "parameters"):
        places = [
            f"layer {layer}" if name == STACKED else name.replace("layer_", "layer ")
            for name, flags in finite[quantity].items()
            for layer in np.flatnonzero(~np.atleast_1d(flags))
        ]
        if places:
            return f"the {quantity} of {', '.join(places)}"
        if not finite["norm"]:
            return "the norm of the gradients"
    return "the routing of layer " + ", ".join(map(str, np.flatnonzero(~finite["routing"])))


@without_mesh
def train(
    job: Job, *, stop_after: Optional[int] = None, progress: bool = True, label: Optional[str] = None,
    final: Optional[Callable[[Place], Final]] = None,
) -> dict[str, Any]:
    """Trains to `train.steps`, from the newest checkpoint if there is one, and returns the last evaluation on the
    validation split: {"soft": metrics, "hard": metrics}. Stops (with a checkpoint) after step `stop_after`, as an
    interruption would. `label` is of the live line; the config's name when None. `final` makes of the directory of a
    run that has come to its end what its trackers show.

    Raises:
      Diverged: NaN or infinity; names the step and the last good checkpoint.
      Busy: another process trains the run, or has taken it over.
      Interrupted: SIGTERM or SIGINT, after a save.
      Damaged: none of the checkpoints can be read.
    """
    config = job.config
    label = label or config.name
    progress = progress and processes.leads()
    parallel = job.parallel
    blank = jax.tree.map(np.zeros_like, job.dataset.train_batch(0))  # For the shapes.
    state = parallel.make(lambda: init_state(job.spec, jax.random.key(config.seed), blank, job.hypers))
    with contextlib.ExitStack() as stack:
        # Left last: what is being saved when a signal comes is saved whole.
        asked = stack.enter_context(interruptible())
        # The run's lock; one process has it for all.
        processes.together(lambda: stack.enter_context(hold(job.path)) if processes.leads() else None)
        book = Book(job, stack, stack.enter_context(opened(trackers_of(config))))
        start, restored = book.checkpoints.restore_newest(parallel.unreplicate(state))
        about = describe(job, merge(job.frozen, parallel.unreplicate(state).params))
        book.open_log(start, about)
        if start:
            state = parallel.place(restored)
        elif job.initial is not None:
            state = state.replace(params=merge(state.params, parallel.place(job.initial)))
        if progress:
            say(headline(label, about, _where(job), start=start, job=job))
            say(str(job.dataset))
        stop = min(stop_after or config.train.steps, config.train.steps)
        if start >= stop:
            return _last_evaluation(job.path)
        run = _Run(book, state, live_line(label, config, stack, start=start, enabled=progress), start=start, stop=stop)
        drive(run, config.train, asked, start=start, stop=stop)
        book.finish(stop, final)
        return run.evaluation


def _last_evaluation(path: Place) -> dict[str, Any]:
    evaluations = [r for r in read_metrics(path) if r["event"] == "eval"]
    return {mode: evaluations[-1][mode] for mode in ("soft", "hard")} if evaluations else {}


def live_line(
    label: str, config: ConfigDict, stack: contextlib.ExitStack, *, start: int, enabled: bool, runs: int = 1
) -> Progress:
    """Until the stack is left."""
    tokens = config.data.batch_size * config.data.sequence_length * runs
    line = Progress(label, total=config.train.steps, start=start, tokens_per_step=tokens, enabled=enabled)
    stack.callback(line.close)
    return line


def trackers_of(config: ConfigDict) -> tuple[str, ...]:
    """Those that this process tells."""
    return tuple(config.train.trackers) if processes.leads() else ()


class Book:
    """The open files and the trackers of one run, until the stack is left, and how it fares."""

    def __init__(self, job: Job, stack: contextlib.ExitStack, trackers: Trackers, name: str = ""):
        self.job, self._stack, self._trackers, self.name = job, stack, trackers, name
        # Of a run in a bucket: what is written bit by bit goes there at every save, and at the end.
        self._stage = stack.enter_context(staged(job.path, lambda name: name == LOG and processes.leads()))
        self.folder = self._stage.folder
        if in_bucket(job.path):
            stack.callback(self._keep)
        self.checkpoints = Checkpoints(job.path / "checkpoints", keep_latest=job.config.train.keep_latest)
        stack.callback(self.checkpoints.close)
        self._log: Optional[MetricsLog] = None  # Of the first process, from `open_log` on.
        self.good: Optional[int] = None  # Step of the last checkpoint.
        self.failure: Optional[str] = None  # In words, of a run that has diverged.

    def open_log(self, start: int, about: Mapping[str, Any]) -> None:
        """Tells that the run goes on from step `start`, or begins and is about this."""
        self.good = start or None
        if processes.leads():
            self._log = self._stack.enter_context(contextlib.closing(MetricsLog(self.folder)))
        if start < self.job.config.train.steps:
            self._trackers.open(self.job.path, config_to_dict(self.job.config), start)
        self.write("resume" if start else "start", start, {} if start else about)

    def write(self, event: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One record, as `MetricsLog` has it."""
        if self._log is not None:
            self._log.write(event, step, metrics)
        self._trackers.write(self.job.path, step, flatten_scalars(metrics, prefix=f"{event}/"))

    def _keep(self) -> None:
        """Brings the log into the bucket, as long as the run is this process's."""
        processes.check_held(self.job.path)
        self._stage.push()
        self._trackers.keep(self.job.path)

    def finish(self, done: int, final: Optional[Callable[[Place], Final]]) -> None:
        """Shows what `final` makes of the run, if `done` is its last step."""
        if done == self.job.config.train.steps:
            self._trackers.finish(self.job.path, done, final)

    def save(self, done: int, state: TrainState, evaluation: Optional[Mapping[str, Any]]) -> None:
        """Starts writing a checkpoint. The best is that of the fewest hard nats where a gate hardens the run, of the
        fewest soft nats where none does; one without an evaluation comes after all others."""
        config = self.job.config
        if in_bucket(self.job.path):  # First: a checkpoint stands for the records before it.
            processes.together(self._keep)
        mode = "soft" if config.gate.kind == "none" else "hard"
        nll = math.inf if evaluation is None else evaluation[mode]["nll"]
        self.checkpoints.save(done, state, config=config_to_dict(config), nll=nll)
        self.good = done


class _Run:
    """One run between its first and its last step, as `drive` works it."""

    def __init__(self, book: Book, state: TrainState, line: Progress, *, start: int, stop: int):
        job, config, parallel = book.job, book.job.config, book.job.parallel
        self.job, self.book, self.line, self.start, self.stop = job, book, line, start, stop
        self.mechanisms = tuple(config.model.mechanisms)
        costs = jax.device_get(job.hypers.routing.costs)
        self.report = functools.partial(summarise, mechanisms=self.mechanisms, costs=costs)
        self.compiled = build.compile_step(parallel, job.spec)
        # Every token is hard from here on: theta is 1.
        self.packed_from = job.spec.schedule.gate.end if config.train.packed else stop
        self.dense_share = dense_row_share(config, len(parallel.devices))
        self.evaluator = Evaluator(job.spec.model, job.dataset, parallel)
        self.state, self.hypers, self.frozen = state, parallel.place(job.hypers), parallel.place(job.frozen)
        self.tally = Tally(lambda tree: jax.device_get(parallel.unreplicate(tree)))
        self.evaluation: dict[str, Any] = {}
        self._traced = False

    def step(self, number: int) -> None:
        job, profile = self.job, self.job.config.train.profile_step
        if number == max(self.packed_from, self.start) and self.packed_from < self.stop:
            self.compiled = build.compile_step(job.parallel, build.packed_spec(job.config, job.spec))
            self.book.write("packed", number, {"controller_rows": self.dense_share})
            self.line.say(_packed_note(number, build.packed_kernel(job.config), self.dense_share))
        if number == profile:
            jax.profiler.start_trace(str(self.book.folder / "profile"))
            self._traced = True
        batch = job.parallel.shard(job.dataset.train_batch(number))
        self.state, metrics = self.compiled(self.state, batch, self.hypers, self.frozen)
        done = number + 1
        if self._traced and (done == profile + PROFILED_STEPS or done == self.stop):
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self._traced = False
        self.tally.add(metrics)

    def log(self, done: int) -> bool:
        sums, finite, scalars = self.tally.read()
        if sentence := divergence(done - len(finite["loss"]) + 1, finite, self.book.good):
            raise Diverged(sentence)
        scalars = {name: float(value) for name, value in scalars.items()}
        if done > self.packed_from and not self.dense_share:
            scalars["beta"] = 0.0  # Packed steps of a frozen controller have no KL to weigh.
        record = {**self.report(sums, beta=scalars["beta"]), **scalars}
        self.book.write("train", done, record)
        self.line.update(done, status_line(record, self.mechanisms))
        return True

    def evaluate(self, done: int) -> None:
        config, params = self.job.config, merge(self.frozen, self.state.params)

        def metrics_of(mode: str) -> dict[str, Any]:
            return self.report(self.evaluator.sums(
                params, self.hypers.routing, split="validation", mode=mode,
                max_batches=config.train.eval_batches,
            ))

        self.evaluation = in_both_modes(config.controller.name == "fixed", metrics_of)
        self.book.write("eval", done, self.evaluation)

    def save(self, done: int, *, evaluated: bool = True) -> None:
        self.book.save(done, self.job.parallel.unreplicate(self.state), self.evaluation if evaluated else None)


def dense_row_share(config: ConfigDict, devices: int) -> float:
    """Share of the rows that run all mechanisms in packed training, as `num_dense_rows` rounds it."""
    rows = config.data.batch_size // (devices * config.optimizer.accumulate)
    return num_dense_rows(config.train.packed_dense_rows, rows) / rows


def _packed_note(step: int, kernel: str, dense_rows: float) -> str:
    learns = (
        f"the controller learns from {dense_rows:.0%} of the rows, which run all mechanisms"
        if dense_rows
        else "the controller is frozen, for a weight that is always 1 gives it no gradient"
    )
    return f"step {step}: packed dispatch by the {kernel} kernel from here on; {learns}"
