"""Does packed attention compile in the form that is to follow Triton in Pallas? A trial, and nothing that is used.

python -m experiments.checks.successor        needs the compiler (pip install "jax[cuda13]") and no GPU

One warpgroup serves 64 packed queries of a head, and meets as many tiles of 64 keys as its place in the list says, by
`plgpu.kernel` (Hopper's asynchronous copies and warpgroup products; no pipeline, no sinks, no backward pass). Compiled
for an H100; whether its numbers are right is not asked, for this form cannot be interpreted on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from experiments.checks import chips

chips.alone()  # Before JAX starts.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from experiments import common as commands  # noqa: E402
from experiments.benchmarks import common  # noqa: E402
from meta_attention_jax.mechanisms.base2 import LOG2E  # noqa: E402

QUERIES, KEYS = 64, 64
SLOTS, TIME, HEADS, DIM = 4096, 32768, 16, 128


def forward(tiles: jax.Array, last: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q . k / sqrt(d)) v of packed queries [slot head dim] over the keys up to `last` of each; `tiles` of keys
    a block."""
    row, square = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA

    def kernel(tiles, last, q, k, v, out, queries, keys, values, results, barrier):
        block, head = jax.lax.axis_index("block"), jax.lax.axis_index("head")
        mine = pl.ds(block * QUERIES, QUERIES)
        fetch(q.at[mine, head], queries, barrier.at[0])
        ends = plgpu.load(last, mine, layout=row, optimized=False)

        def meet(j, carry):
            acc, top, total = carry
            for source, place in ((k, keys), (v, values)):
                fetch(source.at[pl.ds(j * KEYS, KEYS), head], place, barrier.at[0])
            logits = product((QUERIES, KEYS), queries, plgpu.transpose_ref(keys, (1, 0))) * (DIM**-0.5 * LOG2E)
            place = j * KEYS + plgpu.broadcasted_iota(jnp.int32, (QUERIES, KEYS), 1, layout=square)
            logits = jnp.where(place <= jax.lax.broadcast_in_dim(ends, logits.shape, [0]), logits, -1e30)
            new = jnp.maximum(top, logits.max(axis=1))
            weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(new, logits.shape, [0]))
            decay = jnp.exp2(top - new)
            acc = acc * jax.lax.broadcast_in_dim(decay, acc.shape, [0])
            acc += product((QUERIES, DIM), weights.astype(jnp.bfloat16), values)
            return acc, new, total * decay + weights.sum(axis=1)

        filled = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)  # noqa: E731
        carry = filled((QUERIES, DIM), 0.0, square), filled((QUERIES,), -5e29, row), filled((QUERIES,), 0.0, row)
        acc, _, total = jax.lax.fori_loop(0, tiles[block], meet, carry)
        results[...] = (acc / jax.lax.broadcast_in_dim(total, acc.shape, [0])).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results, out.at[mine, head])
        plgpu.wait_smem_to_gmem(0)

    def tile(rows: int) -> Any:
        tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM((rows, DIM), jnp.bfloat16, transforms=tiled)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(q.shape, q.dtype), grid=(HEADS, q.shape[0] // QUERIES),
        grid_names=("head", "block"),
        scratch_types=[tile(QUERIES), tile(KEYS), tile(KEYS), tile(QUERIES), plgpu.Barrier(num_barriers=1)],
    )(tiles, last, q, k, v)


def fetch(source: Any, place: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def product(shape: tuple[int, int], x: Any, y: Any) -> jax.Array:
    """By a warpgroup, in float32."""

    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, x, y)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def row() -> common.Row:
    (device,) = chips.devices_of("h100")
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = [((SLOTS // QUERIES,), jnp.int32), ((SLOTS,), jnp.int32), ((SLOTS, HEADS, DIM), jnp.bfloat16)]
    shapes += [((TIME, HEADS, DIM), jnp.bfloat16)] * 2
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    said = {"form": "plgpu.kernel", "T": TIME, "d": DIM, "queries": QUERIES, "keys": KEYS}
    words: list[str] = []
    try:
        with heard(words):
            compiled = jax.jit(forward).lower(*arguments).compile()
    except Exception as error:  # Of a compiler: they have no common class.
        return said | {"note": f"{type(error).__name__}: {common.sentence(error)}"}
    return said | {
        "note": "compiled", "registers": ", ".join(re.findall(r"Used (\d+) registers", words[0])), "spilled bytes": sum(
            map(int, re.findall(r"(\d+) bytes spill stores", words[0]))
        ), "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


@contextlib.contextmanager
def heard(words: list[str]) -> Iterator[None]:
    """What the assembler says, which goes past Python."""
    with tempfile.TemporaryFile() as said:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in kept:
            os.dup2(said.fileno(), number)
        try:
            yield
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            said.seek(0)
            words.append(said.read().decode(errors="replace"))


def main() -> None:
    with commands.user_mistakes():
        common.tell([[row()]], JSON.value)


if __name__ == "__main__":
    JSON = commands.define_path("json", None, "Where the row goes.")
    commands.run(main, prints=True)
