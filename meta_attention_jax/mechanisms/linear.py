"""Linear (kernel) attention (Katharopoulos et al., arXiv 2006.16236), chunked, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.mechanisms import blocks, masks
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

EPSILON = 1e-6
CHUNK = 64


def feature_map(x: Array) -> Array:
    """phi(x) = ELU(x) + 1 > 0, in float32."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
) -> Queries:
    """o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + 1e-6), S_t = sum phi(k_s) v_s^T, z_t = sum phi(k_s).

    Sums run over s <= t of the segment of t, or over the whole segment when `causal` is False.
    State and products are float32. Time and memory, gradients included, are linear in T: chunks of
    tokens attend within themselves, and carry (S, z) from chunk to chunk.

    Args:
      q: `[B, T, H, d]`.
      k, v: `[B, T, G, d]`, G a divisor of H.
      segment_ids: `[B, T]`, 0 is padding (output 0); None for one segment.
      causal: False sums over both directions.

    Returns:
      `[B, T, H, d]` in the dtype of q.

    Raises:
      ValueError: shapes that do not fit (see `validate_qkv`).
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    segments = blocks.default_segments(q, segment_ids)
    numerator, denominator = _sums(q, k, v, segments, inclusive=True)
    if not causal:
        # The future of a token is the strict past of the reversed sequence.
        flipped = (jnp.flip(x, 1) for x in (q, k, v, segments))
        future = (jnp.flip(x, 1) for x in _sums(*flipped, inclusive=False))
        numerator, denominator = (x + y for x, y in zip((numerator, denominator), future))
    out = numerator / (denominator + EPSILON)[..., None]
    return jnp.where(segments[:, :, None, None] != 0, out, 0.0).astype(q.dtype)


def _sums(
    q: Queries, k: Keys, v: Values, segments: SegmentIds, *, inclusive: bool
) -> tuple[Float[Array, "batch time heads dim"], Float[Array, "batch time heads"]]:
    """phi(q_t)^T S_t and phi(q_t)^T z_t over s <= t (inclusive) or s < t of the same segment."""
    batch, time, heads, dim = q.shape
    kv_heads = k.shape[2]
    chunk = min(CHUNK, time)
    count = -(-time // chunk)
    tail = count * chunk - time

    def chunks(x):
        x = blocks.pad_time(x, 1, after=tail)
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    queries = chunks(q).reshape(count, batch, chunk, kv_heads, heads // kv_heads, dim)
    queries = queries.transpose(0, 1, 3, 4, 2, 5)
    keys, values = (chunks(x).transpose(0, 1, 3, 2, 4) for x in (k, v))
    ids = chunks(segments)
    # The state belongs to the segment of the last token seen; segments are contiguous, so no other
    # can go on in the next chunk.
    last = ids[:, :, -1:]
    owner = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    index = jnp.arange(chunk)
    order = masks.band(index, index, causal=True)
    if not inclusive:
        order &= index[:, None] != index[None, :]

    @jax.checkpoint
    def step(state, inputs):
        s, z = state
        query, key, value, ids, owner, last = inputs
        query, key, value = feature_map(query), feature_map(key), value.astype(jnp.float32)
        allowed = masks.same_segment(ids, ids) & order[None]
        scores = jnp.einsum("bgrqd,bgkd->bgrqk", query, key)
        scores = jnp.where(allowed[:, None, None], scores, 0.0)
        reads = query * (ids == owner).astype(jnp.float32)[:, None, None, :, None]
        numerator = jnp.einsum("bgrqk,bgkd->bgrqd", scores, value)
        numerator += jnp.einsum("bgrqd,bgde->bgrqe", reads, s)
        denominator = scores.sum(-1) + jnp.einsum("bgrqd,bgd->bgrq", reads, z)
        writes = key * (ids == last).astype(jnp.float32)[:, None, :, None]
        keep = (owner == last).astype(jnp.float32)[:, :, None]
        s = s * keep[..., None] + jnp.einsum("bgkd,bgke->bgde", writes, value)
        z = z * keep + writes.sum(-2)
        return (s, z), (numerator, denominator)

    z = jnp.zeros_like(keys[0, :, :, 0], jnp.float32)
    s = jnp.zeros_like(keys[0, :, :, 0, :, None] * values[0, :, :, 0, None, :], jnp.float32)
    _, (numerator, denominator) = jax.lax.scan(
        step, (s, z), (queries, keys, values, ids, owner, last)
    )

    def joined(x):
        """`[count, B, G, r, chunk, ...]` to `[B, T, H, ...]`."""
        x = jnp.moveaxis(x, (0, 4), (1, 2))
        return x.reshape(batch, count * chunk, heads, *x.shape[5:])[:, :time]

    return joined(numerator), joined(denominator)


def recurrent(
    q: Queries, k: Keys, v: Values, segment_ids: SegmentIds | None = None
) -> Queries:
    """The causal form token by token: S <- S + phi(k_t) v_t^T, z <- z + phi(k_t), read, repeat.

    S and z restart where the segment id changes. The reference of what `attend` computes by chunks.
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    segments = blocks.default_segments(q, segment_ids)
    queries = jnp.moveaxis(feature_map(blocks.group_queries(q, k.shape[2])), 3, 0)
    keys = jnp.moveaxis(feature_map(k), 1, 0)
    values = jnp.moveaxis(v.astype(jnp.float32), 1, 0)
    ids = segments.T
    previous = jnp.concatenate([ids[:1], ids[:-1]])

    def step(state, token):
        s, z = state
        query, key, value, same, valid = token
        keep = same.astype(jnp.float32)[:, None, None]
        s = s * keep[..., None] + key[..., :, None] * value[..., None, :]
        z = z * keep + key
        numerator = jnp.einsum("bgrd,bgde->bgre", query, s)
        denominator = jnp.einsum("bgrd,bgd->bgr", query, z) + EPSILON
        out = numerator / denominator[..., None]
        return (s, z), jnp.where(valid[:, None, None, None], out, 0.0)

    z = jnp.zeros_like(keys[0])
    s = jnp.zeros_like(keys[0][..., :, None] * values[0][..., None, :])
    _, out = jax.lax.scan(step, (s, z), (queries, keys, values, ids == previous, ids != 0))
    return blocks.ungroup_queries(jnp.moveaxis(out, 0, 3)).astype(q.dtype)
