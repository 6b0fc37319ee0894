"""Which shapes of the GPU's packed kernels are fastest? Forward, dQ, and dK with dV, each alone.

python -m experiments.benchmarks.kernel_shapes [--dims=128,64] [--time=16384] [--out=FILE.json] [--budget_minutes=3]

B 1, H = G = 16, bfloat16, w 1024 with 4 sinks, drawn routes: all tokens full; 10 % full and no others; 45 % local and
no others; all local. A shape is (queries, keys, warps, stages) of `kernels.gpu.Shape`. TFLOP/s count the products that
the equation needs over allowed pairs: 2 forward, 3 for dQ, 4 for dK with dV.
"""

from __future__ import annotations

import functools
import time as clock
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common, gpu_timings
from experiments.benchmarks.kernels import HEADS, SINKS, WINDOW
from meta_attention_jax.kernels import gpu, worklist
from meta_attention_jax.kernels.gpu import Shape, Tuning
from meta_attention_jax.kernels.worklist import Sizes, WorkList
from meta_attention_jax.mechanisms.mechanism import Reach

SIZES = Sizes(128, 128)
SHARES = {"all full": (1.0, 0.0), "10 % full": (0.1, 0.0), "45 % local": (0.0, 0.45), "all local": (0.0, 1.0)}
"""Of full and of local."""

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
SHAPES = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3),
                (64, 128, 4, 2), (64, 32, 4, 4)),
    "dq": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
           (128, 128, 8, 2)),
    "dkv": ((32, 128, 8, 2), (32, 128, 8, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2),
            (64, 128, 8, 2)),
}


def work_of(time: int, shares: tuple[float, float]) -> WorkList:
    drawn = np.random.default_rng(time).choice(3, size=(1, time), p=(*shares, 1 - sum(shares)))
    reaches = [Reach(), Reach(WINDOW, SINKS)]
    build = functools.partial(worklist.build, causal=True, reaches=reaches, sizes=[SIZES] * 2)
    return jax.jit(build, static_argnums=1)(jnp.asarray(drawn, jnp.int32), None)


def pairs(work: WorkList) -> float:
    """Allowed pairs of all queries."""
    valid = work.order < work.slot.shape[1]
    seen = work.last - jnp.maximum(work.first, work.sink_last) + 1 + work.sink_last - work.sink_first
    return float(jnp.sum(jnp.where(valid, seen, 0).astype(jnp.float32)))


def programs(dim: int) -> dict[str, Callable[[Shape], Callable[..., Any]]]:
    """kernel -> shape -> (q, k, v, log-sum-exp, work) -> what it writes."""
    scale = dim**-0.5

    def forward(shape):
        return lambda q, k, v, lse, work: gpu._forward(q, k, v, work, None, Tuning(SIZES, *[shape] * 3), False)

    def backward(function, shape):
        tuning = Tuning(SIZES, *[shape] * 3)
        return lambda q, k, v, lse, work: function((q, k, v, q, lse, lse), work, None, tuning, scale, False)

    return {
        "forward": forward,
        "dq": functools.partial(backward, gpu._backward_q),
        "dkv": functools.partial(backward, gpu._backward_kv),
    }


def rows(time: int, dims: list[int], rounds: int, until: float) -> Iterator[list[common.Row]]:
    """A row per shape; all are compiled side by side first. One that fails says so."""
    works = {name: work_of(time, shares) for name, shares in SHARES.items()}
    lse = jnp.zeros((1, HEADS, time), jnp.float32)
    jobs = []
    for dim in dims:
        arrays = (*common.random_qkv(1, time, HEADS, dim, jnp.bfloat16), lse)
        jobs += [
            (dim, kernel, shape, jax.jit(make(Shape(*shape))).lower(*arrays, works["all full"]), arrays)
            for kernel, make in programs(dim).items() for shape in SHAPES[kernel]
        ]
    with futures.ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(lowered.compile) for *_, lowered, _ in jobs]
        for (dim, kernel, shape, _, arrays), program in zip(jobs, waiting):
            row = {"kernel": kernel, "shape": shape, "d": dim, "T": time}
            if clock.monotonic() > until:
                program.cancel()
                yield [row | {"note": "not run: out of time"}]
                continue
            try:
                run = program.result()
                calls = {name: functools.partial(run, *arrays, work) for name, work in works.items()}
                for name, seconds in gpu_timings.per_call(calls, rounds).items():
                    median = float(np.median(seconds))
                    flops = PRODUCTS[kernel] * 2 * dim * HEADS * pairs(works[name])
                    row |= {f"{name}, ms": 1e3 * median, f"{name}, TFLOP/s": flops / median / 1e12}
            except Exception as error:  # Of a compiler or a device: they have no common class.
                row |= {"note": f"{type(error).__name__}: {str(error)[:200]}"}
            yield [row]


def main() -> None:
    began = clock.monotonic()
    with commands.user_mistakes():
        dims = common.numbers("dims", DIMS.value, "powers of 2 from 16 to 256", lambda x: x in (16, 32, 64, 128, 256))
    common.device_or_fail("gpu")
    common.tell(rows(TIME.value, dims, ROUNDS.value, began + 60 * BUDGET.value), OUT.value)


if __name__ == "__main__":
    OUT = commands.define_path("out", None, "Where the rows go, JSON.")
    DIMS = flags.DEFINE_list("dims", ["128", "64"], "Head widths.")
    TIME = flags.DEFINE_integer("time", 16384, "T.", 128)
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Interleaved.", 1)
    BUDGET = flags.DEFINE_float("budget_minutes", 3.0, "No shape starts later.", 0.0)
    commands.run(main, prints=True)
