"""One training run in one directory, resumable at any checkpoint.

A run directory holds `config.json`, `data_manifest.json`, the tokenizer, `metrics.jsonl`,
`tensorboard/`, `checkpoints/`, and `costs.json` when costs are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, Mapping, Optional

import jax
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax import files
from meta_attention_jax.config import config_difference, config_to_dict, may_change, read_config
from meta_attention_jax.console import say
from meta_attention_jax.data.pipeline import MANIFEST, Dataset, check_manifest, write_manifest
from meta_attention_jax.objective import summarise
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training import build, processes
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.drive import Tally, drive
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.finite import Finite, not_finite
from meta_attention_jax.training.interrupt import interruptible
from meta_attention_jax.training.lock import hold
from meta_attention_jax.training.logs import (
    MetricsLog,
    Progress,
    SilentLog,
    read_metrics,
    status_line,
)
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.restore import initial_params
from meta_attention_jax.training.state import Hypers, TrainState, count_parameters
from meta_attention_jax.training.step import StepSpec, init_state, num_dense_rows, train_step
from meta_attention_jax.types import Batch

PROFILED_STEPS = 3


class Diverged(RuntimeError):
    """NaN or infinity in the loss, the gradients or the parameters."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to start: checked, and with its directory made.

    `initial`: parameters to start from, of `train.init_from`, on the host; None to draw them.
    """

    config: ConfigDict
    path: pathlib.Path
    dataset: Dataset
    parallel: Parallel
    spec: StepSpec
    hypers: Hypers
    initial: Optional[Any] = None


def open_workdir(workdir: str | pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Makes or checks the run directory; writes `config.json` when it is new.

    Raises:
      ValueError: a directory with a run of another config, or with files that are no run's.
    """
    path = files.run_directory("workdir", workdir)
    stored_at = path / "config.json"
    given = config_to_dict(config)
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir: expected a directory, got the file {str(workdir)!r}.")
    if stored_at.exists():
        stored = read_config(stored_at)
        for field, old, new in config_difference(stored, given):
            of_data = field.startswith("data.") and not (path / MANIFEST).is_file()
            if of_data or not may_change(field, old, new):
                raise ValueError(
                    f"{field}: expected {old!r}, as in {str(workdir)}/config.json, got {new!r}; "
                    "use another workdir or the same config."
                )
        return path
    left = ("config.tmp",)  # Of a process that was killed while it wrote the very first file.
    held = path.iterdir() if path.exists() else ()
    if any(not files.is_partial(p, "config.json") and p.name not in left for p in held):
        raise ValueError(
            f"workdir: expected a new or empty directory or a run, got {str(workdir)!r}, which holds "
            "other files."
        )
    files.write_whole(stored_at, json.dumps(given, indent=2) + "\n")
    return path


def describe(job: Job, params: Any) -> dict[str, Any]:
    """What runs, once per run: data, sizes, the controller's share, and which full attention."""
    config, dataset = job.config, job.dataset
    flops = build.build_flops(config, dataset.vocab_size)
    parameters, controller = count_parameters(params)
    return {
        "data": dataset.about(),
        "full_attention": build.full_attention(config),
        "parameters": parameters,
        "controller_parameter_share": controller / parameters,
        "flops_per_token": build.soft_flops(config, flops),
        "controller_flop_share": flops.controller_share,
    }


def divergence(first: int, finite: Finite, good: Optional[int]) -> Optional[str]:
    """What is said of a run whose numbers are not finite; None if they are.

    Args:
      first: number of the first step of `finite`, from 1.
      finite: of `Tally.read`, of one run.
      good: step of its last checkpoint.
    """
    found = not_finite(finite)
    if found is None:
        return None
    index, words = found
    kept = f"the last good checkpoint is step {good}" if good else "no checkpoint is kept"
    return (
        f"step {first + index}: expected finite numbers, got NaN or infinity in {words}; {kept}; "
        "--debug_nans of experiments.train finds the operation that makes a NaN."
    )


def prepare(
    config: ConfigDict, workdir: str | pathlib.Path, dataset: Optional[Dataset] = None
) -> Job:
    """Checks the config, the data and the directory, in this order; only then writes anything.

    Of several processes the first is ahead of the others in each part, and what is wrong in one is said
    by all.

    `dataset`: of another run with the same data; None opens it.

    Raises:
      ValueError: any mistake of the user's, as one sentence.
    """
    workdir = files.run_directory("workdir", workdir)
    processes.check_same("config", json.dumps(config_to_dict(config), sort_keys=True))
    parallel, dataset, spec = processes.in_turn(lambda: _built(config, workdir, dataset))
    # Here they go together: reading a checkpoint and measuring, processes wait for each other.
    initial = processes.together(lambda: _initial(config, workdir, spec, dataset))
    path = processes.in_turn(lambda: _opened(workdir, config))
    # Once trained upon, measured costs may only be read.
    trained = (path / "checkpoints").exists()
    hypers = processes.together(lambda: build.build_hypers(config, path, measure=not trained))
    processes.in_turn(lambda: _describe_data(dataset, path))
    return Job(config, path, dataset, parallel, spec, hypers, initial)


def _built(
    config: ConfigDict, workdir: str | pathlib.Path, dataset: Optional[Dataset]
) -> tuple[Parallel, Dataset, StepSpec]:
    build.check(config)
    parallel = build.build_parallel(config)
    rows = parallel.rows(config.data.batch_size)
    dataset = dataset or build.build_dataset(config, workdir, rows)
    check_manifest(dataset, workdir)
    return parallel, dataset, build.build_spec(config, dataset)


def _initial(
    config: ConfigDict, workdir: str | pathlib.Path, spec: StepSpec, dataset: Dataset
) -> Optional[Any]:
    # The folder alone says nothing: a run killed before its first save has one too.
    saved = any(p.name.isdigit() for p in (pathlib.Path(workdir) / "checkpoints").glob("*"))
    if not config.train.init_from or saved:
        return None
    model = spec.model.clone(shard_axis=None)
    return jax.device_get(initial_params(config.train.init_from, model, dataset.tokenizer))


def _opened(workdir: str | pathlib.Path, config: ConfigDict) -> pathlib.Path:
    if not processes.leads() and not (pathlib.Path(workdir) / "config.json").exists():
        raise ValueError(
            f"workdir: expected a directory that all processes see, got {str(workdir)!r}, which process "
            f"{jax.process_index()} does not."
        )
    return open_workdir(workdir, config)


def _describe_data(dataset: Dataset, path: pathlib.Path) -> None:
    check_manifest(dataset, path)  # Before anything is written over.
    if processes.leads():
        dataset.tokenizer.save(path)
    write_manifest(dataset, path)


@without_mesh
def train(
    job: Job,
    *,
    stop_after: Optional[int] = None,
    progress: bool = True,
    label: Optional[str] = None,
) -> dict[str, Any]:
    """Trains to `train.steps`, from the newest checkpoint if there is one.

    Args:
      job: of `prepare`.
      stop_after: stop (with a checkpoint) after this step, as an interruption would.
      progress: show the live line.
      label: of the live line; the config's name when None.

    Returns:
      The last evaluation on the validation split: {"soft": metrics, "hard": metrics}.

    Raises:
      Diverged: NaN or infinity; names the step and the last good checkpoint.
      Busy: another process trains the run.
      Interrupted: SIGTERM or SIGINT, after a save.
      Damaged: none of the checkpoints can be read.
    """
    config = job.config
    label = label or config.name
    progress = progress and processes.leads()
    parallel = job.parallel
    state = parallel.make(
        lambda: init_state(
            job.spec, jax.random.key(config.seed), _blank(job.dataset), job.hypers
        )
    )
    with contextlib.ExitStack() as stack:
        # Left last: what is being saved when a signal comes is saved whole.
        asked = stack.enter_context(interruptible())
        _hold(job.path, stack)
        checkpoints = Checkpoints(job.path / "checkpoints", keep_latest=config.train.keep_latest)
        stack.callback(checkpoints.close)
        start, restored = checkpoints.restore_newest(parallel.unreplicate(state))
        log = MetricsLog(job.path, start=start) if processes.leads() else SilentLog()
        stack.callback(log.close)
        about = describe(job, parallel.unreplicate(state).params)
        if start:
            state = parallel.place(restored)
            log.write("resume", start, {})
        else:
            if job.initial is not None:
                state = state.replace(params=parallel.place(job.initial))
            log.write("start", 0, about)
        if progress:
            say(_headline(label, about, job, start))
            say(str(job.dataset))
        stop = min(stop_after or config.train.steps, config.train.steps)
        if start >= stop:
            return _last_evaluation(job.path)
        line = Progress(
            label,
            total=config.train.steps,
            start=start,
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
            enabled=progress,
        )
        stack.callback(line.close)
        run = _Run(job, state, checkpoints, log, line, start=start, stop=stop)
        drive(run, config.train, asked, start=start, stop=stop)
        return run.evaluation


def _blank(dataset: Dataset) -> Batch:
    """A batch of nothing, for the shapes."""
    return jax.tree.map(np.zeros_like, dataset.train_batch(0))


def _hold(path: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """The run's lock, until the stack is left; one process has it for all."""

    def taken() -> None:
        if processes.leads():
            stack.enter_context(hold(path))

    processes.together(taken)


def _headline(label: str, about: Mapping[str, Any], job: Job, start: int) -> str:
    parallel = job.parallel
    devices = f"{len(parallel.devices)} x {jax.default_backend()} by {parallel.mode}"
    if processes.several():
        devices += f" in {jax.process_count()} processes"
    if parallel.shard_axis is not None:
        devices += f", parameters over {parallel.mesh.shape[parallel.shard_axis]}"
    state = "finished" if start >= job.config.train.steps else "resumed"
    return (
        f"{label}: {about['parameters']:,} parameters "
        f"({about['controller_parameter_share']:.1%} controller), "
        f"full attention {about['full_attention']}, {devices}"
        + (f", {state} at step {start}" if start else "")
        + (f", from {job.config.train.init_from}" if job.initial is not None else "")
    )


def _last_evaluation(path: pathlib.Path) -> dict[str, Any]:
    evaluations = [r for r in read_metrics(path) if r["event"] == "eval"]
    return {mode: evaluations[-1][mode] for mode in ("soft", "hard")} if evaluations else {}


class _Run:
    """One run between its first and its last step, as `drive` works it."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        checkpoints: Checkpoints,
        log: MetricsLog | SilentLog,
        line: Progress,
        *,
        start: int,
        stop: int,
    ):
        config, parallel = job.config, job.parallel
        self.job, self.checkpoints, self.records, self.line = job, checkpoints, log, line
        self.start, self.stop = start, stop
        self.mechanisms = tuple(config.model.mechanisms)
        costs = jax.device_get(job.hypers.routing.costs)
        self.report = functools.partial(summarise, mechanisms=self.mechanisms, costs=costs)
        self.compiled = _compile(job, job.spec)
        # Every token is hard from here on: theta is 1.
        self.packed_from = job.spec.schedule.gate.end if config.train.packed else stop
        self.dense_share = dense_row_share(config, len(parallel.devices))
        self.evaluator = Evaluator(job.spec.model, job.dataset, parallel)
        self.state, self.hypers = state, parallel.place(job.hypers)
        self.tally = Tally(lambda tree: jax.device_get(parallel.unreplicate(tree)))
        self.evaluation: dict[str, Any] = {}
        self.good = start or None
        self._traced = False

    def step(self, number: int) -> None:
        job, profile = self.job, self.job.config.train.profile_step
        if number == max(self.packed_from, self.start) and self.packed_from < self.stop:
            self.compiled = _compile(job, packed_spec(job))
            self.records.write("packed", number, {"controller_rows": self.dense_share})
            self.line.say(_packed_note(number, self.dense_share))
        if number == profile:
            jax.profiler.start_trace(str(job.path / "profile"))
            self._traced = True
        batch = job.parallel.shard(job.dataset.train_batch(number))
        self.state, metrics = self.compiled(self.state, batch, self.hypers)
        done = number + 1
        if self._traced and (done == profile + PROFILED_STEPS or done == self.stop):
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self._traced = False
        self.tally.add(metrics)

    def log(self, done: int) -> bool:
        sums, finite, scalars = self.tally.read()
        if sentence := divergence(done - len(finite["loss"]) + 1, finite, self.good):
            raise Diverged(sentence)
        scalars = {name: float(value) for name, value in scalars.items()}
        if done > self.packed_from and not self.dense_share:
            scalars["beta"] = 0.0  # Packed steps of a frozen controller have no KL to weigh.
        record = {**self.report(sums, beta=scalars["beta"]), **scalars}
        self.records.write("train", done, record)
        self.line.update(done, status_line(record, self.mechanisms))
        return True

    def evaluate(self, done: int) -> None:
        self.evaluation = _evaluate(
            self.job.config, self.evaluator, self.state.params, self.hypers, self.report
        )
        self.records.write("eval", done, self.evaluation)

    def save(self, done: int, *, evaluated: bool = True) -> None:
        state = self.job.parallel.unreplicate(self.state)
        evaluation = self.evaluation if evaluated else None
        save(self.checkpoints, done, state, self.job.config, evaluation)
        self.good = done


def save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    config: ConfigDict,
    evaluation: Optional[Mapping[str, Any]],
) -> None:
    """Starts writing a checkpoint. The best is that of the fewest hard nats where a gate hardens the
    run, of the fewest soft nats where none does; one without an evaluation comes after all others."""
    mode = "soft" if config.gate.kind == "none" else "hard"
    nll = math.inf if evaluation is None else evaluation[mode]["nll"]
    checkpoints.save(step, state, config=config_to_dict(config), nll=nll)


def with_gap(results: dict[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """{"soft": metrics, "hard": metrics}, each with hard nats less soft nats."""
    gap = results["hard"]["nll"] - results["soft"]["nll"]
    return {mode: {**metrics, "hard_minus_soft": gap} for mode, metrics in results.items()}


def packed_spec(job: Job) -> StepSpec:
    """The step once every token is hard."""
    dense_rows = job.config.train.packed_dense_rows
    return dataclasses.replace(job.spec, packed=True, dense_rows=dense_rows)


def dense_row_share(config: ConfigDict, devices: int) -> float:
    """Share of the rows that run all mechanisms in packed training, as `num_dense_rows` rounds it."""
    rows = config.data.batch_size // (devices * config.optimizer.accumulate)
    return num_dense_rows(config.train.packed_dense_rows, rows) / rows


def _compile(job: Job, spec: StepSpec) -> Any:
    step = functools.partial(train_step, spec)
    return job.parallel.compile(step, batch_argument=1, state_argument=0, donate=(0,))


def _packed_note(step: int, dense_rows: float) -> str:
    learns = (
        f"the controller learns from {dense_rows:.0%} of the rows, which run all mechanisms"
        if dense_rows
        else "the controller is frozen, for a weight that is always 1 gives it no gradient"
    )
    return f"step {step}: packed dispatch from here on; {learns}"


def _evaluate(
    config: ConfigDict, evaluator: Evaluator, params: Any, hypers: Any, report: Any
) -> dict[str, Mapping[str, Any]]:
    """Validation metrics soft and hard; they are the same thing for a fixed route."""
    results = {}
    for mode in ("soft", "hard"):
        if mode == "hard" and config.controller.name == "fixed":
            results[mode] = results["soft"]
            continue
        sums = evaluator.sums(
            params,
            hypers.routing,
            split="validation",
            mode=mode,
            max_batches=config.train.eval_batches,
        )
        results[mode] = report(sums)
    return with_gap(results)
