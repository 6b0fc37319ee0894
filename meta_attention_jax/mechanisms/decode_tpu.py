"""Softmax attention of one new token a row on TPUs, by Pallas with scalar prefetch: reads what a row's route needs.

A step of the grid serves one row and one tile of its keys, all heads of it; the list of steps names the tiles that hold
a key which the row may see, so a row in the window costs its window and its sinks, and a row that needs nothing costs
nothing. The next tile is fetched while one is at work.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from meta_attention_jax import targets
from meta_attention_jax.fields import expect
from meta_attention_jax.mechanisms import base2, mosaic
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.mechanisms.cache import Layer, Stack, StepQuery, loaded
from meta_attention_jax.mechanisms.mosaic import DTYPES, LANES, MOST_DIM, dot, lanes
from meta_attention_jax.targets import Target

STEP_BYTES, MOST_KEYS = 1 << 20, 1024
"""Of the keys of a step, as many as make up for the time that a fetch takes to begin; and keys of a tile at most. Not
timed."""
FIRST, LAST, _FLAG_BITS, _TILE_BITS = 1, 2, 2, 14


def serves(kernel: str, q: StepQuery, stack: Stack, target: Optional[Target] = None) -> bool:
    """Whether "pallas" is asked for on a TPU and has a form for this cache. Left to the portable one are those of fewer
    keys than there are lanes, and of heads that do not fill them, for which the compiler may lay out all of it anew."""
    if kernel != "pallas" or (target or targets.current()).platform != "tpu":
        return False
    dtype = "bfloat16" if stack.dtype == jnp.uint16 else jnp.dtype(stack.dtype).name
    known = all(isinstance(size, int) for size in (*q.shape, *stack.shape))
    whole = q.shape[2] % LANES == 0 and q.shape[2] <= MOST_DIM and stack.shape[3] >= LANES
    return known and dtype in DTYPES and whole


class _Steps(NamedTuple):
    count: Int[Array, ""]
    packed: Int[Array, "steps"]  # Row, tile and flags of each.


def _steps(first, last, sinks, tiles: int, size: int) -> _Steps:
    """The tiles of every row that hold [first, last) or [0, sinks), in order."""
    rows = 1 << (31 - _TILE_BITS - _FLAG_BITS)
    expect(first.shape[0] < rows, "batch", f"fewer than {rows:,} rows for 'pallas' on a TPU", first.shape[0])
    expect(tiles <= 1 << _TILE_BITS, "capacity", f"at most {1 << _TILE_BITS:,} tiles of {size} keys", tiles)
    tile = jnp.arange(tiles, dtype=jnp.int32)[None]
    first, last, sinks = (x[:, None] for x in (first, last, sinks))
    meets = (tile * size < last) & ((tile + 1) * size > first) & (first < last)
    meets |= tile * size < jnp.minimum(sinks, first)
    most = meets.size
    row, at = (x.astype(jnp.int32) for x in jnp.nonzero(meets, size=most, fill_value=0))
    # Where there are none, one step is made that nobody reads.
    count, index = jnp.maximum(meets.sum(dtype=jnp.int32), 1), jnp.arange(most, dtype=jnp.int32)
    changes = row[1:] != row[:-1]
    edge = jnp.ones(1, bool)
    begins = jnp.concatenate([edge, changes])
    ends = jnp.concatenate([changes, edge]) | (index == count - 1)
    flags = jnp.where(begins, np.int32(FIRST), np.int32(0)) | jnp.where(ends, np.int32(LAST), np.int32(0))
    return _Steps(count, (((row << _TILE_BITS) | at) << _FLAG_BITS) | flags)


def _row(packed):
    return packed >> (_TILE_BITS + _FLAG_BITS)


def _tile(packed):
    return (packed >> _FLAG_BITS) & np.int32((1 << _TILE_BITS) - 1)


def attend(
    q: StepQuery, k: Stack, v: Stack, layer: Layer, first: Int[Array, "batch"], last: Int[Array, "batch"],
    sinks: Int[Array, "batch"], softcap: Optional[float] = None, interpret: bool = False,
) -> StepQuery:
    """sum_s softmax_s(q . k_s / sqrt(d)) v_s over the keys [first, last) of a row and [0, sinks) before them; 0 for
    rows without any. Softmax in float32."""
    (batch, heads, dim), (_, _, kv_heads, capacity, _) = q.shape, k.shape
    group, size = heads // kv_heads, _size(kv_heads, capacity, dim, k.dtype.itemsize)
    rows = -(-group // 16) * 16
    steps = _steps(first, last, sinks, -(-capacity // size), size)
    query = q.reshape(batch, kv_heads, group, dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - group), (0, 0)))

    def kernel(packed, layer, first, last, sinks, q, k, v, out, top, total, acc):
        del layer
        step = packed[pl.program_id(0)]
        row, start = _row(step), _tile(step) * np.int32(size)

        @pl.when((step & FIRST) != 0)
        def _():
            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            top[...] = jnp.full_like(top, MASKED / 2)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def seen(shape, axis):
            place = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return ((first[row] <= place) & (place < last[row])) | (place < jnp.minimum(sinks[row], first[row]))

        for g in range(kv_heads):
            key, value = (loaded(x[0, 0, g]) for x in (k, v))
            # Behind the capacity stands anything, which times 0 need not be 0.
            value = jnp.where(seen((size, 1), 0), value, jnp.zeros_like(value))
            logits = base2.logits(dot(q[0, g].astype(key.dtype), key, 1, 1), dim**-0.5, softcap)
            logits = jnp.where(seen((rows, size), 1), logits, MASKED)
            before = top[g]
            new = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights, decay = jnp.exp2(logits - lanes(new, size)), jnp.exp2(before - new)
            total[g] = total[g] * decay + weights.sum(axis=1, keepdims=True)
            acc[g] = acc[g] * lanes(decay, dim) + dot(weights.astype(value.dtype), value, 1, 0)
            top[g] = new

        @pl.when((step & LAST) != 0)
        def _():
            out[0] = acc[...] / jnp.maximum(total[...][:, :, :1], jnp.finfo(jnp.float32).tiny)

    def of_row(i, packed, *_):
        return _row(packed[i]), 0, 0, 0

    def of_tile(i, packed, layer, *_):
        return layer[0], _row(packed[i]), 0, _tile(packed[i]), 0

    some_row = pl.BlockSpec((1, kv_heads, rows, dim), of_row)
    some_tile = pl.BlockSpec((1, 1, kv_heads, size, dim), of_tile)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5, grid=(steps.count,),
        in_specs=[some_row, some_tile, some_tile], out_specs=some_row,
        scratch_shapes=[pltpu.VMEM((kv_heads, rows, width), jnp.float32) for width in (LANES, LANES, dim)],
    )
    made = mosaic.result((batch, kv_heads, rows, dim), jnp.float32, q)
    call = pl.pallas_call(kernel, grid_spec=spec, out_shape=made, interpret=interpret)
    out = call(steps.packed, jnp.asarray(layer, jnp.int32).reshape(1), first, last, sinks, query, k, v)
    some = (first < last) | (jnp.minimum(sinks, first) > 0)
    out = jnp.where(some[:, None, None], out[:, :, :group].reshape(q.shape), 0.0)
    return out.astype(q.dtype)


def _size(kv_heads: int, capacity: int, dim: int, bytes_each: int) -> int:
    """Keys of a tile: a power of two, LANES at least."""
    most = min(MOST_KEYS, capacity, STEP_BYTES // (kv_heads * dim * bytes_each))
    return max(LANES, 1 << (max(most, 1).bit_length() - 1))
