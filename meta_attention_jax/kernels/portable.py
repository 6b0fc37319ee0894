"""The packed kernel of every platform: loops of XLA whose trip counts follow the work list.

For each block of queries an online softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) meets
the tiles of keys that the list names. The backward pass keeps the log-sum-exp of every query and meets the same tiles.
Memory is linear in time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.kernels.worklist import Blocks, Sizes, WorkList
from meta_attention_jax.mechanisms import blocks as layout
from meta_attention_jax.mechanisms.blocks import MASKED, dot
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.types import Keys, Queries, Values

Packed = Float[Array, "batch slots heads dim"]
PackedLogSumExp = Float[Array, "batch slots heads"]
LogSumExp = Float[Array, "batch heads time"]

BLOCK, TILE, LOCAL_TILE = 64, 128, 64
"""Queries of a block; keys of a tile where nothing bounds the reach, at T below LONG_TIME (block and tile are twice
that from there on), and of a tile of a window. Larger blocks are faster per pair, but their queries span more
positions, so they meet more keys in vain. Forward+backward at 10 % full, twice / once, on two CPU cores (4 heads, d
64), one trial that was not recorded: 1.09 at T 4096, 0.88 at 8192, 0.87 at 32768."""

LONG_TIME = 8192

_ZERO = np.int32(0)  # Indices of one slice share a dtype, whatever the default integer is.


def sizes_for(time: int, reach: Reach) -> Sizes:
    """Blocks and tiles that suit a reach; a tile has at most T keys."""
    if reach.window is not None:
        return Sizes(BLOCK, min(LOCAL_TILE, time))
    factor = 2 if time >= LONG_TIME else 1
    return Sizes(factor * BLOCK, min(factor * TILE, time))


def attend(q: Queries, k: Keys, v: Values, work: WorkList, softcap: float | None = None) -> tuple[Queries, LogSumExp]:
    """softmax(q . k / sqrt(d)) v of the packed queries at their tokens, and the log-sum-exp of their logits; 0
    elsewhere."""
    out, lse = packed(q, k, v, work, softcap)
    return _unpack(out, work), _unpack(lse[..., None], work)[..., 0].transpose(0, 2, 1)


@jax.custom_vjp
def _unpack(out: Packed, work: WorkList) -> Queries:
    """Packed rows at their tokens, 0 elsewhere. Slots and tokens name each other, so the transpose is another gather,
    and not a sum."""
    return _rows_at(out, work.slot)


def _rows_at(x: Array, place: Array) -> Array:
    """`x[b, place[b, i]]`, 0 where there is no such place."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, place)


_unpack.defvjp(
    lambda out, work: (_unpack(out, work), work), lambda work, gradient: (_rows_at(gradient, work.order), None)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed(
    q: Queries, k: Keys, v: Values, work: WorkList, softcap: float | None = None
) -> tuple[Packed, PackedLogSumExp]:
    """softmax(q . k / sqrt(d)) v of the packed queries, and the log-sum-exp of their logits.

    Slots that are not in the list hold anything finite. Softmax in float32; the output has the dtype of q, the
    log-sum-exp is float32. Two softmaxes over disjoint keys can be merged by the latter.
    """
    batch, _, heads, dim = q.shape
    kv_heads = k.shape[2]
    keys, values = layout.head_major(k), layout.head_major(v)
    like = jnp.zeros_like(q[:, :1], shape=(batch, work.order.shape[1], heads, dim))
    buffers = like, jnp.zeros_like(like[..., 0], jnp.float32)
    for m, blocks in enumerate(work.blocks):
        tile = work.sizes[m].tile

        def visit(n, buffers, m=m, blocks=blocks, tile=tile):
            rows = _rows(work, m, n)
            query = _gather(q, rows, kv_heads) * dim**-0.5

            def meet(j, whole, carry):
                start = _tile_start(j, tile, keys.shape[2])
                key, value = (_cut(x, rows.row, start, tile) for x in (keys, values))
                logits = layout.capped(dot("grqd,gkd->grqk", query, key), softcap)
                if not whole:
                    logits = jnp.where(_allowed(rows, j, start, tile)[None, None], logits, MASKED)
                return layout.online_softmax(carry, logits, value, "grqk,gkd->grqd")

            zeros = jnp.zeros_like(query, jnp.float32)
            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            start = zeros[..., 0] + MASKED / 2, zeros[..., 0], zeros
            top, total, acc = _walk(blocks, n, bool(work.reaches[m].sinks), meet, start)
            out, lse = acc / total[..., None], top + jnp.log(total)
            return _put(buffers[0], rows, out), _put(buffers[1], rows, lse)

        buffers = jax.lax.fori_loop(0, blocks.count, visit, buffers)
    return buffers


def _attend_forward(q, k, v, work, softcap):
    out, lse = packed(q, k, v, work, softcap)
    return (out, lse), (q, k, v, work, out, lse)


def _attend_backward(softcap, saved, cotangents):
    """With P = softmax, L = log-sum-exp: dV = P^T dO, dS = P (dO V^T - sum_d dO O + dL), dQ = dS K, dK = dS^T Q.

    Tiles are made transposed, keys by queries: four of the five products then contract the last axis of their left
    side, which is the faster way round on CPU.
    """
    q, k, v, work, out, lse = saved
    d_out, d_lse = cotangents
    kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    keys, values = layout.head_major(k), layout.head_major(v)
    buffers = jnp.zeros_like(q), *(jnp.zeros_like(x, jnp.float32) for x in (keys, values))
    for m, blocks in enumerate(work.blocks):
        block, tile = work.sizes[m]

        def visit(n, buffers, m=m, blocks=blocks, block=block, tile=tile):
            dq, dk, dv = buffers
            rows = _rows(work, m, n)
            query = _gather(q, rows, kv_heads) * scale
            g, output, top, d_top = (_slots(x, rows, kv_heads) for x in (d_out, out, lse, d_lse))
            # An infinite log-sum-exp makes every weight of a slot that fills the block 0.
            top = jnp.where(rows.valid, top, jnp.inf)[:, None]
            mean = (g.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
            mean = jnp.where(rows.valid, mean - d_top, 0.0)[:, None]
            # Heads that share a key stand side by side: the sum over them is part of the product.
            flat = lambda x: x.reshape(kv_heads, -1, x.shape[-1])  # noqa: E731
            query, g = flat(query), flat(jnp.where(rows.valid[:, None], g, 0))
            top, mean = (x.reshape(kv_heads, 1, -1) for x in (top, mean))
            group = query.shape[1] // block

            def meet(j, whole, carry):
                dq, dk, dv = carry
                start = _tile_start(j, tile, keys.shape[2])
                key, value = (_cut(x, rows.row, start, tile) for x in (keys, values))
                logits = layout.capped(dot("gkd,gqd->gkq", key, query), softcap)
                if not whole:
                    allowed = jnp.tile(_allowed(rows, j, start, tile).T, (1, group))[None]
                    logits = jnp.where(allowed, logits, MASKED)
                weights = jnp.exp(logits - top)
                d_logits = weights * (dot("gkd,gqd->gkq", value, g) - mean) * layout.capped_slope(logits, softcap)
                dq = dq + dot("gkq,gkd->gqd", d_logits, key)
                dk = _add(dk, rows.row, start, dot("gkq,gqd->gkd", d_logits, query))
                dv = _add(dv, rows.row, start, dot("gkq,gqd->gkd", weights, g))
                return dq, dk, dv

            start = jnp.zeros_like(query, jnp.float32), dk, dv
            mine, dk, dv = _walk(blocks, n, bool(work.reaches[m].sinks), meet, start)
            mine = mine.reshape(kv_heads, group, block, -1) * scale
            return _scatter(dq, rows, mine), dk, dv

        buffers = jax.lax.fori_loop(0, blocks.count, visit, buffers)
    dq, dk, dv = buffers
    dk, dv = (layout.head_major(d).astype(x.dtype) for d, x in ((dk, k), (dv, v)))
    return dq, dk, dv, None


packed.defvjp(_attend_forward, _attend_backward)


class _Rows(NamedTuple):
    """One block of packed queries."""

    row: Int[Array, ""]  # Its sequence.
    slot: Int[Array, ""]  # Its first slot.
    order: Int[Array, "block"]  # Of the work list; no position of the sequence where a slot fills the block.
    valid: Bool[Array, "block"]  # Which slots do not.
    first: Int[Array, "block"]  # Keys of the windows.
    last: Int[Array, "block"]
    # (first, last) of the sinks, the last excluded; None without any.
    sinks: tuple[Int[Array, "block"], Int[Array, "block"]] | None


def _rows(work: WorkList, m: int, n: Int[Array, ""]) -> _Rows:
    """Block n of mechanism m."""
    row, slot = work.blocks[m].row[n], work.blocks[m].slot[n]

    def cut(x: Int[Array, "batch slots"]) -> Int[Array, "block"]:
        return jax.lax.dynamic_slice(x, (row, slot), (1, work.sizes[m].block))[0]

    order = cut(work.order)
    sinks = (cut(work.sink_first), cut(work.sink_last)) if work.reaches[m].sinks else None
    return _Rows(row, slot, order, order < work.slot.shape[1], cut(work.first), cut(work.last), sinks)


def _walk(blocks: Blocks, n: Int[Array, ""], sinks: bool, meet, carry):
    """meet(tile index, whole, carry) for every tile of block n: those that need no mask, then the others, then those of
    the sinks."""
    low, whole, whole_end = blocks.low[n], blocks.whole[n], blocks.whole_end[n]
    steps = blocks.high[n] - low - (whole_end - whole)

    def edge(step, carry):
        j = low + step
        return meet(jnp.where(j >= whole, j + whole_end - whole, j), False, carry)

    carry = jax.lax.fori_loop(whole, whole_end, lambda j, carry: meet(j, True, carry), carry)
    carry = jax.lax.fori_loop(0, steps, edge, carry)
    if not sinks:
        return carry
    return jax.lax.fori_loop(blocks.sink_low[n], blocks.sink_high[n], lambda j, carry: meet(j, False, carry), carry)


def _tile_start(j: Int[Array, ""], tile: int, time: int) -> Int[Array, ""]:
    """First key of tile j; the last tile is moved inwards."""
    return jnp.minimum(j * tile, time - tile)


def _allowed(rows: _Rows, j: Int[Array, ""], start: Int[Array, ""], tile: int) -> Bool[Array, "block tile"]:
    """Keys within reach of each query, and new: not of the tile before, where this one overlaps it."""
    keys = (start + jnp.arange(tile, dtype=jnp.int32))[None, :]
    allowed = (rows.first[:, None] <= keys) & (keys <= rows.last[:, None])
    if rows.sinks is not None:
        first, last = rows.sinks
        allowed |= (first[:, None] <= keys) & (keys < last[:, None])
    return allowed & (keys >= j * tile)


def _gather(x: Queries, rows: _Rows, kv_heads: int) -> Float[Array, "kv_heads group block dim"]:
    """The block's queries, head-major."""
    time = x.shape[1]
    x = x[rows.row, jnp.where(rows.valid, rows.order, rows.order - time)]
    block, heads, dim = x.shape
    return x.reshape(block, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)


def _slots(x: Array, rows: _Rows, kv_heads: int) -> Float[Array, "kv_heads group block ..."]:
    """The block's slots of `[B, S, H, ...]`, head-major."""
    start = (rows.row, rows.slot, *[_ZERO] * (x.ndim - 2))
    x = jax.lax.dynamic_slice(x, start, (1, rows.order.shape[0], *x.shape[2:]))[0]
    x = x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])
    return jnp.moveaxis(x, 0, 2)


def _put(buffer: Array, rows: _Rows, x: Array) -> Array:
    """Writes the block's slots of `[B, S, H, ...]` from `[G, r, block, ...]`."""
    x = jnp.moveaxis(x, 2, 0)
    x = x.reshape(1, x.shape[0], -1, *x.shape[3:]).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, x, (rows.row, rows.slot, *[_ZERO] * (x.ndim - 2)))


def _scatter(buffer: Array, rows: _Rows, x: Array) -> Array:
    """Writes the block's queries, `[G, r, block, d]`, to their places in `[B, T, H, d]`."""
    x = jnp.moveaxis(x, 2, 0)
    x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(buffer.dtype)
    return buffer.at[rows.row, rows.order].set(x, mode="drop", unique_indices=True)


def _cut(x: Array, row: Int[Array, ""], start: Int[Array, ""], tile: int) -> Array:
    """`[G, tile, d]` of `[B, G, T, d]`."""
    return jax.lax.dynamic_slice(x, (row, _ZERO, start, _ZERO), (1, x.shape[1], tile, x.shape[3]))[0]


def _add(buffer: Array, row: Int[Array, ""], start: Int[Array, ""], x: Array) -> Array:
    part = _cut(buffer, row, start, x.shape[1]) + x
    return jax.lax.dynamic_update_slice(buffer, part[None], (row, _ZERO, start, _ZERO))
