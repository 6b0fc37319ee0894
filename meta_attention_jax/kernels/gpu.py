"""The packed kernel of NVIDIA GPUs: one program a block of queries, by Pallas in its Triton form.

As `portable`, an online softmax (Dao et al., arXiv 2205.14135) meets the tiles of keys that the work list names, and no
others, in both directions. Forward and for dQ a program serves one block and one head; for dK and dV one tile of keys
and one of their heads, which meets the packed queries that see a key of it. No sum is made by atomics: results are the
same every time. Queries are read where they stand and outputs are written where they belong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from meta_attention_jax.kernels.worklist import Sizes, WorkList
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.types import Keys, Queries, Values

LogSumExp = Float[Array, "batch heads time"]

_LOG2E = math.log2(math.e)
LEAST = 16
"""Rows and columns of the smallest product of the matrix units, and so tokens of a sequence."""

MOST_DIM = 256


class Shape(NamedTuple):
    """How one kernel is cut: queries and keys that meet at a time, warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the three kernels are cut; queries and keys divide `sizes`."""

    sizes: Sizes  # Of the work list.
    forward: Shape
    dq: Shape
    dkv: Shape


def tuning_for(dim: int, dtype, time: int) -> Tuning:
    """By head width and bytes of a number; no tile has more keys than there are tokens."""
    half = jnp.dtype(dtype).itemsize == 2
    if half and dim <= 64:
        tuning = Tuning(Sizes(128, 128), Shape(128, 64, 4, 3), Shape(128, 64, 8, 3), Shape(64, 128, 8, 3))
    elif half and dim <= 128:
        tuning = Tuning(Sizes(128, 128), Shape(128, 128, 8, 2), Shape(128, 64, 8, 2), Shape(64, 128, 8, 2))
    elif dim <= 128:
        tuning = Tuning(Sizes(64, 64), Shape(64, 32, 4, 2), Shape(64, 32, 8, 2), Shape(32, 64, 8, 2))
    else:
        tuning = Tuning(Sizes(64, 64), Shape(64, 32, 8, 2), Shape(32, 32, 8, 2), Shape(32, 32, 8, 2))
    most = 1 << (time.bit_length() - 1)

    def lowered(shape: Shape) -> Shape:
        return shape._replace(keys=min(shape.keys, most))

    sizes = tuning.sizes._replace(tile=min(tuning.sizes.tile, most))
    return Tuning(sizes, *map(lowered, (tuning.forward, tuning.dq, tuning.dkv)))


class _Programs(NamedTuple):
    """The blocks of all mechanisms, those that see most keys first."""

    count: Int[Array, "1"]  # How many there are; those that do not exist are last.
    place: Int[Array, "blocks 2"]  # Sequence and first slot.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
    q: Queries,
    k: Keys,
    v: Values,
    work: WorkList,
    softcap: Optional[float] = None,
    tuning: Optional[Tuning] = None,
    interpret: bool = False,
) -> tuple[Queries, LogSumExp]:
    """softmax(q . k / sqrt(d)) v of the packed queries at their tokens, 0 elsewhere; and the log-sum-exp of their
    logits, float32, 0 elsewhere.

    Softmax and sums in float32; products of float32 as `jax.default_matmul_precision` says.
    """
    return _forward(q, k, v, work, softcap, tuning or tuning_for(q.shape[-1], q.dtype, q.shape[1]), interpret)


def _attend_forward(q, k, v, work, softcap, tuning, interpret):
    out, lse = attend(q, k, v, work, softcap, tuning, interpret)
    return (out, lse), (q, k, v, work, out, lse)


def _attend_backward(softcap, tuning, interpret, saved, cotangents):
    q = saved[0]
    tuning = tuning or tuning_for(q.shape[-1], q.dtype, q.shape[1])
    return *_backward(*saved, *cotangents, softcap, tuning, interpret), None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, work, softcap, tuning, interpret):
    (q, k, v), (batch, time, heads, dim) = _padded(q, k, v), q.shape
    shape, group, scale = tuning.forward, heads // k.shape[2], dim**-0.5
    parts, lists, programs = tuning.sizes.block // shape.queries, _lists(work), _programs(work)

    def kernel(count, places, *refs):
        *lists, q, k, v, _, _, out, lse = refs
        n, part, h = _unravel(pl.program_id(0), parts, heads)

        @pl.when(n < count[0])
        def _():
            row = places[n, 0]
            rows = _rows(lists, row, places[n, 1] + part * shape.queries, shape.queries, time)
            query = q[row, rows.position, h, :]

            def meet(j, keys, whole, carry):
                top, total, acc = carry
                start = _start(j, keys, time)
                key, value = (x[row, pl.ds(start, keys), h // group, :] for x in (k, v))
                logits = _logits(_dot(query, key, 1, 1), scale, softcap)
                if not whole:
                    logits = jnp.where(_allowed(rows, j, start, keys), logits, MASKED)
                new = jnp.maximum(top, logits.max(1))
                weights, decay = jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)
                acc = acc * decay[:, None] + _dot(weights.astype(value.dtype), value, 1, 0)
                return new, total * decay + weights.sum(1), acc

            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            top, total = (jnp.full((shape.queries,), x, jnp.float32) for x in (MASKED / 2, 0.0))
            carry = top, total, jnp.zeros((shape.queries, q.shape[3]), jnp.float32)
            top, total, acc = _walk(rows, shape.keys, meet, carry)
            # A slot that fills the block repeats a query, and writes the same numbers to the same place.
            out[row, rows.position, h, :] = (acc / total[:, None]).astype(out.dtype)
            lse[row, h, rows.position] = (top + jnp.log2(total)) / _LOG2E

    places = jnp.zeros_like(q), jnp.zeros((batch, heads, time), jnp.float32)
    arguments = (*programs, *lists, q, k, v, *places)
    number = programs.place.shape[0] * parts * heads
    out, lse = _call(kernel, arguments, places, len(arguments) - 2, number, shape, interpret)
    return out[..., :dim], lse


def _backward(q, k, v, work, out, lse, d_out, d_lse, softcap, tuning, interpret):
    """With P = softmax, L = log-sum-exp: dV = P^T dO, dS = P (dO V^T - sum_d dO O + dL), dQ = dS K, dK = dS^T Q."""
    dim = q.shape[-1]
    mean = jnp.einsum("bthd,bthd->bht", d_out.astype(jnp.float32), out.astype(jnp.float32)) - d_lse
    q, k, v, d_out = _padded(q, k, v, d_out.astype(q.dtype))
    state = q, k, v, d_out, lse * _LOG2E, mean
    dq = _backward_q(state, work, softcap, tuning, dim**-0.5, interpret)
    dk, dv = _backward_kv(state, work, softcap, tuning, dim**-0.5, interpret)
    return dq[..., :dim], dk[..., :dim], dv[..., :dim]


def _backward_q(state, work, softcap, tuning, scale, interpret):
    q, k = state[:2]
    (_, time, heads, _), shape = q.shape, tuning.dq
    group, parts = heads // k.shape[2], tuning.sizes.block // shape.queries
    lists, programs = _lists(work), _programs(work)

    def kernel(count, places, *refs):
        *lists, q, k, v, d_out, lse, mean, _, dq = refs
        n, part, h = _unravel(pl.program_id(0), parts, heads)

        @pl.when(n < count[0])
        def _():
            row = places[n, 0]
            rows = _rows(lists, row, places[n, 1] + part * shape.queries, shape.queries, time)
            query, g = (x[row, rows.position, h, :] for x in (q, d_out))
            top, shift = (x[row, h, rows.position] for x in (lse, mean))

            def meet(j, keys, whole, acc):
                start = _start(j, keys, time)
                key, value = (x[row, pl.ds(start, keys), h // group, :] for x in (k, v))
                logits = _logits(_dot(query, key, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[:, None])
                if not whole:
                    weights = jnp.where(_allowed(rows, j, start, keys), weights, 0.0)
                d_logits = weights * (_dot(g, value, 1, 1) - shift[:, None]) * _slope(logits, softcap)
                return acc + _dot(d_logits.astype(key.dtype), key, 1, 0)

            acc = _walk(rows, shape.keys, meet, jnp.zeros((shape.queries, q.shape[3]), jnp.float32))
            dq[row, rows.position, h, :] = (acc * scale).astype(dq.dtype)

    places = (jnp.zeros_like(q),)
    arguments = (*programs, *lists, *state, *places)
    number = programs.place.shape[0] * parts * heads
    (dq,) = _call(kernel, arguments, places, len(arguments) - 1, number, shape, interpret)
    return dq


def _backward_kv(state, work, softcap, tuning, scale, interpret):
    q, k, v, d_out, lse, mean = state
    (batch, time, heads, dim), shape = q.shape, tuning.dkv
    kv_heads, (_, tile), queries, keys = k.shape[2], tuning.sizes, shape.queries, shape.keys
    group, lists, spans = heads // kv_heads, _lists(work), _spans(work, time)
    spans = jnp.stack([jnp.stack(span, -1) for span in spans], -2)
    _, tiles, pieces, _ = spans.shape
    order = _by_length((spans[..., 3] - spans[..., 0]).sum(-1).reshape(-1))
    parts, spans = tile // keys, spans.reshape(batch * tiles, pieces, 4)
    # Packed queries are neighbours, so a program reads them ahead.
    position = jnp.where(work.order < time, work.order, work.order - time)
    q, d_out = (jax.vmap(lambda x, at: x[at])(x, position) for x in (q, d_out))
    lse, mean = (jax.vmap(lambda x, at: x[:, at])(x, position) for x in (lse, mean))
    # An infinite log-sum-exp makes every weight of a slot that fills a block 0.
    lse = jnp.where((work.order < time)[:, None], lse, jnp.inf)

    def kernel(order, spans, *refs):
        *lists, q, k, v, d_out, lse, mean, dk, dv = refs
        n, part, g = _unravel(pl.program_id(0), parts, kv_heads)
        n = order[n]
        row, j = _divide(n, tiles)
        j = j * parts + part
        start = _start(j, keys, time)

        @pl.when(j * keys < time)
        def _():
            key, value = (x[row, pl.ds(start, keys), g, :] for x in (k, v))

            def meet(step, whole, carry):
                dk, dv = carry
                step, member = _divide(step, group)
                h, slots = g * group + member, pl.ds(step * queries, queries)
                query, d = q[row, slots, h, :], d_out[row, slots, h, :]
                top, shift = lse[row, h, slots], mean[row, h, slots]
                logits = _logits(_dot(key, query, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[None])
                if not whole:
                    rows = _rows(lists, row, step * queries, queries, time)
                    weights = jnp.where(_allowed(rows, j, start, keys, transposed=True), weights, 0.0)
                d_logits = weights * (_dot(value, d, 1, 1) - shift[None]) * _slope(logits, softcap)
                dv = dv + _dot(weights.astype(d.dtype), d, 1, 0)
                return dk + _dot(d_logits.astype(query.dtype), query, 1, 0), dv

            zeros = jnp.zeros((keys, dim), jnp.float32)
            carry = zeros, zeros
            for piece in range(pieces):
                low, whole, whole_end, high = (spans[n, piece, i] // queries * group for i in range(4))
                carry = _three(low, whole, whole_end, high, meet, carry)
            new = (start + jnp.arange(keys, dtype=jnp.int32) >= j * keys)[:, None]
            for ref, x in zip((dk, dv), (carry[0] * scale, carry[1])):
                triton.store(ref.at[row, pl.ds(start, keys), g, :], x.astype(ref.dtype), mask=new)

    arguments = (order, spans, *lists, q, k, v, d_out, lse, mean)
    return _call(kernel, arguments, (k, v), None, batch * tiles * parts * kv_heads, shape, interpret)


class _Rows(NamedTuple):
    """Packed queries: where they stand, which of them do not only fill a block, and the keys that they may see."""

    position: Int[Array, "queries"]
    valid: Array
    first: Int[Array, "queries"]
    last: Int[Array, "queries"]
    sinks: tuple[Array, ...]  # (first, last) of the sinks, the last excluded; or nothing.


def _programs(work: WorkList) -> _Programs:
    row, slot = (jnp.concatenate([getattr(b, name) for b in work.blocks]) for name in ("row", "slot"))
    exists = jnp.concatenate([jnp.arange(b.row.shape[0], dtype=jnp.int32) < b.count for b in work.blocks])
    last = slot + max(size.block for size in work.sizes) - 1
    length = jnp.where(exists, work.last[row, last] - work.first[row, slot] + 1, 0)
    place = jnp.stack([row, slot], -1)[_by_length(length)]
    return _Programs(exists.sum(dtype=jnp.int32)[None], place)


def _by_length(length: Int[Array, "n"]) -> Int[Array, "n"]:
    """The order of falling lengths, by counting what is longer: one step for a GPU, where sorting takes many."""
    index = jnp.arange(length.shape[0], dtype=jnp.int32)
    longer = length[None] > length[:, None]
    longer |= (length[None] == length[:, None]) & (index[None] < index[:, None])
    rank = longer.sum(1, dtype=jnp.int32)
    return jnp.zeros_like(index).at[rank].set(index, unique_indices=True)


def _lists(work: WorkList) -> tuple[Array, ...]:
    sinks = () if work.sink_first is None else (work.sink_first, work.sink_last)
    return (work.order, work.first, work.last, *sinks)


def _spans(work: WorkList, time: int) -> list[tuple[Int[Array, "batch tiles"], ...]]:
    """By mechanism, and once more for its sinks: of every tile the slots [low, high) whose blocks meet it, and among
    them [whole, whole_end), which see all of it. They are neighbours, since the tiles of the blocks of one sequence
    begin and end in order."""
    batch, spans = work.order.shape[0], []
    for m, blocks in enumerate(work.blocks):
        block, tile = work.sizes[m]
        j = jnp.arange(-(-time // tile), dtype=jnp.int32)
        mine = blocks.row[None] == jnp.arange(batch, dtype=jnp.int32)[:, None]
        mine &= jnp.arange(blocks.row.shape[0], dtype=jnp.int32)[None] < blocks.count
        first = jnp.min(jnp.where(mine, blocks.slot[None], work.order.shape[1]), axis=1)

        def slot(x, mine=mine, first=first, block=block, j=j):
            """After the blocks of the sequence whose x is at most j."""
            below = (mine[:, None] & (x[None, None] <= j[None, :, None])).sum(-1, dtype=jnp.int32)
            return first[:, None] + below * block

        low, high = slot(blocks.high), slot(blocks.low)
        whole, whole_end = slot(blocks.whole_end), slot(blocks.whole)
        spans.append((low, jnp.maximum(whole, low), jnp.maximum(whole_end, low), jnp.maximum(high, low)))
        if work.reaches[m].sinks:
            low, high = slot(blocks.sink_high), slot(blocks.sink_low)
            spans.append((low, low, low, jnp.maximum(high, low)))
    return spans


def _rows(lists, row, slot, queries: int, time: int) -> _Rows:
    order, first, last, *sinks = (x[row, pl.ds(slot, queries)] for x in lists)
    valid = order < time
    return _Rows(jnp.where(valid, order, order - time), valid, first, last, tuple(sinks))


def _walk(rows: _Rows, keys: int, meet, carry):
    """meet(tile, its keys, whole, carry) for every tile of a block: those that need no mask, then the others, then
    small ones for the sinks before them."""
    low, high = rows.first.min() // keys, rows.last.max() // keys + 1
    whole = jnp.minimum((rows.first.max() + keys - 1) // keys, high)
    whole_end = jnp.maximum((rows.last.min() + 1) // keys, whole)
    if rows.sinks:
        begins, ends = rows.sinks[0].min(), rows.sinks[1].max()
        high = jnp.maximum(high, (ends + keys - 1) // keys)  # In both directions they can lie ahead of the window.
    carry = _three(low, whole, whole_end, high, lambda j, whole, carry: meet(j, keys, whole, carry), carry)
    if not rows.sinks:
        return carry
    ends = jnp.minimum((ends + LEAST - 1) // LEAST, low * (keys // LEAST))
    return jax.lax.fori_loop(begins // LEAST, ends, lambda j, carry: meet(j, LEAST, False, carry), carry)


def _three(low, whole, whole_end, high, meet, carry):
    """meet(i, whole, carry) for i in [whole, whole_end), then for the others in [low, high)."""

    def edge(step, carry):
        i = low + step
        return meet(jnp.where(i >= whole, i + whole_end - whole, i), False, carry)

    carry = jax.lax.fori_loop(whole, whole_end, lambda i, carry: meet(i, True, carry), carry)
    return jax.lax.fori_loop(0, high - low - (whole_end - whole), edge, carry)


def _divide(n, by: int):
    """Quotient and rest of what is not negative."""
    by = np.int32(by)
    return jax.lax.div(n, by), jax.lax.rem(n, by)


def _unravel(n, parts: int, heads: int):
    """(block, part of it, head): the heads of a block, which read neighbouring keys, run side by side."""
    n, h = _divide(n, heads)
    return *_divide(n, parts), h


def _start(j, keys: int, time: int):
    """First key of a tile; the last one is moved inwards."""
    return jnp.minimum(j * keys, time - keys)


def _allowed(rows: _Rows, j, start, keys: int, transposed: bool = False):
    """Keys within reach of each query, and new: not of the tile before, where this one overlaps it."""
    index = start + jnp.arange(keys, dtype=jnp.int32)
    across = (lambda x: x[None, :]) if transposed else (lambda x: x[:, None])
    key = index[:, None] if transposed else index[None, :]
    allowed = (across(rows.first) <= key) & (key <= across(rows.last))
    if rows.sinks:
        first, last = rows.sinks
        allowed |= (across(first) <= key) & (key < across(last))
    allowed &= key >= j * keys
    return allowed & across(rows.valid) if transposed else allowed


def _dot(x, y, x_axis: int, y_axis: int):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _logits(products, scale: float, softcap: Optional[float]):
    """In units of log 2, for exp2."""
    if softcap is None:
        return products * (scale * _LOG2E)
    return softcap * _LOG2E * _tanh(products * (scale / softcap))


def _tanh(x):
    """By exp, in float32; the matrix units' own is too coarse."""
    return 1.0 - 2.0 / (jnp.exp2(2.0 * _LOG2E * x) + 1.0)


def _slope(logits, softcap: Optional[float]):
    if softcap is None:
        return 1.0
    return 1.0 - (logits / (softcap * _LOG2E)) ** 2


def _padded(*arrays):
    """Head widths up to the next power of two, which the compiler asks for."""
    dim = arrays[0].shape[-1]
    width = max(LEAST, 1 << (dim - 1).bit_length())
    if width == dim:
        return arrays
    return tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, width - dim)]) for x in arrays)


def _call(kernel, arguments, outputs, aliased: Optional[int], programs: int, shape: Shape, interpret: bool):
    """`pallas_call` on whole arrays; from argument `aliased` on they are what the outputs are written into."""
    params = {} if interpret else {
        "compiler_params": triton.CompilerParams(num_warps=shape.warps, num_stages=shape.stages)
    }
    aliases = {} if aliased is None else {aliased + i: i for i in range(len(outputs))}
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases=aliases,
        interpret=interpret,
        **params,
    )(*arguments)
