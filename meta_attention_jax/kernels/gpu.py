"""The packed kernel of NVIDIA GPUs: one program a block of queries, by Pallas in its Triton form.

As `portable`, an online softmax (Dao et al., arXiv 2205.14135) meets the tiles of keys that the work list names, and no
others, in both directions. Forward and for dQ a program serves one block and one head; for dK and dV one tile of keys
and one of their heads, which meets the packed queries that see a key of it. No sum is made by atomics: results are the
same every time. Queries are read where they stand and outputs are written where they belong.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import gpu_rows
from meta_attention_jax.kernels.portable import LogSumExp
from meta_attention_jax.kernels.worklist import Sizes, WorkList
from meta_attention_jax.mechanisms import base2, triton
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.types import Keys, Queries, Values


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
    """By head width and bytes of a number; for 16 bits up to 128 chosen from shapes that an H200 has timed, dense and
    sparse routes together (experiments/results/gpu). No tile has more keys than there are tokens."""
    half = jnp.dtype(dtype).itemsize == 2
    if half and dim <= 64:
        tuning = Tuning(Sizes(128, 128), Shape(64, 64, 4, 3), Shape(64, 64, 4, 3), Shape(32, 64, 4, 3))
    elif half and dim <= 128:
        tuning = Tuning(Sizes(128, 128), Shape(128, 128, 8, 3), Shape(128, 64, 8, 3), Shape(32, 64, 4, 2))
    elif dim <= 128:
        tuning = Tuning(Sizes(64, 64), Shape(64, 32, 4, 2), Shape(64, 32, 8, 2), Shape(32, 64, 8, 2))
    else:
        tuning = Tuning(Sizes(64, 64), Shape(64, 32, 8, 2), Shape(32, 32, 8, 2), Shape(32, 32, 8, 2))
    most = 1 << (time.bit_length() - 1)

    def lowered(shape: Shape) -> Shape:
        return shape._replace(keys=min(shape.keys, most))

    sizes = tuning.sizes._replace(tile=min(tuning.sizes.tile, most))
    return Tuning(sizes, *map(lowered, (tuning.forward, tuning.dq, tuning.dkv)))


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
    return _forward(q, k, v, work, softcap, _checked(tuning, q, work), interpret)


def _checked(tuning: Optional[Tuning], q: Queries, work: WorkList) -> Tuning:
    """The given one, or what suits q; the list must have been made for it."""
    tuning = tuning or tuning_for(q.shape[-1], q.dtype, q.shape[1])
    expect(set(work.sizes) == {tuning.sizes}, "work", f"a list of sizes {tuple(tuning.sizes)} alone", work.sizes)
    return tuning


def _attend_forward(q, k, v, work, softcap, tuning, interpret):
    out, lse = attend(q, k, v, work, softcap, tuning, interpret)
    return (out, lse), (q, k, v, work, out, lse)


def _attend_backward(softcap, tuning, interpret, saved, cotangents):
    tuning = _checked(tuning, saved[0], saved[3])
    return *_backward(*saved, *cotangents, softcap, tuning, interpret), None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, work, softcap, tuning, interpret):
    (q, k, v), (batch, time, heads, dim) = _padded(q, k, v), q.shape
    shape, group, scale = tuning.forward, heads // k.shape[2], dim**-0.5
    parts, lists, programs = tuning.sizes.block // shape.queries, gpu_rows.lists(work), gpu_rows.programs(work)

    def kernel(count, places, *refs):
        *lists, q, k, v, _, _, out, lse = refs
        @gpu_rows.of_part(count, places, lists, shape.queries, parts, heads, time)
        def _(row, h, rows):
            query = q[row, rows.position, h, :]

            def meet(j, keys, whole, carry):
                top, total, acc = carry
                start = gpu_rows.start(j, keys, time)
                key, value = (x[row, pl.ds(start, keys), h // group, :] for x in (k, v))
                logits = base2.logits(triton.dot(query, key, 1, 1), scale, softcap)
                if not whole:
                    logits = jnp.where(gpu_rows.allowed(rows, j, start, keys), logits, MASKED)
                new = jnp.maximum(top, logits.max(1))
                weights, decay = jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)
                acc = acc * decay[:, None] + triton.dot(weights.astype(value.dtype), value, 1, 0)
                return new, total * decay + weights.sum(1), acc

            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            top, total = (jnp.full((shape.queries,), x, jnp.float32) for x in (MASKED / 2, 0.0))
            carry = top, total, jnp.zeros((shape.queries, q.shape[3]), jnp.float32)
            top, total, acc = gpu_rows.walk(rows, shape.keys, meet, carry)
            # What fills the part writes the same numbers to the same place.
            out[row, rows.position, h, :] = (acc / total[:, None]).astype(out.dtype)
            lse[row, h, rows.position] = (top + jnp.log2(total)) / base2.LOG2E

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
    state = q, k, v, d_out, lse * base2.LOG2E, mean
    dq = _backward_q(state, work, softcap, tuning, dim**-0.5, interpret)
    dk, dv = _backward_kv(state, work, softcap, tuning, dim**-0.5, interpret)
    return dq[..., :dim], dk[..., :dim], dv[..., :dim]


def _backward_q(state, work, softcap, tuning, scale, interpret):
    q, k = state[:2]
    (_, time, heads, _), shape = q.shape, tuning.dq
    group, parts = heads // k.shape[2], tuning.sizes.block // shape.queries
    lists, programs = gpu_rows.lists(work), gpu_rows.programs(work)

    def kernel(count, places, *refs):
        *lists, q, k, v, d_out, lse, mean, _, dq = refs
        @gpu_rows.of_part(count, places, lists, shape.queries, parts, heads, time)
        def _(row, h, rows):
            query, g = (x[row, rows.position, h, :] for x in (q, d_out))
            top, shift = (x[row, h, rows.position] for x in (lse, mean))

            def meet(j, keys, whole, acc):
                start = gpu_rows.start(j, keys, time)
                key, value = (x[row, pl.ds(start, keys), h // group, :] for x in (k, v))
                logits = base2.logits(triton.dot(query, key, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[:, None])
                if not whole:
                    weights = jnp.where(gpu_rows.allowed(rows, j, start, keys), weights, 0.0)
                d_logits = weights * (triton.dot(g, value, 1, 1) - shift[:, None]) * base2.slope(logits, softcap)
                return acc + triton.dot(d_logits.astype(key.dtype), key, 1, 0)

            acc = gpu_rows.walk(rows, shape.keys, meet, jnp.zeros((shape.queries, q.shape[3]), jnp.float32))
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
    group, lists, spans = heads // kv_heads, gpu_rows.lists(work), gpu_rows.spans(work, time)
    _, tiles, pieces, _ = spans.shape
    order = gpu_rows.by_length((spans[..., 3] - spans[..., 0]).sum(-1).reshape(-1))
    parts, spans = tile // keys, spans.reshape(batch * tiles, pieces, 4)
    # Packed queries are neighbours, so a program reads them ahead.
    position = jnp.where(work.order < time, work.order, work.order - time)
    q, d_out = (jax.vmap(lambda x, at: x[at])(x, position) for x in (q, d_out))
    lse, mean = (jax.vmap(lambda x, at: x[:, at])(x, position) for x in (lse, mean))
    # An infinite log-sum-exp makes every weight of a slot that fills a block 0.
    lse = jnp.where((work.order < time)[:, None], lse, jnp.inf)

    def kernel(order, spans, *refs):
        *lists, q, k, v, d_out, lse, mean, dk, dv = refs
        n, part, g = gpu_rows.unravel(pl.program_id(0), parts, kv_heads)
        n = order[n]
        row, j = triton.divide(n, tiles)
        j = j * parts + part
        start = gpu_rows.start(j, keys, time)

        @pl.when(j * keys < time)
        def _():
            key, value = (x[row, pl.ds(start, keys), g, :] for x in (k, v))

            def meet(step, whole, carry):
                dk, dv = carry
                step, member = triton.divide(step, group)
                h, slots = g * group + member, pl.ds(step * queries, queries)
                query, d = q[row, slots, h, :], d_out[row, slots, h, :]
                top, shift = lse[row, h, slots], mean[row, h, slots]
                logits = base2.logits(triton.dot(key, query, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - top[None])
                if not whole:
                    rows = gpu_rows.rows(lists, row, step * queries, queries, time)
                    weights = jnp.where(gpu_rows.allowed(rows, j, start, keys, transposed=True), weights, 0.0)
                d_logits = weights * (triton.dot(value, d, 1, 1) - shift[None]) * base2.slope(logits, softcap)
                dv = dv + triton.dot(weights.astype(d.dtype), d, 1, 0)
                return dk + triton.dot(d_logits.astype(query.dtype), query, 1, 0), dv

            zeros = jnp.zeros((keys, dim), jnp.float32)
            carry = zeros, zeros
            for piece in range(pieces):
                low, whole, whole_end, high = (spans[n, piece, i] // queries * group for i in range(4))
                carry = gpu_rows.three(low, whole, whole_end, high, meet, carry)
            new = (start + jnp.arange(keys, dtype=jnp.int32) >= j * keys)[:, None]
            for ref, x in zip((dk, dv), (carry[0] * scale, carry[1])):
                triton.store(ref.at[row, pl.ds(start, keys), g, :], x.astype(ref.dtype), mask=new)

    arguments = (order, spans, *lists, q, k, v, d_out, lse, mean)
    return _call(kernel, arguments, (k, v), None, batch * tiles * parts * kv_heads, shape, interpret)


def _padded(*arrays):
    """Heads filled up with zeros to a width that the compiler takes."""
    dim = arrays[0].shape[-1]
    more = triton.width_for(dim) - dim
    return tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) for x in arrays) if more else arrays


def _call(kernel, arguments, outputs, aliased: Optional[int], programs: int, shape: Shape, interpret: bool):
    return triton.call(
        kernel, arguments, outputs, programs, warps=shape.warps, stages=shape.stages, written_over=aliased,
        interpret=interpret,
    )
