"""Full softmax attention: every token attends to its whole past."""

from __future__ import annotations

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from meta_attention_jax import targets
from meta_attention_jax.mechanisms import blocks, cache, decode, flash, spent
from meta_attention_jax.mechanisms.blocks import dot
from meta_attention_jax.mechanisms.mechanism import Mechanism, Reach
from meta_attention_jax.targets import Target
from meta_attention_jax.types import Abstract, AttentionSpec, Keys, Queries, SegmentIds, Values

BLOCKWISE_TIME = 256
"""Length from which "auto" prefers `blockwise`."""

CUDNN_DIM = 128
CUDNN_CAPABILITY = 8.0


def attend(q: Queries, k: Keys, v: Values, *, spec: AttentionSpec, segment_ids: Optional[SegmentIds] = None) -> Queries:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over s <= t of the segment of t; arguments and result as
    `Mechanism.attend`.

    Bidirectional: over the whole segment. Softmax in float32. `spec.implementation`: "xla" builds the T x T square;
    "blockwise" an online softmax whose memory is linear in T, gradients included; "cudnn" the fused kernel of NVIDIA
    GPUs; "auto" is `resolve_implementation`.
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    chosen = resolve_implementation(
        spec.implementation,
        time=q.shape[1],
        dtype=q.dtype,
        head_dim=q.shape[3],
        segments="one" if segment_ids is None else spec.segments,
        softcap=spec.softcap,
    )
    if blocks.is_empty(q):
        return jnp.zeros_like(q)
    if chosen == "cudnn":
        return fused(q, k, v, segment_ids if spec.segments == "padded" else None, spec.causal)
    if chosen == "xla":
        return _square(q, k, v, segment_ids, spec)
    return flash.attend(
        q, k, v, segment_ids=segment_ids, causal=spec.causal, window=None, block=_dense_block(q), softcap=spec.softcap
    )[0]


def fused(q: Queries, k: Keys, v: Values, segment_ids: Optional[SegmentIds], causal: bool) -> Queries:
    """cuDNN's kernel, for rows of one segment whose padding, if any, stands behind it."""
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    valid = segment_ids != 0
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    # Mapped where q is (a sweep shares its batch between points): the kernel's rule for vmap needs both.
    first = jax.lax.stop_gradient(q[:, 0, 0, 0])
    lengths += (jnp.isnan(first) & ~jnp.isnan(first)).astype(jnp.int32)
    # A row of nothing but padding must have a key, or its softmax is over none.
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn",
        query_seq_lengths=jnp.maximum(lengths, 1), key_value_seq_lengths=jnp.maximum(lengths, 1),
    )
    return jnp.where(valid[..., None, None], out, 0)


def step(
    q: cache.StepQuery, held: cache.Cache, layer: cache.Layer, *, needed: Bool[Array, "batch"], spec: AttentionSpec
) -> cache.StepQuery:
    """sum_s softmax_s(q . k_s / sqrt(d)) v_s over the keys of a row in the needed rows; 0 elsewhere.

    Work is proportional to the blocks in use by the needed rows, whatever the capacity and the other rows: an online
    softmax over blocks, row by row; with the kernel "pallas", all rows at once. Softmax in float32.
    """
    length = held.length[layer]
    if kernel := decode.kernel_for(spec.kernel, q, held.v):
        nothing = jnp.zeros_like(length)
        last = jnp.where(needed, length, nothing)
        return kernel.attend(q, held.k, held.v, layer, nothing, last, nothing, spec.softcap)
    block = min(cache.BLOCK, held.capacity)
    index = jnp.arange(block, dtype=jnp.int32)

    def attend(query, row):
        def visit(i, carry):
            key, value = (cache.read(x, layer, row, i * block, block) for x in (held.k, held.v))
            logits = cache.logits_of(query, key, i * block + index < length[row], spec.softcap)
            return blocks.online_softmax(carry, logits, value, "grk,gkd->grd")

        empty = jnp.full(query.shape[:2], blocks.MASKED, jnp.float32)
        start = empty, jnp.zeros(query.shape[:2], jnp.float32), jnp.zeros(query.shape, jnp.float32)
        _, total, acc = jax.lax.fori_loop(0, -(-length[row] // block), visit, start)
        return acc / total[..., None]

    return cache.by_row(attend, q, held.k.shape[2], needed)


def flops(time: int, dim: int, spec: AttentionSpec) -> float:
    """Logits and weighted sum, 4 d per pair: 2 d T (T + 1) causal, 4 d T^2 bidirectional."""
    pairs = time * (time + 1) // 2 if spec.causal else time * time
    return 4.0 * dim * pairs


def count_work(q: Abstract, k: Abstract, spec: AttentionSpec) -> spent.AttentionCost:
    """What `attend` with segment ids spends on all tokens, forward.

    "xla": all T x T pairs, keys and values read once. "blockwise": the tiles that it visits, and as many for "cudnn".
    """
    batch, time, _, dim = q.shape
    chosen = resolve_implementation(
        spec.implementation, time=time, dtype=q.dtype, head_dim=dim, segments=spec.segments, softcap=spec.softcap
    )
    if chosen == "xla":
        return spent.of_tiles(q, k, blocks=batch, tiles=batch, rows=batch * time, block=time, tile=time)
    return flash.count_work(q, k, causal=spec.causal, window=None, block=_dense_block(q))


def reach(spec: AttentionSpec) -> Reach:
    """No bound."""
    del spec
    return Reach()


def _dense_block(q: Abstract) -> int:
    """Edge of a tile of all tokens; on a 2-core CPU, tiles of all heads together should fit the last-level cache
    (measured)."""
    batch, _, heads, _ = q.shape
    # A batch that is a symbol (`jax.export`) may be large.
    return 128 if not isinstance(batch, int) or batch * heads >= 16 else 256


def resolve_implementation(
    implementation: str,
    *,
    time: int,
    dtype: Any,
    head_dim: int,
    segments: str,
    softcap: Optional[float] = None,
    target: Optional[Target] = None,
) -> str:
    """What "auto" stands for, and whether an explicit choice can be served; never a fallback. Deterministic, so that a
    training log can name it.

    "auto": `cudnn` where it can serve, else `blockwise` from BLOCKWISE_TIME tokens on, else `xla`. `segments` is "one"
    where no ids are given: cuDNN has no ids without a T x T mask, but lengths of rows whose padding stands behind.
    `target` is what is compiled for; None is `targets.current()`.
    """
    dtype = jnp.dtype(dtype)
    platform, capability = target or targets.current()
    fused = (
        platform == "gpu"
        and capability >= CUDNN_CAPABILITY
        and dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
        and head_dim <= CUDNN_DIM
        and head_dim % 8 == 0
        and time % 2 == 0  # Its backward pass refuses an odd length.
        and segments != "any"
        and softcap is None
    )
    if implementation == "cudnn" and not fused:
        raise ValueError(
            f"implementation: expected for 'cudnn' an NVIDIA GPU of compute capability "
            f"{CUDNN_CAPABILITY}, bfloat16 or float16, an even length, a head dim that is a multiple "
            f"of 8 up to {CUDNN_DIM}, one segment a row and no softcap, got {platform}, {dtype.name}, length {time}, "
            f"head dim {head_dim} and "
            f"{'any segments' if segments == 'any' else 'one segment'}, softcap {softcap}."
        )
    if implementation != "auto":
        return implementation
    if fused:
        return "cudnn"
    return "blockwise" if time >= BLOCKWISE_TIME else "xla"


def _square(q: Queries, k: Keys, v: Values, segment_ids: SegmentIds | None, spec: AttentionSpec) -> Queries:
    """The textbook form, with all T x T logits at once."""
    index = jnp.arange(q.shape[1])
    segments = blocks.default_segments(q, segment_ids)
    allowed = blocks.band(index, index, causal=spec.causal)[None] & blocks.same_segment(segments, segments)
    queries = blocks.group_queries(q, k.shape[2])
    keys, values = blocks.head_major(k), blocks.head_major(v)
    logits = blocks.capped(dot("bgrqd,bgkd->bgrqk", queries, keys) * q.shape[3] ** -0.5, spec.softcap)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, blocks.MASKED), axis=-1)
    out = dot("bgrqk,bgkd->bgrqd", weights, values)
    out = jnp.where(segments[:, None, None, :, None] != 0, out, 0.0)
    return blocks.ungroup_queries(out).astype(q.dtype)


MECHANISM = Mechanism(attend, flops, cost=1.0, rotary=True, step=step, work=count_work, reach=reach)
