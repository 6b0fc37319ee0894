"""Softmax attention of one new token a row on NVIDIA GPUs, by Pallas in its Triton form: reads what a route needs.

A program serves one row, one key head with the queries that share it, and one stretch of the keys that the row needs,
so a row in the window reads its window and its sinks, whatever the others do; a stretch without any is left at once.
The parts of a row are merged by their log-sum-exps.
"""

from __future__ import annotations

from typing import Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from meta_attention_jax.mechanisms import base2, triton
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.mechanisms.cache import Layer, Stack, StepQuery, loaded
from meta_attention_jax.targets import Target

KEYS, LEAST_STRETCH, MOST_STRETCHES, TILE_BYTES = 64, 512, 16, 32768
"""Keys that meet the queries at a time, half as many where their tile has more bytes; keys of a stretch at least where
a row needs all of its cache, and stretches of a row at most. Not timed."""


def serves(kernel: str, q: StepQuery, stack: Stack, target: Optional[Target] = None) -> bool:
    """As `triton.serves`; heads that are no power of two, and caches of fewer than KEYS keys, are left to the portable
    form."""
    batch, heads, dim = q.shape
    dtype = jnp.bfloat16 if stack.dtype == jnp.uint16 else stack.dtype
    asked = triton.serves(kernel, (batch, stack.shape[3], heads, dim), dtype, target)
    return asked and dim == triton.width_for(dim) and stack.shape[3] >= KEYS


def attend(
    q: StepQuery, k: Stack, v: Stack, layer: Layer, first: Int[Array, "batch"], last: Int[Array, "batch"],
    sinks: Int[Array, "batch"], softcap: Optional[float] = None, interpret: bool = False,
) -> StepQuery:
    """sum_s softmax_s(q . k_s / sqrt(d)) v_s over the keys [first, last) of a row and [0, sinks) before them; 0 for
    rows without any. Softmax in float32."""
    (batch, heads, dim), (_, _, kv_heads, capacity, _) = q.shape, k.shape
    group = heads // kv_heads
    rows = max(triton.LEAST, 1 << (group - 1).bit_length())
    stretches = min(MOST_STRETCHES, -(-capacity // LEAST_STRETCH))
    size, stages = (KEYS, 3) if KEYS * dim * k.dtype.itemsize <= TILE_BYTES else (KEYS // 2, 2)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)

    def kernel(layer, first, last, sinks, q, k, v, acc, top, total):
        n, part = triton.divide(pl.program_id(0), stretches)
        row, g = triton.divide(n, kv_heads)
        # What a row needs, in as many stretches of whole tiles; the sinks before it are the first one's.
        base = triton.divide(first[row], size)[0] * size
        stretch = triton.divide(last[row] - base + stretches * size - 1, stretches * size)[0] * size
        begin = base + part * stretch
        low, high = jnp.maximum(first[row], begin), jnp.minimum(last[row], begin + stretch)
        early = jnp.where(part == 0, jnp.minimum(sinks[row], first[row]), 0)
        some = (low < high) | (early > 0)
        total[row, g, part, :] = jnp.zeros((rows,), jnp.float32)
        top[row, g, part, :] = jnp.full((rows,), MASKED, jnp.float32)

        @pl.when(some)
        def _():
            member = g * group + jnp.minimum(jnp.arange(rows, dtype=jnp.int32), group - 1)
            query, at = q[row, member, :], layer[0]

            def meet(j, carry):
                before, mass, out = carry
                start = jnp.minimum(j * size, capacity - size)  # The last tile is moved inwards.
                key, value = (loaded(x[at, row, g, pl.ds(start, size), :]) for x in (k, v))
                place = start + jnp.arange(size, dtype=jnp.int32)
                seen = ((low <= place) & (place < high)) | (place < early)
                seen &= place >= j * size
                logits = base2.logits(triton.dot(query.astype(key.dtype), key, 1, 1), dim**-0.5, softcap)
                logits = jnp.where(seen[None], logits, MASKED)
                new = jnp.maximum(before, logits.max(1))
                weights, decay = jnp.exp2(logits - new[:, None]), jnp.exp2(before - new)
                out = out * decay[:, None] + triton.dot(weights.astype(value.dtype), value, 1, 0)
                return new, mass * decay + weights.sum(1), out

            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            carry = jnp.full((rows,), MASKED / 2, jnp.float32), jnp.zeros((rows,), jnp.float32)
            carry = *carry, jnp.zeros((rows, dim), jnp.float32)
            ends, early_ends = ((x + size - 1) // size for x in (high, early))
            tile = jnp.where(low < high, low // size, jnp.maximum(ends, early_ends))
            carry = jax.lax.fori_loop(tile, ends, meet, carry)
            # A tile of both is met once.
            carry = jax.lax.fori_loop(0, jnp.minimum(early_ends, tile), meet, carry)
            acc[row, g, part, :, :], total[row, g, part, :] = carry[2], carry[1]
            top[row, g, part, :] = carry[0]

    shape = (batch, kv_heads, stretches, rows)
    made = [jax.ShapeDtypeStruct((*shape, dim), jnp.float32), *[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2]
    arguments = (layer, first, last, sinks, q, k, v)
    acc, top, total = triton.call(
        kernel, arguments, made, batch * kv_heads * stretches, warps=4, stages=stages, interpret=interpret
    )
    weight = jnp.where(total > 0, jnp.exp2(top - top.max(2, keepdims=True)), 0.0)
    whole = jnp.maximum((weight * total).sum(2), jnp.finfo(jnp.float32).tiny)
    # What a part that was left has is nothing that was written.
    out = jnp.where(weight[..., None] > 0, weight[..., None] * acc, 0.0).sum(2) / whole[..., None]
    return out[:, :, :group].reshape(q.shape).astype(q.dtype)
