"""The packed kernel of TPUs: a list of tiles, one step of a dynamic grid each, by Pallas with scalar prefetch.

As `portable`, an online softmax (Dao et al., arXiv 2205.14135) meets the tiles of keys that the work list names, and no
others, in both directions. Forward and for dQ the list has the tiles of every block of queries, one after another; for
dK and dV the blocks that meet every tile of keys. What a step needs is fetched while the one before it computes, and
what it shares with that one stays. Queries are packed before and outputs put at their tokens behind, by XLA, for a TPU
cannot read scattered rows. No sum depends on timing: results are the same every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import tpu_steps
from meta_attention_jax.kernels.portable import LogSumExp
from meta_attention_jax.kernels.tpu_steps import FIRST, LAST, WHOLE, Steps, flag
from meta_attention_jax.kernels.worklist import Sizes, WorkList
from meta_attention_jax.mechanisms import base2, mosaic
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.mechanisms.mosaic import DTYPES, LANES, MOST_DIM, dot, lanes
from meta_attention_jax.types import Keys, Queries, Values

KEYS, ROWS = 1024, 256
"""Keys of a tile at most, and queries of a block that are at work at a time."""


def sizes_for(dim: int, time: int, reaches: Sequence[Reach] = ()) -> Sizes:
    """Queries of a block and keys of a tile, by head width and the narrowest window: large, for the sums of a row have
    their price in every tile, and small enough that all fits the memory of the core and a window is no small part of a
    tile. By the cycles of compiled programs (experiments/results/schedule_v5e.json); not timed on a TPU."""
    block = 512 if dim <= LANES else 256
    window = min((reach.window for reach in reaches if reach.window is not None), default=KEYS)
    tile = min(KEYS, max(256, _power(window)), max(LANES, _power(time)))
    # Of few tokens few are packed.
    block = min(block, tile if time < 4096 else _power(time))
    blocks = max(len(reaches), 1) * -(-time // block)
    while tile < KEYS and 5 * blocks * -(-time // tile) > tpu_steps.SCALARS:
        tile *= 2  # Or the list of one sequence is too long.
    return Sizes(block, tile)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def serves(shape: Sequence[Any], dtype: Any) -> bool:
    """Whether queries of this shape, [B, T, H, d], are served; those with symbols (`jax.export`) are left to the
    portable form. Raises ValueError for what the units of a TPU do not take."""
    name, dim = jnp.dtype(dtype).name, shape[-1]
    expected = f"{' or '.join(DTYPES)} and a head dim of at most {MOST_DIM} for 'pallas' on a TPU"
    expect(name in DTYPES and dim <= MOST_DIM, "kernel", expected, f"{name} and head dim {dim}")
    return all(isinstance(size, int) for size in shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q: Queries, k: Keys, v: Values, work: WorkList, softcap: Optional[float] = None, interpret: bool = False
) -> tuple[Queries, LogSumExp]:
    """softmax(q . k / sqrt(d)) v of the packed queries at their tokens, 0 elsewhere; and the log-sum-exp of their
    logits, float32, 0 elsewhere. The list's sizes are one for all mechanisms. Softmax and sums in float32; products of
    float32 as `mosaic.dot` says."""
    return _attend_forward(q, k, v, work, softcap, interpret)[0]


def _attend_forward(q, k, v, work, softcap, interpret):
    cut = _cut(work, softcap, interpret)
    out, lse = _forward(_state(q, k, v, work), tpu_steps.by_block(work), cut)
    result = _at_tokens(out, work).astype(q.dtype), _at_tokens(lse[..., None], work)[..., 0].transpose(0, 2, 1)
    return result, (q, k, v, work, *result)


def _attend_backward(softcap, interpret, saved, cotangents):
    """With P = softmax, L = log-sum-exp: dV = P^T dO, dS = P (dO V^T - sum_d dO O + dL), dQ = dS K, dK = dS^T Q."""
    q, k, v, work, out, lse = saved
    d_out, d_lse = cotangents
    mean = jnp.einsum("bthd,bthd->bht", d_out.astype(jnp.float32), out.astype(jnp.float32)) - d_lse
    state = _state(q, k, v, work)
    # An infinite log-sum-exp makes every weight of a slot that fills a block 0.
    top = _packed(lse.transpose(0, 2, 1)[..., None] * base2.LOG2E, work)[..., 0]
    top = jnp.where(_valid(work)[:, None], top, jnp.inf)
    given = (_packed(d_out.astype(q.dtype), work), top, _packed(mean.transpose(0, 2, 1)[..., None], work)[..., 0])
    cut = _cut(work, softcap, interpret)
    dq = _backward_q(state, given, tpu_steps.by_block(work), cut)
    dk, dv = _backward_kv(state, given, tpu_steps.by_tile(work), cut)
    back = lambda x, like: x[:, :, : like.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)  # noqa: E731
    return _at_tokens(dq, work).astype(q.dtype), back(dk, k), back(dv, v), None


attend.defvjp(_attend_forward, _attend_backward)


class _State(NamedTuple):
    """Everything that the kernels read but for cotangents; slots and keys filled up to whole blocks and tiles."""

    q: Array  # [batch head slot dim]
    k: Array  # [batch kv_head key dim]
    v: Array
    # First and last key of the window of every slot, then of its sinks, the last excluded; the rest is nothing.
    bounds: Int[Array, "batch 8 slot"]


class _Cut(NamedTuple):
    """What is fixed when a program is made."""

    sizes: Sizes
    sinks: bool  # Whether a mechanism has any.
    softcap: Optional[float]
    interpret: bool


def _cut(work: WorkList, softcap: Optional[float], interpret: bool) -> _Cut:
    expect(len(set(work.sizes)) == 1, "work", "a list of one size for all mechanisms", work.sizes)
    return _Cut(work.sizes[0], work.sink_first is not None, softcap, interpret)


def _state(q, k, v, work):
    fill = -q.shape[1] % work.sizes[0].tile
    keys, values = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (k, v))
    sinks = (work.sink_first, work.sink_last) if work.sink_first is not None else ()
    rows = [_filled(x, work) for x in (work.first, work.last, *sinks)]
    nothing = jnp.zeros_like(rows[0])
    bounds = jnp.stack(rows + [nothing] * (8 - len(rows)), axis=1)
    return _State(_packed(q, work), keys, values, bounds)


def _slots(work: WorkList) -> int:
    block = work.sizes[0].block
    return -(-work.order.shape[1] // block) * block


def _filled(x, work):
    return jnp.pad(x, ((0, 0), (0, _slots(work) - x.shape[1])))


def _valid(work: WorkList) -> Bool[Array, "batch slot"]:
    """Slots that do not only fill a block."""
    return _filled((work.order < work.slot.shape[1]).astype(jnp.int32), work) > 0


def _packed(x, work):
    """[batch time head dim] -> [batch head slot dim]."""
    time = x.shape[1]
    at = _filled(jnp.where(work.order < time, work.order, work.order - time), work)
    return jax.vmap(lambda x, at: x[at])(x, at).transpose(0, 2, 1, 3)


def _at_tokens(x, work):
    """[batch head slot dim] -> [batch time head dim], 0 at tokens of no packed mechanism."""
    slots = work.order.shape[1]
    taken = jax.vmap(lambda x, at: x[:, at])(x, jnp.minimum(work.slot, slots - 1)).transpose(0, 2, 1, 3)
    return jnp.where((work.slot < slots)[..., None, None], taken, 0)


def _allowed(bounds, tile, keys: int, sinks: bool, transposed: bool = False):
    """Keys of a tile within reach of each query: [queries keys], or transposed. `bounds` [rows queries]."""
    across = (lambda x: x[None, :]) if transposed else (lambda x: x[:, None])
    shape = (keys, bounds.shape[1]) if transposed else (bounds.shape[1], keys)
    key = tile * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if transposed else 1)
    first, last, sink_first, sink_last = (across(bounds[i]) for i in range(4))
    allowed = (first <= key) & (key <= last)
    return allowed | ((sink_first <= key) & (key < sink_last)) if sinks else allowed


def _either(flags, body: Callable[[bool], None], more: Any = True) -> None:
    """body(masked), where `more`: a program for tiles that are seen whole and one for the others, so that squares need
    not wait in memory for a mask that few of them have."""
    whole = flag(flags, WHOLE)
    pl.when(whole & more)(lambda: body(False))
    pl.when(~whole & more)(lambda: body(True))


def _parts(block: int) -> list[pl.Slice]:
    """Queries that are at work at a time: their squares come near to fitting the registers."""
    return [pl.ds(start, min(block, ROWS)) for start in range(0, block, ROWS)]


def _call(
    kernel: Callable[..., None], steps: Steps, grid: Sequence[Any], inputs: Sequence[tuple[Array, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]], scratch: Sequence[tuple[int, ...]], interpret: bool,
) -> list[Array]:
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3, grid=tuple(grid), in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    made = [mosaic.result(x.shape, x.dtype, inputs[0][0]) for x, _ in outputs]
    # Heads are apart; the steps of one go on from each other.
    order = pltpu.CompilerParams(dimension_semantics=("parallel", *["arbitrary"] * (len(grid) - 1)))
    call = pl.pallas_call(kernel, grid_spec=spec, out_shape=made, interpret=interpret, compiler_params=order)
    return call(steps.packed, steps.row, steps.slot, *(array for array, _ in inputs))


def _fetched(sizes: Sizes, dim: int, at: Callable[..., tuple[Any, Any, Any]]) -> tuple[pl.BlockSpec, ...]:
    """What a step fetches: a block of queries, a tile of keys, the block's bounds, and a number of each of its queries
    in eight rows. `at`: place in the grid -> head of the queries, of the keys, and step."""

    def spec(shape: tuple[int, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index(*given):
            *grid, packed, row, slot = given
            head, kv_head, step = at(*grid)
            block, tile, _ = tpu_steps.of(packed[step])
            return place(row[block], head, kv_head, slot[block], tile)

        return pl.BlockSpec(shape, index)

    block, tile = sizes
    return (
        spec((1, 1, block, dim), lambda row, head, kv_head, slot, tile: (row, head, slot, 0)),
        spec((1, 1, tile, dim), lambda row, head, kv_head, slot, tile: (row, kv_head, tile, 0)),
        spec((1, 8, block), lambda row, head, kv_head, slot, tile: (row, 0, slot)),
        spec((1, 1, 8, block), lambda row, head, kv_head, slot, tile: (row, head, 0, slot)),
    )


def _forward(state: _State, steps: Steps, cut: _Cut):
    (batch, heads, slots, dim), ((block, tile), sinks, softcap, interpret) = state.q.shape, cut
    group, scale = heads // state.k.shape[1], dim**-0.5

    def kernel(packed, row, slot, q, k, v, bounds, out, lse, top, total, acc):
        del row, slot
        _, j, flags = tpu_steps.of(packed[pl.program_id(1)])

        @pl.when(flag(flags, FIRST))
        def _():
            # Far above MASKED: a masked key's weight is exactly 0 before a row meets its first key.
            top[...] = jnp.full_like(top, MASKED / 2)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def meet(masked):
            for rows in _parts(block):
                logits = base2.logits(dot(q[0, 0, rows], k[0, 0], 1, 1), scale, softcap)
                if masked:
                    logits = jnp.where(_allowed(bounds[0, :, rows], j, tile, sinks), logits, MASKED)
                before = top[rows]
                new = jnp.maximum(before, logits.max(axis=1, keepdims=True))
                weights, decay = jnp.exp2(logits - lanes(new, tile)), jnp.exp2(before - new)
                total[rows] = total[rows] * decay + weights.sum(axis=1, keepdims=True)
                acc[rows] = acc[rows] * lanes(decay, dim) + dot(weights.astype(v.dtype), v[0, 0], 1, 0)
                top[rows] = new

        _either(flags, meet)

        @pl.when(flag(flags, LAST))
        def _():
            out[0, 0] = (acc[...] / lanes(total[...], dim)).astype(out.dtype)
            lse[0, 0] = ((top[...] + jnp.log2(total[...])) / base2.LOG2E)[:, :8].T

    of_block, of_tile, of_bounds, of_lse = _fetched(cut.sizes, dim, lambda h, i: (h, h // group, i))
    out, lse = _call(
        kernel, steps, (heads, steps.count),
        ((state.q, of_block), (state.k, of_tile), (state.v, of_tile), (state.bounds, of_bounds)),
        ((jax.ShapeDtypeStruct(state.q.shape, state.q.dtype), of_block),
         (jax.ShapeDtypeStruct((batch, heads, 8, slots), jnp.float32), of_lse)),
        ((block, LANES), (block, LANES), (block, dim)), interpret,
    )
    return out, lse[:, :, 0]


def _rows(x: Array) -> Array:
    """[batch head slot] with eight rows, the least that a step can fetch."""
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], 8, x.shape[2]))


def _backward_q(state: _State, given, steps: Steps, cut: _Cut):
    d_out, lse, mean = given
    (_, heads, _, dim), ((block, tile), sinks, softcap, interpret) = state.q.shape, cut
    group, scale = heads // state.k.shape[1], dim**-0.5

    def kernel(packed, row, slot, q, k, v, bounds, d_out, lse, mean, dq, acc):
        del row, slot
        _, j, flags = tpu_steps.of(packed[pl.program_id(1)])

        @pl.when(flag(flags, FIRST))
        def _():
            acc[...] = jnp.zeros_like(acc)

        def meet(masked):
            for rows in _parts(block):
                logits = base2.logits(dot(q[0, 0, rows], k[0, 0], 1, 1), scale, softcap)
                weights = jnp.exp2(logits - lse[0, 0, 0, rows][:, None])
                if masked:
                    weights = jnp.where(_allowed(bounds[0, :, rows], j, tile, sinks), weights, 0.0)
                d_weights = dot(d_out[0, 0, rows], v[0, 0], 1, 1) - mean[0, 0, 0, rows][:, None]
                d_logits = weights * d_weights * base2.slope(logits, softcap)
                acc[rows] += dot(d_logits.astype(k.dtype), k[0, 0], 1, 0)

        _either(flags, meet)

        @pl.when(flag(flags, LAST))
        def _():
            dq[0, 0] = (acc[...] * scale).astype(dq.dtype)

    of_block, of_tile, of_bounds, of_row = _fetched(cut.sizes, dim, lambda h, i: (h, h // group, i))
    (dq,) = _call(
        kernel, steps, (heads, steps.count),
        ((state.q, of_block), (state.k, of_tile), (state.v, of_tile), (state.bounds, of_bounds), (d_out, of_block),
         (_rows(lse), of_row), (_rows(mean), of_row)),
        ((jax.ShapeDtypeStruct(state.q.shape, state.q.dtype), of_block),), [(block, dim)], interpret,
    )
    return dq


def _backward_kv(state: _State, given, steps: Steps, cut: _Cut):
    d_out, lse, mean = given
    (batch, heads, _, dim), ((block, tile), sinks, softcap, interpret) = state.q.shape, cut
    kv_heads = state.k.shape[1]
    group, scale = heads // kv_heads, dim**-0.5
    blocks = steps.row.shape[0] - batch  # From there on they are of no block.

    def kernel(packed, row, slot, q, k, v, bounds, d_out, lse, mean, dk, dv, acc_k, acc_v):
        del row, slot
        n, j, flags = tpu_steps.of(packed[pl.program_id(1)])
        member = pl.program_id(2)

        @pl.when(flag(flags, FIRST) & (member == 0))
        def _():
            acc_k[...] = jnp.zeros_like(acc_k)
            acc_v[...] = jnp.zeros_like(acc_v)

        def meet(masked):
            for rows in _parts(block):
                query, d = q[0, 0, rows], d_out[0, 0, rows]
                logits = base2.logits(dot(k[0, 0], query, 1, 1), scale, softcap)
                weights = jnp.exp2(logits - lse[0, 0, :1, rows])
                if masked:
                    allowed = _allowed(bounds[0, :, rows], j, tile, sinks, transposed=True)
                    weights = jnp.where(allowed, weights, 0.0)
                d_logits = weights * (dot(v[0, 0], d, 1, 1) - mean[0, 0, :1, rows]) * base2.slope(logits, softcap)
                acc_v[...] += dot(weights.astype(d.dtype), d, 1, 0)
                acc_k[...] += dot(d_logits.astype(query.dtype), query, 1, 0)

        _either(flags, meet, n < blocks)

        @pl.when(flag(flags, LAST) & (member == group - 1))
        def _():
            dk[0, 0] = (acc_k[...] * scale).astype(dk.dtype)
            dv[0, 0] = acc_v[...].astype(dv.dtype)

    of_block, of_tile, of_bounds, of_row = _fetched(
        cut.sizes, dim, lambda g, i, member: (g * group + member, g, i)
    )
    made = jax.ShapeDtypeStruct(state.k.shape, state.k.dtype)
    return _call(
        kernel, steps, (kv_heads, steps.count, group),
        ((state.q, of_block), (state.k, of_tile), (state.v, of_tile), (state.bounds, of_bounds), (d_out, of_block),
         (_rows(lse), of_row), (_rows(mean), of_row)),
        ((made, of_tile), (made, of_tile)), [(tile, dim)] * 2, interpret,
    )
