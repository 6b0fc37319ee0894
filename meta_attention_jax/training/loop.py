"""One training run in one directory, resumable at any checkpoint.

A run directory holds `config.json`, `data_manifest.json`, the tokenizer, `metrics.jsonl`,
`tensorboard/` and `checkpoints/`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from typing import Any, Mapping, Optional

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from meta_attention_jax.data.pipeline import Dataset, write_manifest
from meta_attention_jax.mechanisms.full import resolve_implementation
from meta_attention_jax.objective import Sums, summarise
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.config import config_difference, config_to_dict
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.logs import MetricsLog, Progress, status_line
from meta_attention_jax.training.state import TrainState, count_parameters
from meta_attention_jax.training.step import StepSpec, init_state, train_step

PROFILED_STEPS = 3

FREE_TO_CHANGE = (
    "parallel.mode",
    "parallel.devices",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_latest",
    "train.profile_step",
)
"""Fields that change no number of a run: a resumed run may set them anew."""


class Diverged(RuntimeError):
    """NaN or infinity in the loss, the gradients or the parameters."""


def open_workdir(workdir: str | pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Makes or checks the run directory; writes `config.json` when it is new.

    Raises:
      ValueError: a directory with a run of another config, or with files that are no run's.
    """
    path = pathlib.Path(workdir).absolute()
    stored_at = path / "config.json"
    given = config_to_dict(config)
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir: expected a directory, got the file {str(workdir)!r}.")
    if stored_at.exists():
        stored = json.loads(stored_at.read_text(encoding="utf-8"))
        for field, old, new in config_difference(stored, given):
            if field not in FREE_TO_CHANGE:
                raise ValueError(
                    f"{field}: expected {old!r}, as in {str(workdir)}/config.json, got {new!r}; "
                    "use another workdir or the same config."
                )
        return path
    if path.exists() and any(path.iterdir()):
        raise ValueError(
            f"workdir: expected a new or empty directory or a run, got {str(workdir)!r}, which holds "
            "other files."
        )
    path.mkdir(parents=True, exist_ok=True)
    partial = stored_at.with_suffix(".tmp")
    partial.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, stored_at)
    return path


def describe(config: ConfigDict, spec: StepSpec, dataset: Dataset, params: Any) -> dict[str, Any]:
    """What runs, once per run: sizes, the controller's share, and which full attention."""
    flops = build.build_flops(config, dataset.vocab_size)
    parameters, controller = count_parameters(params)
    return {
        "full_attention": resolve_implementation(
            config.model.implementation,
            time=config.data.sequence_length,
            dtype=spec.model.dtype,
            head_dim=config.model.model_dim // config.model.num_heads,
            has_segments=True,
            backend=jax.default_backend(),
        ),
        "parameters": parameters,
        "controller_parameter_share": controller / parameters,
        "flops_per_token": flops.dense,
        "controller_flop_share": flops.controller_share,
    }


def _check_finite(flags: list[jax.Array], first_step: int, good: Optional[int]) -> None:
    """Raises at the first step whose numbers are not finite."""
    for offset, finite in enumerate(jax.device_get(flags)):
        if not finite.all():
            kept = f"the last good checkpoint is step {good}" if good else "no checkpoint is kept"
            raise Diverged(
                f"step {first_step + offset}: expected finite loss, gradients and parameters, got "
                f"NaN or infinity; {kept}."
            )


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    stop_after: Optional[int] = None,
    progress: bool = True,
    label: Optional[str] = None,
) -> dict[str, Any]:
    """Trains to `config.train.steps`, from the newest checkpoint if there is one.

    Args:
      config: a full config; see configs/base.py.
      workdir: the run directory.
      stop_after: stop (with a checkpoint) after this step, as an interruption would.
      progress: show the live line.
      label: of the live line; the config's name when None.

    Returns:
      The last evaluation on the validation split: {"soft": metrics, "hard": metrics}.

    Raises:
      ValueError: a mistake in the config or the directory, before any work.
      Diverged: NaN or infinity; names the step and the last good checkpoint.
    """
    build.check(config)
    parallel = build.build_parallel(config)
    existing = pathlib.Path(workdir) / "config.json"
    dataset = build.build_dataset(config, workdir if existing.exists() else None)
    path = open_workdir(workdir, config)
    dataset.tokenizer.save(path)
    write_manifest(dataset, path)

    spec = build.build_spec(config, dataset)
    hypers = build.build_hypers(config)
    state = init_state(spec, jax.random.key(config.seed), dataset.train_batch(0), hypers)
    checkpoints = Checkpoints(path / "checkpoints", keep_latest=config.train.keep_latest)
    log = MetricsLog(path)
    start = 0
    if checkpoints.latest is not None:
        start = checkpoints.latest
        state = checkpoints.restore(state, start)
        log.write("resume", start, {})
    about = describe(config, spec, dataset, state.params)
    if not start:
        log.write("start", 0, about)
    if progress:
        print(
            f"{label or config.name}: {about['parameters']:,} parameters "
            f"({about['controller_parameter_share']:.1%} controller), full attention "
            f"{about['full_attention']}, {len(parallel.devices)} × {jax.default_backend()} by "
            f"{config.parallel.mode}" + (f", resumed at step {start}" if start else ""),
            flush=True,
        )
    try:
        return _run(
            config, spec, dataset, parallel, state, hypers, checkpoints, log,
            start=start,
            stop=min(stop_after or config.train.steps, config.train.steps),
            line=Progress(
                label or config.name,
                total=config.train.steps,
                start=start,
                tokens_per_step=config.data.batch_size * config.data.sequence_length,
                enabled=progress,
            ),
            path=path,
        )
    finally:
        checkpoints.close()
        log.close()


def _run(
    config: ConfigDict,
    spec: StepSpec,
    dataset: Dataset,
    parallel: Any,
    state: TrainState,
    hypers: Any,
    checkpoints: Checkpoints,
    log: MetricsLog,
    *,
    start: int,
    stop: int,
    line: Progress,
    path: pathlib.Path,
) -> dict[str, Any]:
    mechanisms = tuple(config.model.mechanisms)
    report = functools.partial(
        summarise, mechanisms=mechanisms, costs=jax.device_get(hypers.routing.costs)
    )
    compiled = parallel.compile(
        functools.partial(train_step, spec), batch_argument=1, donate=(0,)
    )
    evaluator = Evaluator(spec.model, dataset, parallel)
    state, hypers = parallel.replicate(state), parallel.replicate(hypers)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    total: Optional[Sums] = None
    flags: list[jax.Array] = []
    evaluation: dict[str, Any] = {}
    good = start or None
    try:
        for step in range(start, stop):
            if step == config.train.profile_step:
                jax.profiler.start_trace(str(path / "profile"))
            state, metrics = compiled(state, parallel.shard(dataset.train_batch(step)), hypers)
            if step == config.train.profile_step + PROFILED_STEPS - 1 >= PROFILED_STEPS - 1:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            done = step + 1
            total = metrics["sums"] if total is None else add(total, metrics["sums"])
            flags.append(metrics["finite"])
            last = done == stop
            due_eval = done % config.train.eval_every == 0 or last
            due_save = done % config.train.checkpoint_every == 0 or last
            if done % config.train.log_every == 0 or due_eval or due_save:
                _check_finite(flags, done - len(flags) + 1, good)
                sums = jax.device_get(parallel.unreplicate(total))
                scalars = {
                    name: float(jax.device_get(parallel.unreplicate(metrics[name])))
                    for name in ("gradient_norm", "threshold", "beta", "learning_rate")
                }
                record = {**report(sums, beta=scalars["beta"]), **scalars}
                log.write("train", done, record)
                line.update(done, status_line(record, mechanisms))
                total, flags = None, []
            if due_eval:
                evaluation = _evaluate(config, evaluator, state.params, hypers, report)
                log.write("eval", done, evaluation)
            if due_save:
                checkpoints.save(
                    done,
                    parallel.unreplicate(state),
                    config=config_to_dict(config),
                    nll=evaluation["soft"]["nll"] if due_eval else math.inf,
                )
                checkpoints.wait() if last else None
                good = done
    finally:
        line.close()
    if stop == config.train.steps:
        log.write("final", stop, evaluation)
    return evaluation


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
    return results
