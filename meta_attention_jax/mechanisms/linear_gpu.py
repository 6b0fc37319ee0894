"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236) on NVIDIA GPUs, chunked (Yang et al., arXiv
2312.06635), by Pallas in its Triton form.

What `mechanisms/linear.py` does in order is done at once: the sums of all chunks are made side by side, a pass of
additions turns them into the states before each chunk, and then every block of tokens meets the tokens of its chunk
and one state. No sum is made by atomics: results are the same every time.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.mechanisms import triton
from meta_attention_jax.mechanisms.blocks import EPSILON, feature_map
from meta_attention_jax.mechanisms.triton import divide, dot
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

Sums = Float[Array, "batch heads time"]
States = Float[Array, "batch chunks kv_heads dim+1 dim"]
"""Of each chunk: rows S, and z as the last row. Float32."""

_NEVER = -1e4
"""phi of it is 0 in float32; a finite number of every dtype."""
_AHEAD = 8
"""States that are under way from memory at a time."""


class Shape(NamedTuple):
    """How one kernel is cut: tokens of a block, or rows of a state; tokens met at a time; columns; warps; stages."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


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
    return _attend_forward(q, k, v, segments, shapes, interpret)[0]


def _attend_forward(q, k, v, segments, shapes, interpret):
    states = _states((k, v), segments, k.shape[2], shapes.chunk, shapes.states, interpret)
    states = _carried(states, segments, k.shape[1], shapes.chunk, interpret)
    out, inverse = _outputs(q, k, v, states, segments, shapes.chunk, shapes.out, interpret)
    # States are saved: as large as q where q is bfloat16 and dim is half the chunk, and a third of the forward pass.
    return out, (q, k, v, segments, states, out, inverse)


def _attend_backward(shapes, interpret, saved, d_out):
    """With i = 1 / (D + eps), which gives dN = i dO and dD = i m, m = -dO . out, in the equations of
    `linear._sums_backward`: dA = i (dO V^T + m), dS = (i phi(q))^T dO, dz = (i phi(q))^T m.
    """
    q, k, v, segments, states, out, inverse = saved
    d_out = d_out.astype(q.dtype)
    mean = -jnp.einsum("bthd,bthd->bht", d_out.astype(jnp.float32), out.astype(jnp.float32))
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
        owner = (_owner if backward else _last)(segments, b, c, chunk, time)

        def add(step, carry):
            s, z = carry
            step, member = divide(step, members)
            h = g * members + member
            met = _tokens(segments, b, c * chunk + step * tokens, tokens, time)
            left = feature_map(x[b, met.here, h, down])
            left = jnp.where((met.new & (met.ids == owner))[:, None], left, 0.0)
            weight = 1.0
            if backward:
                inverse, mean = (scale[b, h, met.here][:, None] for scale in scales)
                left, weight = left * inverse, mean
            left = left.astype(_factor(x))
            # Of what has been rounded: S and z err together, and their differences do not.
            z = z + (left.astype(jnp.float32) * weight).sum(0)
            return s + dot(left, y[b, met.here, h, across].astype(left.dtype), 0, 0), z

        zeros = jnp.zeros((rows, columns), jnp.float32), jnp.zeros((rows,), jnp.float32)
        steps = _steps(jnp.minimum(chunk, time - c * chunk), tokens) * members
        s, z = jax.lax.fori_loop(0, steps, add, zeros)
        states[b, c, g, down, across] = s
        states[b, c, g, width, down] = z

    programs = batch * chunks * kv_heads * (width // rows) * (width // columns)
    places = (jax.ShapeDtypeStruct((batch, chunks, kv_heads, width + 1, width), jnp.float32),)
    return _launch(kernel, segments, arrays, places, programs, shape, interpret)[0]


def _carried(states, segments, time: int, chunk: int, interpret: bool, reverse: bool = False) -> States:
    """Of every chunk the sum of those before it (after it, in reverse) of one segment; a program for each row."""
    batch, chunks, kv_heads, height, width = states.shape

    def kernel(segments, states, out):
        n, row = divide(pl.program_id(0), height)
        b, g = divide(n, kv_heads)

        def several(first, count, total):
            order = [chunks - 1 - first - i if reverse else first + i for i in range(count)]
            kept = [_owner(segments, b, c, chunk, time) == _last(segments, b, c, chunk, time) for c in order]
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
    return _launch(kernel, segments, (states,), (states,), programs, shape, interpret, written_over=True)[0]


def _outputs(q, k, v, states, segments, chunk: int, shape: Shape, interpret: bool) -> tuple[Queries, Sums]:
    """out, and i = 1 / (D + eps); 0 in padding."""
    (batch, time, heads, width), group = q.shape, q.shape[2] // k.shape[2]

    def body(at: _At, q, k, v, states, out, inverse):
        b, rows, h, g, columns = at.b, at.rows, at.h, at.h // group, at.columns
        query = _phi(q, b, rows, h)
        acc = at.of_state(dot(query, states[b, at.c, g, pl.ds(0, width), columns].astype(query.dtype), 1, 0))
        total = at.of_state((query.astype(jnp.float32) * states[b, at.c, g, width, :][None]).sum(1))

        def meet(met: _Tokens, allowed, member, carry):
            acc, total = carry
            scores = jnp.where(allowed, dot(query, _phi(k, b, met, g), 1, 1), 0.0)
            value = v[b, met.here, g, columns].astype(query.dtype)
            return acc + dot(scores.astype(query.dtype), value, 1, 0), total + scores.sum(1)

        acc, total = at.walk(meet, (acc, total))
        total = jnp.where(rows.ids != 0, 1.0 / (total + EPSILON), 0.0)
        at.put(out, jnp.where(rows.ids[:, None] != 0, acc * total[:, None], 0.0))
        triton.store(inverse.at[b, h, rows.here], total, mask=rows.new)

    places = q, jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    return _by_block(body, (q, k, v, states), places, segments, chunk, shape, interpret)


def _d_query(q, k, v, d_out, inverse, mean, states, segments, chunk: int, shape: Shape, interpret: bool) -> Queries:
    """dq = phi'(q) i ((dO V^T + m) phi(k) + dO S^T + m z^T)."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: _At, q, k, v, d_out, inverse, mean, states, dq):
        b, here, h, g, columns = at.b, at.rows.here, at.h, at.h // group, at.columns
        d, shift = d_out[b, here, h, :].astype(_factor(q)), mean[b, h, here][:, None]
        s, z = states[b, at.c, g, columns, :], states[b, at.c, g, width, columns]
        # dO S^T and m z^T are large and nearly cancel: what a mean value adds to both is left out before S is rounded.
        centre = s.sum(0)[None] / (z.sum() + EPSILON)
        acc = dot(d, (s - z[:, None] * centre).astype(d.dtype), 1, 1)
        acc = acc + (shift + (d.astype(jnp.float32) * centre).sum(1)[:, None]) * z[None]

        def meet(met: _Tokens, allowed, member, acc):
            scores = jnp.where(allowed, dot(d, v[b, met.here, g, :].astype(d.dtype), 1, 1) + shift, 0.0)
            return acc + dot(scores.astype(d.dtype), _phi(k, b, met, g, columns), 1, 0)

        acc = at.walk(meet, at.of_state(acc))
        at.put(dq, acc * inverse[b, h, here][:, None] * at.slope(q))

    arrays = q, k, v, d_out, inverse, mean, states
    return _by_block(body, arrays, (q,), segments, chunk, shape, interpret)[0]


def _d_key(q, k, v, d_out, inverse, mean, d_states, segments, chunk: int, shape: Shape, interpret: bool) -> Keys:
    """dk = phi'(k) ((i (dO V^T + m))^T phi(q) + V dS^T + dz)."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: _At, q, k, v, d_out, inverse, mean, states, dk):
        b, g, columns = at.b, at.h, at.columns
        value = v[b, at.rows.here, g, :].astype(_factor(q))
        acc = dot(value, states[b, at.c, g, columns, :].astype(value.dtype), 1, 1)
        acc = acc + states[b, at.c, g, width, columns][None]

        def meet(met: _Tokens, allowed, member, acc):
            h = g * group + member
            scores = dot(value, d_out[b, met.here, h, :].astype(value.dtype), 1, 1) + mean[b, h, met.here][None]
            scores = jnp.where(allowed, scores * inverse[b, h, met.here][None], 0.0).astype(value.dtype)
            return acc + dot(scores, _phi(q, b, met, h, columns), 1, 0)

        at.put(dk, at.walk(meet, at.of_state(acc)) * at.slope(k))

    arrays = q, k, v, d_out, inverse, mean, d_states
    return _by_block(body, arrays, (k,), segments, chunk, shape, interpret, members=group)[0]


def _d_value(q, k, v, d_out, inverse, d_states, segments, chunk: int, shape: Shape, interpret: bool) -> Values:
    """dv = (i phi(q) phi(k)^T)^T dO + phi(k) dS."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]

    def body(at: _At, q, k, d_out, inverse, states, dv):
        b, g, columns = at.b, at.h, at.columns
        key = _phi(k, b, at.rows, g)
        acc = dot(key, states[b, at.c, g, pl.ds(0, width), columns].astype(key.dtype), 1, 0)

        def meet(met: _Tokens, allowed, member, acc):
            h = g * group + member
            scores = dot(key, _phi(q, b, met, h), 1, 1) * inverse[b, h, met.here][None]
            scores = jnp.where(allowed, scores, 0.0).astype(key.dtype)
            return acc + dot(scores, d_out[b, met.here, h, columns].astype(key.dtype), 1, 0)

        at.put(dv, at.walk(meet, at.of_state(acc)))

    arrays = q, k, d_out, inverse, d_states
    return _by_block(body, arrays, (v,), segments, chunk, shape, interpret, members=group)[0]


class _Tokens(NamedTuple):
    """Neighbours; the last of a sequence are moved inwards, where those that are not new were met before."""

    here: pl.Slice
    index: Int[Array, "tokens"]
    new: Bool[Array, "tokens"]
    ids: Int[Array, "tokens"]


class _At(NamedTuple):
    """The block of one program. walk(meet, carry) calls meet(tokens, allowed, member of a group, carry) for the tokens
    of its chunk that its rows see, or that see them."""

    b: Int[Array, ""]
    c: Int[Array, ""]
    h: Int[Array, ""]
    columns: pl.Slice
    rows: _Tokens
    owner: Int[Array, ""]  # The segment of the state.
    walk: Callable

    def of_state(self, x):
        """Rows of the state's segment; 0 for others."""
        mine = self.rows.ids == self.owner
        return jnp.where(mine if x.ndim == 1 else mine[:, None], x, 0.0)

    def slope(self, ref):
        """phi' = exp(x) = phi where x <= 0, else 1: the smaller of phi and 1."""
        return jnp.minimum(feature_map(ref[self.b, self.rows.here, self.h, self.columns]), 1.0)

    def put(self, ref, value) -> None:
        place = ref.at[self.b, self.rows.here, self.h, self.columns]
        triton.store(place, value.astype(ref.dtype), mask=self.rows.new[:, None])


def _by_block(body, arrays, places, segments, chunk: int, shape: Shape, interpret: bool, members: int = 0):
    """body(at, *arrays, *places) for every block of rows, head and piece of columns of the first place. Rows are
    queries that look back; or, given the members of a group of heads, keys that look at later queries."""
    batch, time, heads, width = places[0].shape
    rows, tokens, columns = shape[:3]
    blocks, group = -(-time // rows), max(members, 1)

    def kernel(segments, *refs):
        n, piece = divide(pl.program_id(0), width // columns)
        n, h = divide(n, heads)
        b, block = divide(n, blocks)
        first = block * rows
        c = divide(first, chunk)[0]
        mine = _tokens(segments, b, first, rows, time)
        if members:
            low, high = divide(first, tokens)[0] * tokens, jnp.minimum((c + 1) * chunk, time)
        else:
            low, high = c * chunk, jnp.minimum(first + rows, time)

        def walk(meet, carry):
            def step(i, carry):
                i, member = divide(i, group)
                met = _tokens(segments, b, low + i * tokens, tokens, time)
                row, column = mine.index[:, None], met.index[None, :]
                allowed = column >= row if members else column <= row
                allowed &= met.new[None, :] & (mine.ids[:, None] == met.ids[None, :])
                return meet(met, allowed, member, carry)

            return jax.lax.fori_loop(0, _steps(high - low, tokens) * group, step, carry)

        owner = (_last if members else _owner)(segments, b, c, chunk, time)
        body(_At(b, c, h, pl.ds(piece * columns, columns), mine, owner, walk), *refs)

    programs = batch * blocks * heads * (width // columns)
    return _launch(kernel, segments, arrays, places, programs, shape, interpret)


def _launch(kernel, segments, arrays, places, programs: int, shape: Shape, interpret: bool, written_over: bool = False):
    """kernel(segments or None, *arrays, *places)."""
    given = () if segments is None else (segments,)
    return triton.call(
        kernel if given else functools.partial(kernel, None), (*given, *arrays), places, programs,
        warps=shape.warps, stages=shape.stages, interpret=interpret,
        written_over=len(given) + len(arrays) - 1 if written_over else None,
    )


# Without segment ids all are 1, which the compiler folds away.


def _tokens(segments, b, first, count: int, time: int) -> _Tokens:
    start = first if time % count == 0 else jnp.minimum(first, time - count)
    here, index = pl.ds(start, count), start + jnp.arange(count, dtype=jnp.int32)
    new = jnp.ones((count,), bool) if time % count == 0 else index >= first
    return _Tokens(here, index, new, jnp.ones((count,), jnp.int32) if segments is None else segments[b, here])


def _owner(segments, b, c, chunk: int, time: int):
    """Segment of the state before a chunk: that of the token before. The first state is 0, whose ever."""
    return jnp.int32(1) if segments is None else segments[b, jnp.maximum(c * chunk - 1, 0)]


def _last(segments, b, c, chunk: int, time: int):
    """Segment of the state after a chunk: that of its last token."""
    return jnp.int32(1) if segments is None else segments[b, jnp.minimum((c + 1) * chunk, time) - 1]


def _factor(ref):
    return jnp.bfloat16 if ref.dtype == jnp.bfloat16 else jnp.float32


def _phi(ref, b, tokens: _Tokens, h, columns=slice(None)):
    return feature_map(ref[b, tokens.here, h, columns]).astype(_factor(ref))


def _steps(length, tokens: int):
    return divide(length + (tokens - 1), tokens)[0]
