"""Sliding-window softmax attention: every token attends to its last `window` tokens."""

from __future__ import annotations

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from meta_attention_jax.mechanisms import blocks, cache, decode, flash, spent
from meta_attention_jax.mechanisms.blocks import dot
from meta_attention_jax.mechanisms.mechanism import Mechanism, Reach
from meta_attention_jax.types import Abstract, AttentionSpec, Keys, Queries, SegmentIds, Values, positions_in_segment

BLOCK = 64
"""Edge of a tile of all tokens."""


def attend(q: Queries, k: Keys, v: Values, *, spec: AttentionSpec, segment_ids: Optional[SegmentIds] = None) -> Queries:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over s in [t - window + 1, t] of the segment, and over its first
    `sinks` tokens; arguments and result as `Mechanism.attend`.

    Bidirectional: |s - t| < window. Distances are by index in the array. Softmax in float32. Time and memory, gradients
    included, are O(T (window + sinks)); a window of T or more gives full attention.
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    out, lse = flash.attend(q, k, v, segment_ids=segment_ids, causal=spec.causal, window=spec.width, block=BLOCK,
                            softcap=spec.softcap)
    if not spec.sinks or blocks.is_empty(q):
        return out
    segments = blocks.default_segments(q, segment_ids)
    sink_out, sink_lse = _sinks(q, k, v, segments, spec)
    # Two softmaxes over disjoint keys, as one.
    lse = jnp.where(segments[..., None] != 0, lse, 0.0)
    total = jnp.logaddexp(lse, sink_lse)
    merged = (
        out.astype(jnp.float32) * jnp.exp(lse - total)[..., None] + sink_out * jnp.exp(sink_lse - total)[..., None]
    )
    return jnp.where(segments[..., None, None] != 0, merged, 0.0).astype(q.dtype)


def _sinks(
    q: Queries, k: Keys, v: Values, segments: SegmentIds, spec: AttentionSpec
) -> tuple[Float[Array, "batch time heads dim"], Float[Array, "batch time heads"]]:
    """Attention to the sinks outside of the window, and its log-sum-exp; float32."""
    batch, time, heads, dim = q.shape
    index = jnp.arange(time, dtype=jnp.int32)[None]
    start = index - positions_in_segment(segments)
    place = start[..., None] + jnp.arange(min(spec.sinks, time), dtype=jnp.int32)[None, None]
    key_at = jnp.minimum(place, time - 1)
    distance = index[..., None] - place
    outside = distance >= spec.width if spec.causal else jnp.abs(distance) >= spec.width
    pick = jax.vmap(lambda x, at: x[at])  # [T, ...] at [T, sinks]
    seen = outside & (place < time) & (pick(segments, key_at) == segments[..., None])
    keys, values, axes = pick(k, key_at), pick(v, key_at), "btsgd"
    if spec.segments != "any":  # Every row's segment starts where the row does: no copy for every token.
        keys, values, axes = k[:, : spec.sinks], v[:, : spec.sinks], "bsgd"
    query = q.reshape(batch, time, k.shape[2], -1, dim)
    logits = blocks.capped(dot(f"btgrd,{axes}->btgrs", query, keys) * dim**-0.5, spec.softcap)
    logits = jnp.where(seen[:, :, None, None], logits, blocks.MASKED)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = dot(f"btgrs,{axes}->btgrd", jnp.exp(logits - lse[..., None]), values)
    return out.reshape(batch, time, heads, dim), lse.reshape(batch, time, heads)


def step(
    q: cache.StepQuery, held: cache.Cache, layer: cache.Layer, *, needed: Bool[Array, "batch"], spec: AttentionSpec
) -> cache.StepQuery:
    """`full.step` over the last min(window, length) keys of a row and its first `sinks`; reads as many."""
    length, capacity = held.length[layer], held.capacity
    width, sinks = min(spec.width, capacity), min(spec.sinks, capacity)
    if kernel := decode.kernel_for(spec.kernel, q, held.v):
        last = jnp.where(needed, length, 0)
        first = jnp.maximum(last - width, 0)
        return kernel.attend(q, held.k, held.v, layer, first, last, jnp.minimum(first, sinks), spec.softcap)
    offset = jnp.arange(width, dtype=jnp.int32)

    def attend(query, row):
        first = jnp.clip(length[row] - width, 0, capacity - width)
        key, value = (cache.read(x, layer, row, first, width) for x in (held.k, held.v))
        seen = first + offset < length[row]
        if sinks:
            early = [cache.read(x, layer, row, 0, sinks) for x in (held.k, held.v)]
            key, value = (jnp.concatenate(pair, 1) for pair in zip(early, (key, value)))
            seen = jnp.concatenate([jnp.arange(sinks, dtype=jnp.int32) < first, seen])
        logits = cache.logits_of(query, key, seen, spec.softcap)
        return dot("grk,gkd->grd", jax.nn.softmax(logits, axis=-1), value)

    return cache.by_row(attend, q, held.k.shape[2], needed)


def flops(time: int, dim: int, spec: AttentionSpec) -> float:
    """4 d per pair: w T - w (w - 1) / 2 pairs causal, w = min(window, T), and the sinks outside."""
    width = min(spec.width, time)
    causal_pairs = width * time - width * (width - 1) // 2
    pairs = causal_pairs if spec.causal else 2 * causal_pairs - time
    return 4.0 * dim * (pairs + _outside(time, width, spec))


def _outside(time: int, width: int, spec: AttentionSpec) -> int:
    """Pairs of a token and a sink that is not in its window."""
    pairs = 0
    for sink in range(min(spec.sinks, time)):
        pairs += max(time - sink - width, 0)
        if not spec.causal:
            pairs += max(sink - width + 1, 0)
    return pairs


def count_work(q: Abstract, k: Abstract, spec: AttentionSpec) -> spent.AttentionCost:
    """What `attend` spends on all tokens, forward."""
    tiles = flash.count_work(q, k, causal=spec.causal, window=spec.width, block=BLOCK)
    if not spec.sinks:
        return tiles
    batch, time = q.shape[:2]
    sinks = min(spec.sinks, time)
    at_sinks = spent.of_tiles(q, k, blocks=batch * time, tiles=batch * time, rows=0, block=1, tile=sinks)
    return spent.AttentionCost(*(a + b for a, b in zip(tiles, at_sinks)))


def reach(spec: AttentionSpec) -> Reach:
    """The window and the sinks."""
    return Reach(spec.width, spec.sinks)


MECHANISM = Mechanism(attend, flops, cost=0.30, rotary=True, step=step, work=count_work, reach=reach)
