"""What the mechanisms share: checks at the edge, masks from indices and segment ids, the head-major block layout, the
feature map of linear attention and the rotation of positions. No mask is the whole T x T square unless it is asked for.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.fields import expect
from meta_attention_jax.types import Keys, Positions, Queries, Rope, SegmentIds, Values

MASKED = -1e30
"""Logit of a masked pair: finite, so that a row without any key stays free of NaN."""

EPSILON = 1e-6
"""Beside the normaliser of linear attention."""


def validate_qkv(q: Queries, k: Keys, v: Values, segment_ids: SegmentIds | None = None) -> None:
    """Checks the arguments of every `attend` once, at the edge."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected rank 4 [batch, time, heads, dim], got shape {x.shape}.")
    expect(k.shape == v.shape, "v", f"the shape of k, {k.shape}", v.shape)
    batch, time, heads, dim = q.shape
    if k.shape[:2] != (batch, time) or k.shape[3] != dim:
        raise ValueError(f"k: expected [batch={batch}, time={time}, kv_heads, dim={dim}] as in q, got {k.shape}.")
    if heads % k.shape[2]:
        raise ValueError(f"heads: expected a multiple of kv_heads={k.shape[2]}, got heads={heads}.")
    if segment_ids is not None:
        expect(segment_ids.shape == (batch, time), "segment_ids", f"shape {(batch, time)}", segment_ids.shape)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids: expected integers, got {segment_ids.dtype}.")


def is_empty(q: Queries) -> bool:
    """Whether there is no row or no token: nothing to cut into blocks. A symbolic axis has some."""
    return 0 in q.shape


def group_queries(q: Queries, kv_heads: int) -> Float[Array, "batch kv_heads group time dim"]:
    """Head-major queries; the `group` = heads / kv_heads queries that share a key stay together."""
    batch, time, heads, dim = q.shape
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, dim)
    return q.transpose(0, 2, 3, 1, 4)


def ungroup_queries(out: Float[Array, "batch kv_heads group time dim"]) -> Queries:
    """Inverse of `group_queries`."""
    batch, kv_heads, group, time, dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, kv_heads * group, dim)


def head_major(x: Keys) -> Float[Array, "batch kv_heads time dim"]:
    """Keys or values with heads before time: the layout in which a block is contiguous."""
    return x.transpose(0, 2, 1, 3)


def pad_time(x: Array, axis: int, before: int = 0, after: int = 0) -> Array:
    """Zeros around `axis`; for segment ids that is padding, which nothing attends to."""
    if before == after == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def default_segments(q: Queries, segment_ids: SegmentIds | None) -> Int[Array, "batch time"]:
    """The given segments, or one segment without padding."""
    return jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids


def dot(equation: str, x: Array, y: Array) -> Float[Array, "..."]:
    """Product in the dtype of the inputs y, accumulated in float32."""
    return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def capped(logits: Array, softcap: float | None) -> Array:
    """c tanh(z / c), for logits before the mask."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def capped_slope(logits: Array, softcap: float | None) -> Array | float:
    """The derivative of `capped`, from what it has given: 1 - (z' / c)^2; 0 where a mask came after."""
    return 1.0 if softcap is None else 1.0 - jnp.clip(logits / softcap, -1.0, 1.0) ** 2


Carry = tuple[Array, Array, Array]
"""Of an online softmax, by query: the largest logit, the sum of the weights relative to it, the sum of values."""


def online_softmax(carry: Carry, logits: Array, value: Array, equation: str) -> Carry:
    """The carry after one more tile; `equation` multiplies weights and values."""
    top, total, acc = carry
    new = jnp.maximum(top, logits.max(-1))
    weights, decay = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
    return new, total * decay + weights.sum(-1), acc * decay[..., None] + dot(equation, weights, value)


def band(
    query: Int[Array, "q"], key: Int[Array, "k"], *, causal: bool, window: int | None = None
) -> Bool[Array, "q k"]:
    """Pairs (t, s) by index: causal s in [t - window + 1, t], else |s - t| < window; None for no bound."""
    distance = query[:, None] - key[None, :]
    allowed = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    if window is not None:
        allowed &= jnp.abs(distance) < window
    return allowed


def same_segment(query: Int[Array, "*batch q"], key: Int[Array, "*batch k"]) -> Bool[Array, "*batch q k"]:
    """Pairs of one segment. Padding (id 0) attends to padding; callers zero those outputs."""
    return query[..., :, None] == key[..., None, :]


def feature_map(x: Array) -> Array:
    """phi(x) = ELU(x) + 1 > 0, in float32."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def centred(s: Float[Array, "dim value"], z: Float[Array, "dim"]) -> tuple[Array, Array]:
    """S - z c^T and c, a mean value: what it adds to the sums of linear attention is large, and is kept out of what is
    rounded."""
    centre = s.sum(0) / (z.sum() + EPSILON)
    return s - z[:, None] * centre[None], centre


def rotate(x: Float[Array, "batch time heads dim"], positions: Positions, rope: Rope = Rope()) -> Queries:
    """Queries or keys turned by their positions, as `Rope` says. Angles are float32; the result has the dtype of x."""
    batch, time, _, dim = x.shape
    expect(not dim % 2, "dim", "an even number for rotary positions", dim)
    expect(positions.shape == (batch, time), "positions", f"shape {(batch, time)}", positions.shape)
    half = dim // 2
    frequency = rope.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.divisors:
        expect(len(rope.divisors) == half, "divisors", f"{half} numbers", len(rope.divisors))
        frequency = frequency / jnp.asarray(rope.divisors, jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = (f(angle) if rope.scale == 1 else f(angle) * rope.scale for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
