"""Softmax attention of chosen queries only: exact, nothing dropped, work as sparse as the choice.

The chosen queries of every sequence are packed in order of position, in blocks; the last block of a
sequence is filled up. A loop visits the blocks that exist, and for each of them the tiles of keys
that one of its queries may see: its own segments, up to the last query of the block, and no further
back than the window. Trip counts follow the data while all shapes are static, so a batch pays for
the sum of its sequences, and a sequence without a chosen query pays nothing. The backward pass walks
the same tiles; its memory is linear in time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.mechanisms import blocks, masks, work
from meta_attention_jax.mechanisms.blockwise import dot
from meta_attention_jax.mechanisms.work import Work
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

LogSumExp = Float[Array, "batch time heads"]

_ZERO = np.int32(0)  # Indices of one slice share a dtype, whatever the default integer is.


class Plan(NamedTuple):
    """Which blocks of packed queries there are, and which keys each may see.

    Attributes:
      order: positions of each sequence, the chosen ones first, each group in order.
      count: chosen queries of each sequence.
      ends: number of blocks of all sequences up to and including this one.
      first, last: of every token, the first and the last position that it may see.
    """

    order: Int[Array, "batch padded_time"]
    count: Int[Array, "batch"]
    ends: Int[Array, "batch"]
    first: Int[Array, "batch time"]
    last: Int[Array, "batch time"]


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    chosen: Bool[Array, "batch time"],
    base: Queries,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int | None = None,
    block: int = 128,
    tile: int = 128,
) -> Queries:
    """`base`, with softmax attention written over the rows of the chosen tokens.

    Equal to where(chosen, softmax(q . k / sqrt(d)) v, base) over the pairs allowed by direction,
    window and segments, in work proportional to the chosen rows and to the keys they may see.

    Args:
      q: `[B, T, H, d]`.
      k, v: `[B, T, G, d]`, G a divisor of H.
      chosen: the queries to serve; padding (segment id 0) is never served.
      base: what the other rows keep, like q.
      segment_ids: `[B, T]`, 0 is padding; None for one segment.
      causal: False attends to both sides.
      window: keys seen to one side, the token itself included; None for no bound.
      block: queries of a block.
      tile: keys that a block meets at once.
    """
    blocks.validate_qkv(q, k, v, segment_ids, window)
    if blocks.is_empty(q):
        return base
    tile = min(tile, q.shape[1])
    if segment_ids is not None:
        chosen = chosen & (segment_ids != 0)
    plan = _plan(chosen, segment_ids, causal, window, block)
    return _attend(q, k, v, base, chosen, plan, block, tile)


def count_pairs(
    chosen: Bool[Array, "batch time"],
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int | None = None,
    block: int = 128,
    tile: int = 128,
) -> Float[Array, ""]:
    """Query-key pairs that `attend` computes for these choices, the filling of blocks included."""
    tile = min(tile, chosen.shape[1])
    if segment_ids is not None:
        chosen = chosen & (segment_ids != 0)
    plan = _plan(chosen, segment_ids, causal, window, block)

    def visit(n, pairs):
        steps = _tiles(_rows(plan, n, block), tile).steps
        return pairs + steps.astype(jnp.float32) * (block * tile)

    zero = jnp.zeros_like(plan.ends[-1], jnp.float32)
    return jax.lax.fori_loop(0, plan.ends[-1], visit, zero)


def count_work(
    q: Queries,
    k: Keys,
    chosen: Bool[Array, "batch time"],
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int | None = None,
    block: int = 128,
    tile: int = 128,
) -> Work:
    """What `attend` spends on these choices, forward; q and k may be abstract."""
    pairs = count_pairs(
        chosen, segment_ids=segment_ids, causal=causal, window=window, block=block, tile=tile
    )
    tile = min(tile, chosen.shape[1])
    if segment_ids is not None:
        chosen = chosen & (segment_ids != 0)
    count = chosen.sum(axis=1, dtype=jnp.int32)
    return work.of_tiles(
        q, k, blocks=(-(-count // block)).sum(), tiles=pairs / (block * tile), rows=count.sum(),
        block=block, tile=tile,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(
    q: Queries,
    k: Keys,
    v: Values,
    base: Queries,
    chosen: Bool[Array, "batch time"],
    plan: Plan,
    block: int,
    tile: int,
) -> Queries:
    return _forward(q, k, v, base, plan, block, tile)[0]


def _forward(
    q: Queries,
    k: Keys,
    v: Values,
    base: Queries,
    plan: Plan,
    block: int,
    tile: int,
) -> tuple[Queries, LogSumExp]:
    """Output, and the log-sum-exp of the chosen rows."""
    k, v = blocks.head_major(k), blocks.head_major(v)

    def visit(n, buffers):
        rows = _rows(plan, n, block)
        query = _gather(q, rows, k.shape[1]) * _scale(q)

        def meet(j, whole, carry):
            top, total, out = carry
            start = _tile_start(j, tile, k.shape[2])
            key, value = (_cut(x, rows.row, start, tile) for x in (k, v))
            logits = dot("grqd,gkd->grqk", query, key)
            if not whole:
                allowed = _allowed(rows, j, start, tile)[None, None]
                logits = jnp.where(allowed, logits, masks.MASKED)
            higher = jnp.maximum(top, logits.max(-1))
            weights, decay = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            total = total * decay + weights.sum(-1)
            out = out * decay[..., None] + dot("grqk,gkd->grqd", weights, value)
            return higher, total, out

        zeros = jnp.zeros_like(query, jnp.float32)
        # Far above MASKED: the weight of a masked key is exactly 0 before a row meets its first key.
        empty = zeros[..., 0] + masks.MASKED / 2
        top, total, out = _walk(_tiles(rows, tile), meet, (empty, zeros[..., 0], zeros))
        out, lse = out / total[..., None], top + jnp.log(total)
        return _scatter(buffers[0], rows, out), _scatter(buffers[1], rows, lse)

    buffers = base, jnp.zeros_like(q[..., 0], jnp.float32)
    return jax.lax.fori_loop(0, plan.ends[-1], visit, buffers)


def _attend_forward(q, k, v, base, chosen, plan, block, tile):
    out, lse = _forward(q, k, v, base, plan, block, tile)
    return out, (q, k, v, chosen, plan, out, lse)


def _attend_backward(block, tile, saved, gradient):
    """With P = softmax: dV = P^T dO, dS = P (dO V^T - sum_d dO O), dQ = dS K, dK = dS^T Q.

    Tiles are made transposed, keys by queries: four of the five products then contract the last axis
    of their left side, which is the faster way round on CPU.
    """
    q, k, v, chosen, plan, out, lse = saved
    kv_heads = k.shape[2]
    k, v = blocks.head_major(k), blocks.head_major(v)

    def visit(n, buffers):
        dq, dk, dv = buffers
        rows = _rows(plan, n, block)
        query, g, output = (_gather(x, rows, kv_heads) for x in (q, gradient, out))
        query = query * _scale(q)
        top = _gather(lse[..., None], rows, kv_heads)[..., 0]
        # An infinite log-sum-exp makes every weight of a row that fills the block 0.
        top = jnp.where(rows.valid, top, jnp.inf)[:, None]
        mean = (g.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)[:, None]
        # Heads that share a key stand side by side: the sum over them is part of the product.
        flat = lambda x: x.reshape(kv_heads, -1, x.shape[-1])  # noqa: E731
        query, g = flat(query), flat(g)
        top, mean = (x.reshape(kv_heads, 1, -1) for x in (top, mean))
        group = query.shape[1] // block

        def meet(j, whole, carry):
            dq, dk, dv = carry
            start = _tile_start(j, tile, k.shape[2])
            key, value = (_cut(x, rows.row, start, tile) for x in (k, v))
            logits = dot("gkd,gqd->gkq", key, query)
            if not whole:
                allowed = jnp.tile(_allowed(rows, j, start, tile).T, (1, group))[None]
                logits = jnp.where(allowed, logits, masks.MASKED)
            weights = jnp.exp(logits - top)
            d_logits = weights * (dot("gkd,gqd->gkq", value, g) - mean)
            dq = dq + dot("gkq,gkd->gqd", d_logits, key)
            dk = _add(dk, rows.row, start, dot("gkq,gqd->gkd", d_logits, query))
            dv = _add(dv, rows.row, start, dot("gkq,gqd->gkd", weights, g))
            return dq, dk, dv

        start = jnp.zeros_like(query, jnp.float32), dk, dv
        block_dq, dk, dv = _walk(_tiles(rows, tile), meet, start)
        block_dq = block_dq.reshape(kv_heads, group, block, -1) * _scale(q)
        return _scatter(dq, rows, block_dq), dk, dv

    buffers = jnp.zeros_like(q), *(jnp.zeros_like(x, jnp.float32) for x in (k, v))
    dq, dk, dv = jax.lax.fori_loop(0, plan.ends[-1], visit, buffers)
    dk, dv = (blocks.head_major(d).astype(x.dtype) for d, x in ((dk, k), (dv, v)))
    d_base = jnp.where(chosen[..., None, None], jnp.zeros_like(gradient), gradient)
    return dq, dk, dv, d_base, None, None


_attend.defvjp(_attend_forward, _attend_backward)


class _Rows(NamedTuple):
    """One block of packed queries: its sequence, their positions, which of them are real, and the
    first and the last key that each may see."""

    row: Int[Array, ""]
    position: Int[Array, "block"]
    valid: Bool[Array, "block"]
    first: Int[Array, "block"]
    last: Int[Array, "block"]


class _Tiles(NamedTuple):
    """Tiles of keys that a block meets: `steps` from `low` on, and among them `[whole, whole_end)`,
    in which every query of the block sees every key."""

    low: Int[Array, ""]
    steps: Int[Array, ""]
    whole: Int[Array, ""]
    whole_end: Int[Array, ""]


def _plan(
    chosen: Bool[Array, "batch time"],
    segments: SegmentIds | None,
    causal: bool,
    window: int | None,
    block: int,
) -> Plan:
    batch, time = chosen.shape
    window = None if window is None else min(window, time)
    index = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (batch, time))
    first, last = jnp.zeros_like(index), jnp.full_like(index, time - 1)
    if segments is not None:
        change = segments[:, 1:] != segments[:, :-1]
        edge = jnp.ones_like(change[:, :1], shape=(batch, 1))
        starts = jnp.where(jnp.concatenate([edge, change], 1), index, 0)
        ends = jnp.where(jnp.concatenate([change, edge], 1), index, time - 1)
        first = jax.lax.cummax(starts, axis=1)
        last = jax.lax.cummin(ends, axis=1, reverse=True)
    if causal:
        last = index
    if window is not None:
        first = jnp.maximum(first, index - (window - 1))
        last = jnp.minimum(last, index + (window - 1))
    # Chosen tokens first, each group in order: a sort without a comparison of equal keys.
    place = jnp.where(chosen, index, index + time)
    order = jnp.argsort(place, axis=1).astype(jnp.int32)
    order = blocks.pad_time(order, 1, after=-time % block)
    count = chosen.sum(axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(-(-count // block), dtype=jnp.int32)
    return Plan(order, count, ends, first, last)


def _rows(plan: Plan, n: Int[Array, ""], block: int) -> _Rows:
    """Block n. Rows that fill it up repeat its first query, and are valid nowhere."""
    if isinstance(plan.ends.shape[0], int):
        row = jnp.searchsorted(plan.ends, n, side="right").astype(jnp.int32)
    else:  # Halving needs a number, and a batch can be a symbol (`jax.export`).
        row = (plan.ends <= n).sum(dtype=jnp.int32)
    before = jnp.where(row > 0, plan.ends[jnp.maximum(row - 1, 0)], 0)
    start = (n - before) * block
    position = jax.lax.dynamic_slice(plan.order, (row, start), (1, block))[0]
    valid = start + jnp.arange(block, dtype=jnp.int32) < plan.count[row]
    position = jnp.where(valid, position, position[0])
    return _Rows(row, position, valid, plan.first[row, position], plan.last[row, position])


def _tiles(rows: _Rows, tile: int) -> _Tiles:
    low, high = rows.first.min() // tile, rows.last.max() // tile + 1
    whole = jnp.minimum(-(-rows.first.max() // tile), high)
    whole_end = jnp.maximum((rows.last.min() + 1) // tile, whole)
    return _Tiles(low, high - low, whole, whole_end)


def _walk(tiles: _Tiles, meet, carry):
    """meet(tile index, whole, carry) for every tile: those that need no mask, then the others."""
    low, steps, whole, whole_end = tiles

    def edge(step, carry):
        j = low + step
        return meet(jnp.where(j >= whole, j + whole_end - whole, j), False, carry)

    carry = jax.lax.fori_loop(whole, whole_end, lambda j, carry: meet(j, True, carry), carry)
    return jax.lax.fori_loop(0, steps - (whole_end - whole), edge, carry)


def _tile_start(j: Int[Array, ""], tile: int, time: int) -> Int[Array, ""]:
    """First key of tile j; the last tile is moved inwards."""
    return jnp.minimum(j * tile, time - tile)


def _allowed(
    rows: _Rows, j: Int[Array, ""], start: Int[Array, ""], tile: int
) -> Bool[Array, "block tile"]:
    """Keys within reach of each query, and new: not of the tile before, where this one overlaps it."""
    keys = (start + jnp.arange(tile, dtype=jnp.int32))[None, :]
    low = jnp.maximum(rows.first, j * tile)
    return (low[:, None] <= keys) & (keys <= rows.last[:, None])


def _scale(q: Queries) -> float:
    return q.shape[-1] ** -0.5


def _gather(x: Array, rows: _Rows, kv_heads: int) -> Float[Array, "kv_heads group block dim"]:
    """The block's rows of `[B, T, H, d]`, head-major."""
    x = x[rows.row, rows.position]
    block, heads, dim = x.shape
    return x.reshape(block, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)


def _scatter(buffer: Array, rows: _Rows, x: Array) -> Array:
    """Writes the block's real rows, `[G, r, block, ...]`, to their places in `[B, T, H, ...]`."""
    x = jnp.moveaxis(x, 2, 0)
    x = x.reshape(x.shape[0], -1, *x.shape[3:]).astype(buffer.dtype)
    place = jnp.where(rows.valid, rows.position, buffer.shape[1])
    return buffer.at[rows.row, place].set(x, mode="drop")


def _cut(x: Array, row: Int[Array, ""], start: Int[Array, ""], tile: int) -> Array:
    """`[G, tile, d]` of `[B, G, T, d]`."""
    return jax.lax.dynamic_slice(
        x, (row, _ZERO, start, _ZERO), (1, x.shape[1], tile, x.shape[3])
    )[0]


def _add(buffer: Array, row: Int[Array, ""], start: Int[Array, ""], x: Array) -> Array:
    part = _cut(buffer, row, start, x.shape[1]) + x
    return jax.lax.dynamic_update_slice(buffer, part[None], (row, _ZERO, start, _ZERO))
