"""Linear (kernel) attention (Katharopoulos et al., arXiv 2006.16236), chunked, in float32."""

from __future__ import annotations

import functools
from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from meta_attention_jax.mechanisms import blocks, cache, linear_gpu, linear_tpu, spent, triton
from meta_attention_jax.mechanisms.blocks import EPSILON, feature_map
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.types import Abstract, AttentionSpec, Keys, Queries, SegmentIds, Values

CHUNK = 64
BATCHED = 16
"""Sequences x heads x chunks that one step of the loop multiplies together. On two CPU cores 4 to 64 differ by less
than the noise."""


def attend(q: Queries, k: Keys, v: Values, *, spec: AttentionSpec, segment_ids: Optional[SegmentIds] = None) -> Queries:
    """o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + 1e-6), S_t = sum phi(k_s) v_s^T, z_t = sum phi(k_s); arguments and
    result as `Mechanism.attend`.

    Sums run over s <= t of the segment of t, or over the whole segment when not causal. State and products are float32.
    Time and memory, gradients included, are linear in T: chunks of tokens attend within themselves, and carry (S, z)
    from chunk to chunk.
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    if blocks.is_empty(q):
        return jnp.zeros_like(q)
    if spec.causal and triton.serves(spec.kernel, q.shape, q.dtype):
        return linear_gpu.attend(q, k, v, segment_ids)
    if spec.causal and linear_tpu.serves(spec.kernel, q.shape, k.shape[2], q.dtype):
        return linear_tpu.attend(q, k, v, segment_ids)
    segments = blocks.default_segments(q, segment_ids)
    numerator, denominator = _sums(q, k, v, segments, True)
    if not spec.causal:
        # The future of a token is the strict past of the reversed sequence.
        flipped = (jnp.flip(x, 1) for x in (q, k, v, segments))
        future = (jnp.flip(x, 1) for x in _sums(*flipped, False))
        numerator, denominator = (x + y for x, y in zip((numerator, denominator), future))
    out = numerator / (denominator + EPSILON)[..., None]
    return jnp.where(segments[:, :, None, None] != 0, out, 0.0).astype(q.dtype)


def count_work(q: Abstract, k: Abstract, spec: AttentionSpec) -> spent.AttentionCost:
    """What `attend` spends on all tokens, forward.

    A chunk of c tokens makes scores and multiplies them with values, 4 c^2 d per head; adds to the state, 2 c d^2 per
    key/value head; reads (S, z), 2 c d^2 + 2 c d per head. There are as many chunks as the loop visits, the filling of
    its last step included; twice as many when not causal. Bytes: each array once per direction.
    """
    batch, _, heads, dim = q.shape
    steps, m, chunk = _steps(q)
    per_head = 4.0 * chunk**2 * dim + 2.0 * chunk * dim * (dim + 1)
    state = 2.0 * chunk * dim**2
    once = spent.of_arrays(q, k, batch * steps * m * (heads * per_head + k.shape[2] * state))
    directions = 1 if spec.causal else 2
    return spent.AttentionCost(*(directions * x for x in once))


def step(
    q: cache.StepQuery, held: cache.Cache, layer: cache.Layer, *, needed: Bool[Array, "batch"], spec: AttentionSpec
) -> cache.StepQuery:
    """phi(q)^T S / (phi(q)^T z + 1e-6) in float32, in the rows that are needed; 0 elsewhere.

    All rows at once: their states have just been written, and are small.
    """
    del spec
    query = feature_map(cache.grouped(q, held.s.shape[2]))
    numerator = jnp.einsum("bgrd,bgde->bgre", query, held.s[layer])
    denominator = jnp.einsum("bgrd,bgd->bgr", query, held.z[layer]) + EPSILON
    out = (numerator / denominator[..., None]).reshape(q.shape).astype(q.dtype)
    return jnp.where(needed[:, None, None], out, 0)


def flops(time: int, dim: int, spec: AttentionSpec) -> float:
    """Per token: state update 2 d^2, read 2 d^2, normaliser 2 d; independent of direction."""
    del spec
    return float(time) * (4.0 * dim * dim + 2.0 * dim)


Numerator = Float[Array, "batch time heads dim"]
Denominator = Float[Array, "batch time heads"]
State = tuple[Float[Array, "batch kv_heads dim value"], Float[Array, "batch kv_heads dim"]]
"""(S, z), float32."""
States = tuple[Float[Array, "batch m kv_heads dim value"], Float[Array, "batch m kv_heads dim"]]
"""m of them, one per chunk."""
Steps = tuple[Float[Array, "steps batch m kv_heads dim value"], Float[Array, "steps batch m kv_heads dim"]]
"""Those of all steps of the loop."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(q: Queries, k: Keys, v: Values, segments: SegmentIds, inclusive: bool) -> tuple[Numerator, Denominator]:
    """phi(q_t)^T S_t and phi(q_t)^T z_t over s <= t (inclusive) or s < t of the same segment."""
    return _forward(q, k, v, segments, inclusive, save=False)[0]


def _sums_forward(q, k, v, segments, inclusive):
    sums, states = _forward(q, k, v, segments, inclusive, save=True)
    return sums, (q, k, v, segments, states)


def _forward(
    q: Queries, k: Keys, v: Values, segments: SegmentIds, inclusive: bool, *, save: bool
) -> tuple[tuple[Numerator, Denominator], Steps | None]:
    """The sums, and (S, z) before every chunk if they are to be saved.

    A step of the loop takes m chunks: their products are batched, and only the states, which are small, follow each
    other.
    """
    time = q.shape[1]
    steps, m, chunk = _steps(q)
    q, k, v, segments = (_padded(x, steps * m * chunk) for x in (q, k, v, segments))

    def step(carry, i):
        state, numerator, denominator = carry
        query, key, value = _slices(q, k, v, i, m, chunk)
        allowed, reads, writes, keep = _masks(segments, i, m, chunk, inclusive)
        scores = jnp.where(allowed, jnp.einsum("bmgrqd,bmgkd->bmgrqk", query, key), 0.0)
        reading, writing = query * reads, key * writes
        added = jnp.einsum("bmgkd,bmgke->bmgde", writing, value), writing.sum(-2)
        (s, z), state = _advance(state, keep, added)
        top = jnp.einsum("bmgrqk,bmgke->bmgrqe", scores, value)
        top += jnp.einsum("bmgrqd,bmgde->bmgrqe", reading, s)
        bottom = scores.sum(-1) + jnp.einsum("bmgrqd,bmgd->bmgrq", reading, z)
        numerator = _put(numerator, _ungroup(top), i)
        denominator = _put(denominator, _ungroup(bottom), i)
        return (state, numerator, denominator), (s, z) if save else None

    start = (_zero_state(k, v), jnp.zeros_like(q, jnp.float32), jnp.zeros_like(q[..., 0], jnp.float32))
    (_, numerator, denominator), states = jax.lax.scan(step, start, jnp.arange(steps))
    return (numerator[:, :time], denominator[:, :time]), states


def _sums_backward(inclusive, saved, cotangents):
    """Chunks in reverse, with the gradients (dS, dz) in the place of (S, z).

    With scores A = phi(q) phi(k)^T and dA = dN V^T + dD, N and D the numerator and denominator: dphi(q) = dA phi(k) +
    dN S^T + dD z^T, dphi(k) = dA^T phi(q) + V dS^T + dz, dV = A^T dN + phi(k) dS, and a chunk adds phi(q)^T dN to dS,
    phi(q)^T dD to dz.
    """
    q, k, v, segments, states = saved
    time, kv_heads = q.shape[1], k.shape[2]
    steps, m, chunk = _steps(q)
    q, k, v, segments, *cotangents = (_padded(x, steps * m * chunk) for x in (q, k, v, segments, *cotangents))

    def step(carry, inputs):
        state, dq, dk, dv = carry
        i, (s, z) = inputs
        query, key, value = _slices(q, k, v, i, m, chunk)
        allowed, reads, writes, keep = _masks(segments, i, m, chunk, inclusive)
        top, bottom = (_group(x, i, m, chunk, kv_heads) for x in cotangents)
        bottom = bottom[..., None]
        reading, writing = query * reads, key * writes
        added = (jnp.einsum("bmgrqd,bmgrqe->bmgde", reading, top), (reading * bottom).sum((3, 4)))
        (ds, dz), state = _advance(state, keep, added, reverse=True)
        scores = jnp.where(allowed, jnp.einsum("bmgrqd,bmgkd->bmgrqk", query, key), 0.0)
        d_scores = jnp.einsum("bmgrqe,bmgke->bmgrqk", top, value) + bottom
        d_scores = jnp.where(allowed, d_scores, 0.0)
        d_query = jnp.einsum("bmgrqe,bmgde->bmgrqd", top, s) + bottom * z[:, :, :, None, None]
        d_query = d_query * reads + jnp.einsum("bmgrqk,bmgkd->bmgrqd", d_scores, key)
        d_key = jnp.einsum("bmgke,bmgde->bmgkd", value, ds) + dz[..., None, :]
        d_key = d_key * writes + jnp.einsum("bmgrqk,bmgrqd->bmgkd", d_scores, query)
        d_value = jnp.einsum("bmgrqk,bmgrqe->bmgke", scores, top)
        d_value += jnp.einsum("bmgkd,bmgde->bmgke", writing, ds)
        # phi' = exp(x) = phi where x <= 0, else 1: the smaller of phi and 1.
        dq = _put(dq, _ungroup(d_query * jnp.minimum(query, 1.0)), i)
        dk = _put(dk, _ungroup((d_key * jnp.minimum(key, 1.0))[:, :, :, None]), i)
        dv = _put(dv, _ungroup(d_value[:, :, :, None]), i)
        return (state, dq, dk, dv), None

    start = (_zero_state(k, v), *(jnp.zeros_like(x) for x in (q, k, v)))
    inputs = (jnp.arange(steps), states)
    (_, *gradients), _ = jax.lax.scan(step, start, inputs, reverse=True)
    return (*(x[:, :time] for x in gradients), None)


_sums.defvjp(_sums_forward, _sums_backward)


def _steps(q: Abstract) -> tuple[int, int, int]:
    """Steps of the loop, chunks in a step, tokens in a chunk."""
    batch, time, heads, _ = q.shape
    chunk = min(CHUNK, time)
    chunks = -(-time // chunk)
    # A batch that is a symbol (`jax.export`) may be large.
    most = BATCHED // (batch * heads) if isinstance(batch, int) else 1
    steps = -(-chunks // max(1, min(chunks, most)))
    return steps, -(-chunks // steps), chunk


def _padded(x: Array, time: int) -> Array:
    return blocks.pad_time(x, 1, after=time - x.shape[1])


def _advance(state: State, keep: Float[Array, "batch m"], added: States, reverse: bool = False) -> tuple[States, State]:
    """The state before each of m chunks (after, in reverse), stacked on axis 1; and the last one."""
    m = keep.shape[1]
    before = [None] * m
    for j in reversed(range(m)) if reverse else range(m):
        before[j] = state
        stay = keep[:, j, None, None]
        state = (state[0] * stay[..., None] + added[0][:, j], state[1] * stay + added[1][:, j])
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *before), state


def _group(x: Array, i: Array, m: int, chunk: int, kv_heads: int) -> Array:
    """Step i of `[B, T, H, ...]` as `[B, m, G, r, chunk, ...]`.

    Slices are taken and turned inside the loop, where they stay in cache: turning whole arrays first costs as much as
    the products.
    """
    x = jax.lax.dynamic_slice_in_dim(x, i * m * chunk, m * chunk, 1)
    batch, _, heads, *rest = x.shape
    x = x.reshape(batch, m, chunk, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, 2, 4)


def _ungroup(x: Array) -> Array:
    """`[B, m, G, r, chunk, ...]` to `[B, m chunk, H, ...]`."""
    x = jnp.moveaxis(x, 4, 2)
    batch, m, chunk, kv_heads, group, *rest = x.shape
    return x.reshape(batch, m * chunk, kv_heads * group, *rest)


def _put(buffer: Array, x: Array, i: Array) -> Array:
    """Writes step i, `[B, m chunk, ...]`."""
    x = x.astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, x, i * x.shape[1], 1)


def _slices(q: Queries, k: Keys, v: Values, i: Array, m: int, chunk: int):
    """phi(q) `[B, m, G, r, chunk, d]`, phi(k) and v `[B, m, G, chunk, d]` of step i, float32."""
    q, k, v = (_group(x, i, m, chunk, k.shape[2]) for x in (q, k, v))
    return feature_map(q), feature_map(k[:, :, :, 0]), v[:, :, :, 0].astype(jnp.float32)


def _masks(segments: SegmentIds, i: Array, m: int, chunk: int, inclusive: bool):
    """Who attends to whom within a chunk, who reads the state, who writes it, and whether it stays.

    The state belongs to the segment of the last token before the chunk; segments are contiguous, so no other can go on
    in the chunk.
    """
    first = i * m * chunk
    ids = jax.lax.dynamic_slice_in_dim(segments, first, m * chunk, 1).reshape(-1, m, chunk)
    before = jax.lax.dynamic_slice_in_dim(segments, jnp.maximum(first - 1, 0), 1, 1)
    last = ids[:, :, -1]
    owner = jnp.concatenate([jnp.where(i == 0, 0, before), last[:, :-1]], axis=1)
    index = jnp.arange(chunk)
    order = index[:, None] >= index[None, :] if inclusive else index[:, None] > index[None, :]
    allowed = (blocks.same_segment(ids, ids) & order[None, None])[:, :, None, None]
    reads = (ids == owner[..., None]).astype(jnp.float32)[:, :, None, None, :, None]
    writes = (ids == last[..., None]).astype(jnp.float32)[:, :, None, :, None]
    return allowed, reads, writes, (owner == last).astype(jnp.float32)


def _zero_state(k: Keys, v: Values) -> State:
    """(S, z) = 0; made from k and v, whose placement over devices it shares."""
    z = jnp.zeros_like(k[:, 0], jnp.float32)
    return jnp.zeros_like(z[..., :, None] * v[:, 0, :, None, :].astype(jnp.float32)), z


# Rotation would break the positivity of the kernel.
MECHANISM = Mechanism(attend, flops, cost=0.15, step=step, work=count_work)
