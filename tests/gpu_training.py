"""What test_gpu.py compares of training: a run that is cut off and goes on; rows as in gpu_checks."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import recall
from meta_attention_jax.objective import Sums
from meta_attention_jax.training import loop
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.job import Job, prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.step import init_state
from meta_attention_jax.types import MECHANISMS
from tests.gpu_checks import TENSOR_FLOAT, UNIT, Row, check


def training_config(sizes: Any, dtype: str):
    """`recall`, shortened, Bayesian; packed dispatch from 70 % of the steps on."""
    config = recall.get_config()
    config.update_from_flattened_dict({
        **dict(sizes.training), "model.dtype": dtype, "gate.start": 0.4, "gate.end": 0.7,
        "train.steps": sizes.steps, "train.eval_every": sizes.steps,
        "train.checkpoint_every": sizes.steps, "train.log_every": max(sizes.steps // 10, 1),
        "train.packed": True,
    })
    batch = config.data.batch_size
    config.parallel.devices = max(
        n for n in range(1, len(jax.devices()) + 1) if batch % n == 0
    )
    return config


def training_rows(sizes: Any, dtype: str, folder: pathlib.Path) -> list[Row]:
    """A run that is cut off after the gate and goes on; its nats; what its checkpoint gives."""
    config = training_config(sizes, dtype)
    cut, name = round(0.8 * sizes.steps), f"recall, {dtype}"
    path = folder / dtype
    job = prepare(config, path)
    before = loop.train(job, stop_after=cut, progress=False)
    state = restored_state(job, cut)
    evaluator = Evaluator(job.spec.model, job.dataset, job.parallel)

    def sums_of(evaluator: Evaluator, mode: str) -> Sums:
        return evaluator.sums(
            *job.parallel.place((state.params, job.hypers.routing)), split="validation",
            mode=mode, max_batches=config.train.eval_batches,
        )

    def nats(sums: Sums) -> float:
        return float(sums.nll) / float(sums.tokens)

    rows = [
        check(f"{name}, entries that a second save and restore changes",
              changed_entries(job, state, folder / f"{dtype}-again"), 0.0),
    ]
    for mode in ("soft", "hard"):
        # The same program on the same numbers; 1e-5 for sums that atomics make in any order.
        rows.append(check(f"{name}, restored less logged nats {mode}, size",
                          abs(nats(sums_of(evaluator, mode)) - before[mode]["nll"]), 1e-5))
    dense, sparse = (
        sums_of(Evaluator(job.spec.model.clone(dispatch=name), job.dataset, job.parallel), "hard")
        for name in ("dense", "packed")
    )
    shares = sparse.routes.sum(axis=(0, 1)) / sparse.routes.sum()
    # Rounding may turn the routes of later layers where two mechanisms tie, so more than an output.
    near = UNIT if dtype == "bfloat16" else TENSOR_FLOAT
    rows.append(check(f"{name}, nats hard by packed less by dense, relative",
                      abs(nats(sparse) - nats(dense)) / nats(dense), near,
                      "routes " + ", ".join(f"{x:.0%} {m}" for x, m in zip(shares, MECHANISMS))))

    after = loop.train(prepare(config, path, job.dataset), progress=False)
    records = list(read_metrics(path))
    resumed = [r["step"] for r in records if r["event"] == "resume"]
    logged = [r["nll"] for r in records if r["event"] == "train"]
    rows += [
        check(f"{name}, resumed at another step than {cut}", float(resumed != [cut]), 0.0),
        check(f"{name}, logged losses that are not finite",
              sum(x is None or not math.isfinite(x) for x in logged), 0.0),
        check(f"{name}, last / first logged nats", logged[-1] / logged[0], sizes.fall),
    ]
    for mode in ("soft", "hard"):
        rows.append(check(f"{name}, validation nats {mode} after {sizes.steps} steps",
                          after[mode]["nll"], sizes.bound))
    return rows


@contextlib.contextmanager
def opened(directory: pathlib.Path, **options: Any) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(directory, **options)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def restored_state(job: Job, step: int):
    with opened(job.path / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(_template(job), step)


def _template(job: Job):
    return init_state(job.spec, jax.random.key(1), job.dataset.train_batch(0), job.hypers)


def changed_entries(job: Job, state: Any, directory: pathlib.Path) -> int:
    """Numbers of the state that are others once it was written from the device and read again."""
    with opened(directory) as checkpoints:
        checkpoints.save(1, state, config={}, nll=0.0)
        checkpoints.wait()
        again = checkpoints.restore(_template(job), 1)

    def bits(x):
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    return sum(
        int((bits(x) != bits(y)).sum())
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
    )
