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


class _Table(NamedTuple):
    """The blocks of all mechanisms side by side, the longest first; those that do not exist are last."""

    row: Int[Array, "blocks"]
    slot: Int[Array, "blocks"]
    low: Int[Array, "blocks"]
    whole: Int[Array, "blocks"]
    whole_end: Int[Array, "blocks"]
    high: Int[Array, "blocks"]
    sink_low: Int[Array, "blocks"]
    sink_high: Int[Array, "blocks"]
    count: Int[Array, "1"]


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
    shape, group = tuning.forward, heads // k.shape[2]
    queries, keys = shape.queries, shape.keys
    table = _table(work)
    scale = dim**-0.5
    parts = tuning.sizes.block // queries
    lists = _lists(work)

    def kernel(*refs):
        (*scalars, count, lists, q, k, v, _, _, out, lse) = _named(refs, table, lists_given)
        n, part, h = _unravel(pl.program_id(0), parts, heads)

        @pl.when(n < count[0])
        def _():
            at = _Block(*(x[n] for x in scalars))
            rows = _rows(lists, at.row, at.slot + part * queries, queries, time)
            query = q[at.row, rows.position, h, :]

            def meet(j, whole, carry):
                top, total, acc = carry
                start = _start(j, keys, time)
                key = k[at.row, pl.ds(start, keys), h // group, :]
                value = v[at.row, pl.ds(start, keys), h // group, :]
                logits = _logits(_dot(query, key, 1, 1), scale, softcap)
                if not whole:
                    logits = jnp.where(_allowed(rows, j, start, keys), logits, MASKED)
                new = jnp.maximum(top, logits.max(1))
                weights, decay = jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)
                acc = acc * decay[:, None] + _dot(weights.astype(value.dtype), value, 1, 0)
                return new, total * decay + weights.sum(1), acc

            zeros = jnp.zeros((queries, query.shape[1]), jnp.float32)
            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            start = jnp.full((queries,), MASKED / 2, jnp.float32), jnp.zeros((queries,), jnp.float32), zeros
            top, total, acc = _walk(at, tuning.sizes.tile // keys, bool(rows.sinks), meet, start)
            # A slot that fills the block repeats a query, and writes the same numbers to the same place.
            out[at.row, rows.position, h, :] = (acc / total[:, None]).astype(out.dtype)
            lse[at.row, h, rows.position] = (top + jnp.log2(total)) / _LOG2E

    lists_given = len(lists)
    places = jnp.zeros_like(q), jnp.zeros((batch, heads, time), jnp.float32)
    arguments = (*table, *lists, q, k, v, *places)
    out, lse = _call(
        kernel, arguments, places, len(arguments) - 2, table.row.shape[0] * parts * heads, shape, interpret
    )
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
    group, queries, keys = heads // k.shape[2], shape.queries, shape.keys
    table, lists = _table(work), _lists(work)
    parts, lists_given = tuning.sizes.block // queries, len(lists)

    def kernel(*refs):
        (*scalars, count, lists, q, k, v, d_out, lse, mean, _, dq) = _named(refs, table, lists_given)
        n, part, h = _unravel(pl.program_id(0), parts, heads)

        @pl.when(n < count[0])
        def _():
            at = _Block(*(x[n] for x in scalars))
            rows = _rows(lists, at.row, at.slot + part * queries, queries, time)
            query, g = q[at.row, rows.position, h, :], d_out[at.row, rows.position, h, :]
            top, shift = lse[at.row, h, rows.position], mean[at.row, h, rows.position]

            def meet(j, whole, acc):
                start = _start(j, keys, time)
                key = k[at.row, pl.ds(start, keys), h // group, :]
                value = v[at.row, pl.ds(start, keys), h // group, :]
                logits = _logits(_dot(query, key, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[:, None])
                if not whole:
                    weights = jnp.where(_allowed(rows, j, start, keys), weights, 0.0)
                d_logits = weights * (_dot(g, value, 1, 1) - shift[:, None]) * _slope(logits, softcap)
                return acc + _dot(d_logits.astype(key.dtype), key, 1, 0)

            zeros = jnp.zeros((queries, query.shape[1]), jnp.float32)
            acc = _walk(at, tuning.sizes.tile // keys, bool(rows.sinks), meet, zeros)
            dq[at.row, rows.position, h, :] = (acc * scale).astype(dq.dtype)

    places = (jnp.zeros_like(q),)
    arguments = (*table, *lists, *state, *places)
    (dq,) = _call(kernel, arguments, places, len(arguments) - 1, table.row.shape[0] * parts * heads, shape, interpret)
    return dq


def _backward_kv(state, work, softcap, tuning, scale, interpret):
    q, k, v = state[:3]
    (batch, time, heads, dim), shape = q.shape, tuning.dkv
    kv_heads, queries, keys = k.shape[2], shape.queries, shape.keys
    group, lists, tile = heads // kv_heads, _lists(work), tuning.sizes.tile
    spans = _spans(work, time)  # Slots that see a key of a tile.
    order = jnp.argsort(-sum(high - low for low, high in spans).reshape(-1)).astype(jnp.int32)
    parts, tiles, pieces = tile // keys, spans[0][0].shape[1], len(spans)
    flat = [x.reshape(-1) for span in spans for x in span]
    lists_given = len(lists)

    def kernel(*refs):
        order, refs = refs[0], refs[1:]
        spans, refs = refs[: 2 * pieces], refs[2 * pieces :]
        lists, (q, k, v, d_out, lse, mean, dk, dv) = refs[:lists_given], refs[lists_given:]
        n, part, g = _unravel(pl.program_id(0), parts, kv_heads)
        n = order[n]
        row, j = _divide(n, tiles)
        j = j * parts + part
        start = _start(j, keys, time)

        @pl.when(j * keys < time)
        def _():
            key, value = k[row, pl.ds(start, keys), g, :], v[row, pl.ds(start, keys), g, :]

            def meet(step, carry, slot):
                dk, dv = carry
                step, member = _divide(step, group)
                h = g * group + member
                rows = _rows(lists, row, slot + step * queries, queries, time)
                query, d = q[row, rows.position, h, :], d_out[row, rows.position, h, :]
                top, shift = lse[row, h, rows.position], mean[row, h, rows.position]
                logits = _logits(_dot(key, query, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[None])
                weights = jnp.where(_allowed(rows, j, start, keys, transposed=True), weights, 0.0)
                d_logits = weights * (_dot(value, d, 1, 1) - shift[None]) * _slope(logits, softcap)
                dv = dv + _dot(weights.astype(d.dtype), d, 1, 0)
                return dk + _dot(d_logits.astype(query.dtype), query, 1, 0), dv

            zeros = jnp.zeros((keys, dim), jnp.float32)
            carry = zeros, zeros
            for low, high in zip(spans[::2], spans[1::2]):
                slot, steps = low[n], _divide(high[n] - low[n], queries)[0] * group
                carry = jax.lax.fori_loop(0, steps, functools.partial(meet, slot=slot), carry)
            new = (start + jnp.arange(keys, dtype=jnp.int32) >= j * keys)[:, None]
            _store(dk.at[row, pl.ds(start, keys), g, :], (carry[0] * scale).astype(dk.dtype), new)
            _store(dv.at[row, pl.ds(start, keys), g, :], carry[1].astype(dv.dtype), new)

    arguments = (order, *flat, *lists, *state)
    return _call(kernel, arguments, (k, v), None, batch * tiles * parts * kv_heads, shape, interpret)


class _Block(NamedTuple):
    """What the table says of one block."""

    row: Int[Array, ""]
    slot: Int[Array, ""]
    low: Int[Array, ""]
    whole: Int[Array, ""]
    whole_end: Int[Array, ""]
    high: Int[Array, ""]
    sink_low: Int[Array, ""]
    sink_high: Int[Array, ""]


class _Rows(NamedTuple):
    """Packed queries: where they stand, which of them do not only fill a block, and the keys that they may see."""

    position: Int[Array, "queries"]
    valid: Array
    first: Int[Array, "queries"]
    last: Int[Array, "queries"]
    sinks: tuple[Array, ...]  # (first, last) of the sinks, the last excluded; or nothing.


def _table(work: WorkList) -> _Table:
    def joined(name: str) -> Array:
        return jnp.concatenate([getattr(blocks, name) for blocks in work.blocks])

    exists = jnp.concatenate([jnp.arange(b.row.shape[0], dtype=jnp.int32) < b.count for b in work.blocks])
    columns = [joined(name) for name in _Table._fields[:-1]]
    low, high, sink_low, sink_high = (joined(name) for name in ("low", "high", "sink_low", "sink_high"))
    length = jnp.where(exists, high - low + sink_high - sink_low, -1)
    order = jnp.argsort(-length)
    return _Table(*(x[order] for x in columns), exists.sum(dtype=jnp.int32)[None])


def _lists(work: WorkList) -> tuple[Array, ...]:
    sinks = () if work.sink_first is None else (work.sink_first, work.sink_last)
    return (work.order, work.first, work.last, *sinks)


def _spans(work: WorkList, time: int) -> list[tuple[Int[Array, "batch tiles"], Int[Array, "batch tiles"]]]:
    """By mechanism, and once more for its sinks: of every tile the slots [low, high) whose blocks meet it. They are
    neighbours, since the tiles of the blocks of one sequence begin and end in order."""
    batch, spans = work.order.shape[0], []
    for m, blocks in enumerate(work.blocks):
        block, tile = work.sizes[m]
        j = jnp.arange(-(-time // tile), dtype=jnp.int32)
        mine = blocks.row[None] == jnp.arange(batch, dtype=jnp.int32)[:, None]
        mine &= jnp.arange(blocks.row.shape[0], dtype=jnp.int32)[None] < blocks.count
        first = jnp.min(jnp.where(mine, blocks.slot[None], work.order.shape[1]), axis=1)

        def span(low, high, mine=mine, first=first, block=block, j=j):
            def below(x):  # Blocks of the sequence whose x is at most j.
                return (mine[:, None] & (x[None, None] <= j[None, :, None])).sum(-1, dtype=jnp.int32)

            begin, end = below(high), below(low)
            return first[:, None] + begin * block, first[:, None] + jnp.maximum(end, begin) * block

        spans.append(span(blocks.low, blocks.high))
        if work.reaches[m].sinks:
            spans.append(span(blocks.sink_low, blocks.sink_high))
    return spans


def _named(refs, table, lists_given):
    """The table's columns, its count, the lists in one tuple, and the rest."""
    columns, rest = refs[: len(table)], refs[len(table) :]
    return *columns, rest[:lists_given], *rest[lists_given:]


def _rows(lists, row, slot, queries: int, time: int) -> _Rows:
    order, first, last, *sinks = (x[row, pl.ds(slot, queries)] for x in lists)
    valid = order < time
    return _Rows(jnp.where(valid, order, order - time), valid, first, last, tuple(sinks))


def _walk(at: _Block, parts: int, sinks: bool, meet, carry):
    """meet(tile index, whole, carry) for every tile of a block, in tiles `parts` times smaller than the list's: those
    that need no mask, then the others, then those of the sinks."""
    low, whole, whole_end, high, sink_low, sink_high = (x * parts for x in at[2:])

    def edge(step, carry):
        j = low + step
        return meet(jnp.where(j >= whole, j + whole_end - whole, j), False, carry)

    carry = jax.lax.fori_loop(whole, whole_end, lambda j, carry: meet(j, True, carry), carry)
    carry = jax.lax.fori_loop(0, high - low - (whole_end - whole), edge, carry)
    if not sinks:
        return carry
    return jax.lax.fori_loop(sink_low, sink_high, lambda j, carry: meet(j, False, carry), carry)


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


def _store(ref, value, mask):
    from jax.experimental.pallas import triton

    triton.store(ref, value, mask=mask)


def _call(kernel, arguments, outputs, aliased: Optional[int], programs: int, shape: Shape, interpret: bool):
    """`pallas_call` on whole arrays; from argument `aliased` on they are what the outputs are written into."""
    from jax.experimental.pallas import triton

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
