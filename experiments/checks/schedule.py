"""Cycles of the TPU's kernels, from the schedules that its compiler writes when it is asked to.

python -m experiments.checks.schedule [--json=FILE]            needs the compiler (pip install "jax[tpu]") and no TPU

A TPU core runs one bundle of instructions a cycle, in the order that the compiler has fixed, so a kernel's bundles are
its cycles but for what it waits for: memory, which `experiments.benchmarks.kernel_model` adds. A row per kernel
(forward, dQ, dK with dV), head width and dtype, for a v5e: cycles of a step of the grid where every query sees every
key of the tile, where they are masked, what the first and the last step of a block take more, and what the products
alone take at the chip's peak (a step that has fewer bundles than that waits for them). Linear attention's step is a
chunk of one head. For comparison two kernels of jax: flash attention, whose tiles are 128 x 128 unless it is told
otherwise and of which timings are public (jax-ml/jax#24633), and splash attention, its backward pass by two kernels.
"""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from experiments.checks import bundles, chips
from experiments.checks.bundles import Step

SCHEDULES = pathlib.Path(tempfile.gettempdir()) / f"schedules_{os.getpid()}"

chips.alone()  # Before JAX starts.
bundles.ask(SCHEDULES)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from experiments import common as commands  # noqa: E402
from experiments.benchmarks import common  # noqa: E402
from experiments.benchmarks.kernel_shapes import PRODUCTS  # noqa: E402
from meta_attention_jax.kernels import tpu, tpu_steps  # noqa: E402
from meta_attention_jax.kernels.worklist import Sizes  # noqa: E402
from meta_attention_jax.mechanisms import linear_tpu  # noqa: E402

TIME, HEADS = 32768, 16
KINDS = ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32"))
"""(head width, dtype)."""
FLOPS = 4 * 128 * 128 * 2
"""Of a cycle of a v5e, by four matrix units."""


def ours(name: str, dim: int, dtype: str) -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]], Sizes]:
    """A kernel alone, its lists given, and what it is given."""
    sizes = tpu.sizes_for(dim, TIME)
    slots, most = TIME + 2 * sizes.block, 4096
    heads, rows, ids = ((1, HEADS, slots, dim), dtype), ((1, HEADS, slots), "float32"), "int32"
    keys = ((1, HEADS, TIME, dim), dtype)
    cut = tpu._Cut(sizes, sinks=True, softcap=None, interpret=False)

    def run(q, k, v, bounds, count, packed, row, slot, d_out, lse, mean):
        state, steps = tpu._State(q, k, v, bounds), tpu_steps.Steps(count, packed, row, slot)
        if name == "forward":
            return tpu._forward(state, steps, cut)
        function = tpu._backward_q if name == "dq" else tpu._backward_kv
        return function(state, (d_out, lse, mean), steps, cut)

    lists = ((), ids), ((most,), ids), ((slots // sizes.block + 1,), ids), ((slots // sizes.block + 1,), ids)
    return run, [heads, keys, keys, ((1, 8, slots), ids), *lists, heads, rows, rows], sizes


def linear(name: str, dim: int, dtype: str) -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """A kernel of linear attention alone, and what it is given."""
    chunk = linear_tpu.chunk_for(1, dim, dtype)
    q, k, places = ((1, HEADS, 1, TIME, dim), dtype), ((1, HEADS, TIME, dim), dtype), ((1, 8, TIME), "int32")
    row = (1, HEADS, 1, 8, TIME), "float32"
    more = {"forward": [], "dq": [q], "dkv": [q, row, row]}[name]
    function = linear_tpu._in_reverse if name == "dkv" else linear_tpu._in_order
    return lambda places, *arrays: function(arrays, places, chunk, False), [places, q, k, k, *more]


def row_of(kernel: str, dim: int, dtype: str, sizes: Sizes, products: int, step: Step, ours: bool) -> common.Row:
    """Ours go through (the first step, a tile that is seen whole, one that is masked, the last step); splash attention
    through (the first, a tile, the last); flash attention through (the first, the last)."""
    parts = step.parts
    if ours:
        first, whole, masked, last = parts[-4:]
        tile = {"whole": step.always + whole, "masked": step.always + masked}
    else:
        first, *rest, last = parts[-3:] if len(parts) > 2 else parts
        tile = {"whole": step.always + sum(rest), "masked": step.always + sum(rest)}
    least = products * 2 * sizes.block * sizes.tile * dim // FLOPS
    return {
        "kernel": kernel, "d": dim, "dtype": dtype, "block": sizes.block, "tile": sizes.tile, **tile,
        "first": first, "last": last, "products": least, "always": step.always, "parts": ", ".join(map(str, parts)),
    }


def rows() -> Iterator[list[common.Row]]:
    mesh = Mesh(np.array(chips.devices_of("v5e:2x2")[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def compiled(function: Callable[..., Any], given: list[tuple[tuple[int, ...], Any]]) -> list[Step]:
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in given]
        with jax.set_mesh(mesh):  # Pallas asks which TPU it is.
            jax.jit(function).lower(*arguments).compile()
        return bundles.taken(SCHEDULES)

    for dim, dtype in KINDS:
        for name, products in PRODUCTS.items():
            run, given, sizes = ours(name, dim, dtype)
            (step,) = compiled(run, given)
            yield [row_of(name, dim, dtype, sizes, products, step, ours=True)]
        for name in PRODUCTS:
            (step,) = compiled(*linear(name, dim, dtype))
            size, products = linear_tpu.chunk_for(1, dim, dtype), {"forward": (2, 2), "dq": (4, 3), "dkv": (4, 3)}[name]
            least = 2 * size * dim * (products[0] * size + products[1] * dim) // FLOPS
            yield [{"kernel": f"linear, {name}", "d": dim, "dtype": dtype, "block": size, "tile": size,
                    "whole": step.always, "masked": step.always, "first": sum(step.parts), "last": 0,
                    "products": least}]
    given, dim = [((1, HEADS, TIME, 128), "bfloat16")] * 3, 128
    (step,) = compiled(flash_attention, given)
    yield [row_of("flash attention of jax, forward", dim, "bfloat16", Sizes(128, 128), 2, step, ours=False)]
    for sizes in (Sizes(512, 1024), Sizes(1024, 1024)):
        for step, (name, products) in zip(compiled(functools.partial(splash, sizes), given), PRODUCTS.items()):
            yield [row_of(f"splash attention of jax, {name}", dim, "bfloat16", sizes, products, step, ours=False)]


def flash_attention(q, k, v):
    from jax.experimental.pallas.ops.tpu import flash_attention

    return flash_attention.flash_attention(q, k, v)


def splash(sizes: Sizes, q, k, v):
    """Causal, and its gradients."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    (block, tile), inner = sizes, 512
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=tile, block_kv_compute=inner, block_q_dq=block, block_kv_dq=tile,
        block_q_dkv=block, block_kv_dkv=tile, block_kv_dkv_compute=inner,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((TIME, TIME))] * HEADS)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
    out, pull = jax.vjp(lambda *x: kernel(*x), q[0], k[0], v[0])
    return out, pull(out)


def line(part: list[common.Row]) -> str:
    (row,) = part
    said = f"{row['kernel']:35} d {row['d']:<4} {row['dtype']:9} {row['block']} x {row['tile']:<5}"
    share = row["products"] / max(row["whole"], row["products"])
    return f"{said} cycles {row['whole']}, masked {row['masked']}; products {row['products']}, {share:.0%} of them"


def main() -> None:
    with commands.user_mistakes():
        common.tell(rows(), JSON.value, line)


if __name__ == "__main__":
    JSON = commands.define_path("json", None, "Where the rows go.")
    commands.run(main, prints=True)
