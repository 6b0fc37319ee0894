"""Softmax attention by blocks, for the whole past or a window; memory linear in time.

The square of logits is cut into tiles of block x block. For each block of queries an online softmax (Milakov &
Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) visits the tiles that a query of the block may see, the
diagonal tile first; tiles above the diagonal or outside the window are never computed. The backward pass keeps only the
log-sum-exp of every row and recomputes the tiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meta_attention_jax.mechanisms import blocks, spent
from meta_attention_jax.mechanisms.blocks import dot
from meta_attention_jax.mechanisms.spent import AttentionCost
from meta_attention_jax.types import Abstract, Keys, Queries, SegmentIds, Values

GroupedQueries = Float[Array, "batch kv_heads group time dim"]
GroupedKeys = Float[Array, "batch kv_heads time dim"]
LogSumExp = Float[Array, "batch kv_heads group time"]

# The time axis of queries and of keys in the grouped layouts above.
_QUERY_TIME, _KEY_TIME = 3, 2


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    segment_ids: SegmentIds | None,
    causal: bool,
    window: int | None,
    block: int,
    softcap: float | None = None,
) -> tuple[Queries, Float[Array, "batch time heads"]]:
    """softmax(q . k / sqrt(d)) v over the pairs allowed by direction, window and segments, and the log-sum-exp of their
    logits, float32: infinite at padding. Both have gradients.

    Causal: s in [t - window + 1, t], else |s - t| < window, by index in the array; arguments are validated. `block`,
    the edge of a tile, is lowered so that the padding of T stays below the number of blocks.
    """
    if blocks.is_empty(q):
        return jnp.zeros_like(q), jnp.zeros_like(q[..., 0], jnp.float32)
    time = q.shape[1]
    count, block = _edges(time, block)
    tail = count * block - time
    if tail and not causal:
        # Without ids, nothing but the causal order would hide the padded keys.
        segment_ids = blocks.default_segments(q, segment_ids)
    if segment_ids is not None:
        segment_ids = blocks.pad_time(segment_ids, 1, after=tail)
    out, lse = _attend(
        blocks.pad_time(blocks.group_queries(q, k.shape[2]), _QUERY_TIME, after=tail),
        blocks.pad_time(blocks.head_major(k), _KEY_TIME, after=tail),
        blocks.pad_time(blocks.head_major(v), _KEY_TIME, after=tail),
        segment_ids,
        causal,
        window,
        block,
        softcap,
    )
    out, lse = (blocks.ungroup_queries(x[:, :, :, :time]) for x in (out, lse[..., None]))
    return out, lse[..., 0]


def count_work(q: Abstract, k: Abstract, *, causal: bool, window: int | None, block: int) -> AttentionCost:
    """What `attend` spends, forward: every tile it visits, padding and all; blind to segments."""
    batch, time = q.shape[:2]
    count, block = _edges(time, block)
    reach = _reach(count, window, block)
    tiles = sum(1 + min(i + (0 if causal else reach), count - 1) - max(i - reach, 0) for i in range(count))
    return spent.of_tiles(
        q, k, blocks=batch * count, tiles=batch * tiles, rows=batch * count * block, block=block, tile=block
    )


def _edges(time: int, block: int) -> tuple[int, int]:
    """How many blocks there are, and the edge of one, lowered to what they need."""
    count = -(-time // block)
    return count, -(-time // count)


def _forward(
    q: GroupedQueries,
    k: GroupedKeys,
    v: GroupedKeys,
    segments: SegmentIds | None,
    causal: bool,
    window: int | None,
    block: int,
    softcap: float | None,
) -> tuple[GroupedQueries, LogSumExp]:
    count = q.shape[_QUERY_TIME] // block
    reach = _reach(count, window, block)

    def row(i):
        query = _block(q, i, block, _QUERY_TIME)

        def tile(j, diagonal):
            key, value = _block(k, j, block, _KEY_TIME), _block(v, j, block, _KEY_TIME)
            return _logits(query, key, segments, i, j, causal, window, softcap, diagonal), value

        logits, value = tile(i, diagonal=True)
        m = logits.max(-1)
        weights = jnp.exp(logits - m[..., None])
        start = m, weights.sum(-1), dot("bgrqk,bgkd->bgrqd", weights, value)

        def visit(step, carry):
            logits, value = tile(_neighbour(i, first, step), diagonal=False)
            return blocks.online_softmax(carry, logits, value, "bgrqk,bgkd->bgrqd")

        first, steps = _neighbours(i, count, reach, 0 if causal else reach)
        m, total, acc = jax.lax.fori_loop(0, steps, visit, start)
        out, lse = acc / total[..., None], m + jnp.log(total)
        if segments is not None:
            valid = (_block(segments, i, block, 1) != 0)[:, None, None]
            # An infinite log-sum-exp makes every weight of a padded row 0 in the backward pass.
            out, lse = jnp.where(valid[..., None], out, 0.0), jnp.where(valid, lse, jnp.inf)
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(row, jnp.arange(count))
    return _join(out, _QUERY_TIME), _join(lse, _QUERY_TIME)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(4, 5, 6, 7))


def _attend_forward(q, k, v, segments, causal, window, block, softcap):
    out, lse = _forward(q, k, v, segments, causal, window, block, softcap)  # So that a gradient has one forwards.
    return (out, lse), (q, k, v, segments, out, lse)


def _attend_backward(causal, window, block, softcap, saved, cotangents):
    """With P = softmax, L = log-sum-exp: dV = P^T dO, dP = dO V^T, dS = P (dP - sum_d dO O + dL), dQ = dS K, dK = dS^T
    Q."""
    gradient, d_lse = cotangents
    q, k, v, segments, out, lse = saved
    count = q.shape[_QUERY_TIME] // block
    reach = _reach(count, window, block)
    shift = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse

    def column(dq, j):
        key, value = _block(k, j, block, _KEY_TIME), _block(v, j, block, _KEY_TIME)

        def tile(dq, i, diagonal):
            query, g, top, mean = (_block(x, i, block, _QUERY_TIME) for x in (q, gradient, lse, shift))
            logits = _logits(query, key, segments, i, j, causal, window, softcap, diagonal)
            weights = jnp.exp(logits - top[..., None])
            d_weights = dot("bgrqd,bgkd->bgrqk", g, value)
            d_logits = weights * (d_weights - mean[..., None]) * _scale(q) * blocks.capped_slope(logits, softcap)
            dv = dot("bgrqk,bgrqd->bgkd", weights, g)
            dk = dot("bgrqk,bgrqd->bgkd", d_logits, query)
            part = dot("bgrqk,bgkd->bgrqd", d_logits, key)
            part += _block(dq, i, block, _QUERY_TIME)
            return jax.lax.dynamic_update_slice_in_dim(dq, part, i * block, _QUERY_TIME), dk, dv

        def visit(step, carry):
            dq, dk, dv = carry
            dq, more_k, more_v = tile(dq, _neighbour(j, first, step), diagonal=False)
            return dq, dk + more_k, dv + more_v

        first, steps = _neighbours(j, count, 0 if causal else reach, reach)
        dq, dk, dv = jax.lax.fori_loop(0, steps, visit, tile(dq, j, diagonal=True))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(column, jnp.zeros_like(q, jnp.float32), jnp.arange(count))
    return dq.astype(q.dtype), _join(dk, _KEY_TIME), _join(dv, _KEY_TIME), None


_attend.defvjp(_attend_forward, _attend_backward)


def _reach(count: int, window: int | None, block: int) -> int:
    """How many blocks away from the diagonal a window extends."""
    return count - 1 if window is None else min(count - 1, -(-(window - 1) // block))


def _neighbours(i: Int[Array, ""], count: int, before: int, after: int):
    """First block within reach of block i, and how many there are besides i itself."""
    first = jnp.maximum(i - before, 0)
    return first, jnp.minimum(i + after, count - 1) - first


def _neighbour(i: Int[Array, ""], first: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
    """Block number `step` from `first` on, block i left out."""
    j = first + step
    return jnp.where(j >= i, j + 1, j)


def _block(x: Array, i: Int[Array, ""], block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _join(x: Array, axis: int) -> Array:
    """Blocks stacked by a loop, `[count, ...]`, back on their time axis."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _scale(q: GroupedQueries) -> float:
    return q.shape[-1] ** -0.5


def _logits(
    query: Float[Array, "batch kv_heads group q dim"],
    key: Float[Array, "batch kv_heads k dim"],
    segments: SegmentIds | None,
    i: Int[Array, ""],
    j: Int[Array, ""],
    causal: bool,
    window: int | None,
    softcap: float | None,
    diagonal: bool,
) -> Float[Array, "batch kv_heads group q k"]:
    """Scaled, masked logits of tile (i, j); only the masks that this tile can need are made."""
    block = query.shape[_QUERY_TIME]
    logits = blocks.capped(dot("bgrqd,bgkd->bgrqk", query, key) * _scale(query), softcap)
    index = jnp.arange(block)
    allowed = None
    if window is not None or (causal and diagonal):
        shift = 0 if diagonal else (i - j) * block
        allowed = blocks.band(index + shift, index, causal=causal, window=window)[None]
    if segments is not None:
        same = blocks.same_segment(_block(segments, i, block, 1), _block(segments, j, block, 1))
        allowed = same if allowed is None else same & allowed
    if allowed is None:
        return logits
    return jnp.where(allowed[:, None, None], logits, blocks.MASKED)
