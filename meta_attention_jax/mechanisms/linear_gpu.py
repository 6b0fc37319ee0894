"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236) on NVIDIA GPUs, chunked (Yang et al., arXiv
2312.06635), by Pallas in its Triton form.

What `mechanisms/linear.py` does in order is done at once: the sums of all chunks are made side by side, a pass of
additions turns them into the states before each chunk, and then every block of tokens meets the tokens of its chunk
and one state. No sum is made by atomics: results are the same every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from meta_attention_jax.mechanisms import chunked, triton
from meta_attention_jax.mechanisms.blocks import EPSILON, centred, feature_map
from meta_attention_jax.mechanisms.chunked import Shape
from meta_attention_jax.mechanisms.triton import divide, dot
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

States = Float[Array, "batch chunks kv_heads dim+1 dim"]
"""Of each chunk: rows S, and z as the last row. Float32."""

_NEVER = -1e4
"""phi of it is 0 in float32; a finite number of every dtype."""
_AHEAD = 8
"""States that are under way from memory at a time."""


class Shapes(NamedTuple):
    """How the kernels are cut: powers of two, of which `rows` and `tokens` divide `chunk`."""

    chunk: int
    states: Shape
    out: Shape
    d_states: Shape
    dq: Shape
    dk: Shape
    dv: Shape


def shapes_for(dim: int, dtype) -> Shapes:
    """By head width and dtype."""
    half = jnp.dtype(dtype) == jnp.bfloat16
    if half and dim <= 64:
        state, block = Shape(64, 64, 64, 4, 2), Shape(128, 64, 64, 8, 2)
    elif half and dim <= 128:
        state, block = Shape(128, 64, 128, 8, 2), Shape(128, 64, 128, 8, 2)
    elif half:
        state, block = Shape(128, 64, 128, 8, 2), Shape(128, 64, 64, 8, 1)
    elif dim <= 128:
        state, block = Shape(64, 32, 64, 4, 2), Shape(64, 32, 64, 4, 1)
    else:
        state, block = Shape(64, 32, 64, 4, 2), Shape(64, 32, 32, 8, 1)
    return Shapes(256, state, block, state, block, block, block)


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    segment_ids: Optional[SegmentIds] = None,
    shapes: Optional[Shapes] = None,
    interpret: bool = False,
) -> Queries:
    """phi(q_t)^T S_t / (phi(q_t)^T z_t + 1e-6) over s <= t of the segment of t, at least 16 tokens; 0 in padding.

    Sums and states in float32. Factors of products are bfloat16 if q is, else float32, of which the default precision
    keeps as many digits as float16 has: the sums of many tokens are beyond what that can hold.
    """
    dim = q.shape[-1]
    width = triton.width_for(dim)
    if width > dim:
        extra = [(0, 0)] * 3 + [(0, width - dim)]
        q, k = (jnp.pad(x, extra, constant_values=_NEVER) for x in (q, k))
        v = jnp.pad(v, extra)
    shapes = _lowered(shapes or shapes_for(dim, q.dtype), q.shape[1], width)
    return _attend(q, k, v, segment_ids, shapes, interpret)[..., :dim]


def _lowered(shapes: Shapes, time: int, width: int) -> Shapes:
    """No tile has more tokens than there are, and no piece more columns."""
    most = 1 << (time.bit_length() - 1)

    def lowered(shape: Shape, rows: int) -> Shape:
        least = (min(x, y) for x, y in zip(shape, (rows, most, width)))
        return Shape(*least, *shape[3:])

    chunk, *rest = shapes
    return Shapes(chunk, *(lowered(x, width if i in (0, 2) else most) for i, x in enumerate(rest)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, segments, shapes, interpret):
    return _forward(q, k, v, segments, shapes, interpret, save=False)[0]


def _attend_forward(q, k, v, segments, shapes, interpret):
    out, *saved = _forward(q, k, v, segments, shapes, interpret, save=True)
    return out, (q, k, v, segments, out, *saved)


def _forward(q, k, v, segments, shapes, interpret, *, save: bool):
    """out, i, the states; and, if asked, what rounding took from out."""
    states = _states((k, v), segments, k.shape[2], shapes.chunk, shapes.states, interpret)
    states = _carried(states, segments, k.shape[1], shapes.chunk, interpret)
    # States are saved: as large as q where q is bfloat16 and dim is half the chunk, and a third of the forward pass.
    save &= q.dtype != jnp.float32
    out, inverse, *rest = _outputs(q, k, v, states, segments, save, shapes.chunk, shapes.out, interpret)
    return out, inverse, states, *rest


def _attend_backward(shapes, interpret, saved, d_out):
    """With i = 1 / (D + eps), which gives dN = i dO and dD = i m, m = -dO . out, in the equations of
    `linear._sums_backward`: dA = i (dO V^T + m), dS = (i phi(q))^T dO, dz = (i phi(q))^T m.
    """
    q, k, v, segments, out, inverse, states, *rest = saved
    d_out = d_out.astype(q.dtype)
    # m errs for all keys at once: of an out of 8 bits the error of dq grows with sqrt(T).
    out = sum(x.astype(jnp.float32) for x in (out, *rest))
    mean = -jnp.einsum("bthd,bthd->bht", d_out.astype(jnp.float32), out)
    chunk = shapes.chunk
    d_states = _states((q, d_out, inverse, mean), segments, k.shape[2], chunk, shapes.d_states, interpret)
    d_states = _carried(d_states, segments, k.shape[1], chunk, interpret, reverse=True)
    state = q, k, v, d_out, inverse, mean
    dq = _d_query(*state, states, segments, chunk, shapes.dq, interpret)
    dk = _d_key(*state, d_states, segments, chunk, shapes.dk, interpret)
    dv = _d_value(*state[:-1], d_states, segments, chunk, shapes.dv, interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _states(arrays, segments, kv_heads: int, chunk: int, shape: Shape, interpret: bool) -> States:
    """sum phi(x) y^T and sum phi(x) over the tokens of each chunk that write its state; or, given (i, m) too,
    sum i phi(x) y^T and sum i phi(x) m over those that read it, and over the heads of a group."""
    batch, time, heads, width = arrays[0].shape
    chunks, members, backward = -(-time // chunk), heads // kv_heads, len(arrays) > 2
    rows, tokens, columns = shape[:3]

    def kernel(segments, x, y, *refs):
        *scales, states = refs
        n, column = divide(pl.program_id(0), width // columns)
        n, row = divide(n, width // rows)
        n, g = divide(n, kv_heads)
        b, c = divide(n, chunks)
        across, down = pl.ds(column * columns, columns), pl.ds(row * rows, rows)
        owner = (chunked.owner_of if backward else chunked.last_of)(segments, b, c, chunk, time)

        def add(step, carry):
            s, z = carry
            step, member = divide(step, members)
            h = g * members + member
            met = chunked.tokens_at(segments, b, c * chunk + step * tokens, tokens, time)
            left = feature_map(x[b, met.here, h, down])
            left = jnp.where((met.new & (met.ids == owner))[:, None], left, 0.0)
            weight = 1.0
            if backward:
                inverse, mean = (scale[b, h, met.here][:, None] for scale in scales)
                left, weight = left * inverse, mean
            left = left.astype(chunked.factor(x))
            # Of what has been rounded: S and z err together, and their differences do not.
            z = z + (left.astype(jnp.float32) * weight).sum(0)
            return s + dot(left, y[b, met.here, h, across].astype(left.dtype), 0, 0), z

        zeros = jnp.zeros((rows, columns), jnp.float32), jnp.zeros((rows,), jnp.float32)
        steps = chunked.steps_of(jnp.minimum(chunk, time - c * chunk), tokens) * members
        s, z = jax.lax.fori_loop(0, steps, add, zeros)
        states[b, c, g, down, across] = s
        states[b, c, g, width, down] = z

    programs = batch * chunks * kv_heads * (width // rows) * (width // columns)
    places = (jax.ShapeDtypeStruct((batch, chunks, kv_heads, width + 1, width), jnp.float32),)
    return chunked.launch(kernel, segments, arrays, places, programs, shape, interpret)[0]


def _carried(states, segments, time: int, chunk: int, interpret: bool, reverse: bool = False) -> States:
    """Of every chunk the sum of those before it (after it, in reverse) of one segment; a program for each row."""
    batch, chunks, kv_heads, height, width = states.shape

    def kernel(segments, states, out):
        n, row = divide(pl.program_id(0), height)
        b, g = divide(n, kv_heads)

        def several(first, count, total):
            order = [chunks - 1 - first - i if reverse else first + i for i in range(count)]
            at = [(segments, b, c, chunk, time) for c in order]
            kept = [chunked.owner_of(*x) == chunked.last_of(*x) for x in at]
            # All are asked for before the first is needed.
            for c, keep, own in zip(order, kept, [states[b, c, g, row, :] for c in order]):
                out[b, c, g, row, :] = total
                total = own + jnp.where(keep, total, 0.0)
            return total

        whole, total = chunks // _AHEAD, jnp.zeros((width,), jnp.float32)
        total = jax.lax.fori_loop(0, whole, lambda i, total: several(i * _AHEAD, _AHEAD, total), total)
        several(whole * _AHEAD, chunks % _AHEAD, total)

    shape = Shape(1, 1, width, max(1, width // 128), 1)
    programs = batch * kv_heads * height
    return chunked.launch(kernel, segments, (states,), (states,), programs, shape, interpret, written_over=True)[0]


def _outputs(q, k, v, states, segments, save: bool, chunk: int, shape: Shape, interpret: bool):
    """out, i = 1 / (D + eps) and, to `save`, what rounding took from out; 0 in padding."""
    (batch, time, heads, width), group = q.shape, q.shape[2] // k.shape[2]

    def body(at: chunked.At, q, k, v, states, out, inverse, *rest):
        b, rows, h, g, columns = at.b, at.rows, at.h, at.h // group, at.columns
        query = chunked.phi(q, b, rows, h)
        s, z = states[b, at.c, g, pl.ds(0, width), columns], states[b, at.c, g, width, :]
        total = (query.astype(jnp.float32) * z[None]).sum(1)
        s, centre = centred(s, z)
        acc = at.of_state(dot(query, s.astype(query.dtype), 1, 0) + total[:, None] * centre[None])

        def meet(met: chunked.Tokens, allowed, member, carry):
            acc, total = carry
            scores = jnp.where(allowed, dot(query, chunked.phi(k, b, met, g), 1, 1), 0.0).astype(query.dtype)
            value = v[b, met.here, g, columns].astype(query.dtype)
            return acc + dot(scores, value, 1, 0), total + scores.astype(jnp.float32).sum(1)

        acc, total = at.walk(meet, (acc, at.of_state(total)))
        total = jnp.where(rows.ids != 0, 1.0 / (total + EPSILON), 0.0)
        acc = jnp.where(rows.ids[:, None] != 0, acc * total[:, None], 0.0)
        at.put(out, acc)
        for ref in rest:
            at.put(ref, acc - acc.astype(out.dtype).astype(jnp.float32))
        triton.store(inverse.at[b, h, rows.here], total, mask=rows.new)

    places = q, jax.ShapeDtypeStruct((batch, heads, time), jnp.float32), *([q] if save else [])
    return chunked.by_block(body, (q, k, v, states), places, segments, chunk, shape, interpret)


def _d_query(q, k, v, d_out, inverse, mean, states, segments, chunk: int, shape: Shape, interpret: bool) -> Queries:
    """dq = phi'(q) i ((dO V^T + m) phi(k) + dO S^T + m z^T)."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: chunked.At, q, k, v, d_out, inverse, mean, states, dq):
        b, here, h, g, columns = at.b, at.rows.here, at.h, at.h // group, at.columns
        d, shift = d_out[b, here, h, :].astype(chunked.factor(q)), mean[b, h, here][:, None]
        s, z = states[b, at.c, g, columns, :], states[b, at.c, g, width, columns]
        s, centre = centred(s, z)
        shifted = shift + (d.astype(jnp.float32) * centre[None]).sum(1)[:, None]
        acc = dot(d, s.astype(d.dtype), 1, 1) + shifted * z[None]

        def meet(met: chunked.Tokens, allowed, member, acc):
            scores = jnp.where(allowed, dot(d, v[b, met.here, g, :].astype(d.dtype), 1, 1) + shift, 0.0)
            return acc + dot(scores.astype(d.dtype), chunked.phi(k, b, met, g, columns), 1, 0)

        acc = at.walk(meet, at.of_state(acc))
        at.put(dq, acc * inverse[b, h, here][:, None] * at.slope(q))

    arrays = q, k, v, d_out, inverse, mean, states
    return chunked.by_block(body, arrays, (q,), segments, chunk, shape, interpret)[0]


def _d_key(q, k, v, d_out, inverse, mean, d_states, segments, chunk: int, shape: Shape, interpret: bool) -> Keys:
    """dk = phi'(k) ((i (dO V^T + m))^T phi(q) + V dS^T + dz)."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: chunked.At, q, k, v, d_out, inverse, mean, states, dk):
        b, g, columns = at.b, at.h, at.columns
        value = v[b, at.rows.here, g, :].astype(chunked.factor(q))
        acc = dot(value, states[b, at.c, g, columns, :].astype(value.dtype), 1, 1)
        acc = acc + states[b, at.c, g, width, columns][None]

        def meet(met: chunked.Tokens, allowed, member, acc):
            h = g * group + member
            scores = dot(value, d_out[b, met.here, h, :].astype(value.dtype), 1, 1) + mean[b, h, met.here][None]
            scores = jnp.where(allowed, scores * inverse[b, h, met.here][None], 0.0).astype(value.dtype)
            return acc + dot(scores, chunked.phi(q, b, met, h, columns), 1, 0)

        at.put(dk, at.walk(meet, at.of_state(acc)) * at.slope(k))

    arrays = q, k, v, d_out, inverse, mean, d_states
    return chunked.by_block(body, arrays, (k,), segments, chunk, shape, interpret, members=group)[0]


def _d_value(q, k, v, d_out, inverse, d_states, segments, chunk: int, shape: Shape, interpret: bool) -> Values:
    """dv = (i phi(q) phi(k)^T)^T dO + phi(k) dS."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: chunked.At, q, k, d_out, inverse, states, dv):
        b, g, columns = at.b, at.h, at.columns
        key = chunked.phi(k, b, at.rows, g)
        acc = dot(key, states[b, at.c, g, pl.ds(0, width), columns].astype(key.dtype), 1, 0)

        def meet(met: chunked.Tokens, allowed, member, acc):
            h = g * group + member
            scores = dot(key, chunked.phi(q, b, met, h), 1, 1) * inverse[b, h, met.here][None]
            scores = jnp.where(allowed, scores, 0.0).astype(key.dtype)
            return acc + dot(scores, d_out[b, met.here, h, columns].astype(key.dtype), 1, 0)

        at.put(dv, at.walk(meet, at.of_state(acc)))

    arrays = q, k, d_out, inverse, d_states
    return chunked.by_block(body, arrays, (v,), segments, chunk, shape, interpret, members=group)[0]
