"""Packed queries as the three kernels of `gpu` meet them: where they stand, what they see, and in which order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from meta_attention_jax.kernels.worklist import WorkList
from meta_attention_jax.mechanisms.triton import LEAST, divide


class Programs(NamedTuple):
    """The blocks of all mechanisms, those that see most keys first."""

    count: Int[Array, "1"]  # How many there are; those that do not exist are last.
    place: Int[Array, "blocks 2"]  # Sequence and first slot.


def programs(work: WorkList) -> Programs:
    row, slot = (jnp.concatenate([getattr(b, name) for b in work.blocks]) for name in ("row", "slot"))
    exists = jnp.concatenate([jnp.arange(b.row.shape[0], dtype=jnp.int32) < b.count for b in work.blocks])
    last = slot + work.sizes[0].block - 1  # All are alike.
    length = jnp.where(exists, work.last[row, last] - work.first[row, slot] + 1, 0)
    place = jnp.stack([row, slot], -1)[by_length(length)]
    return Programs(exists.sum(dtype=jnp.int32)[None], place)


def by_length(length: Int[Array, "n"]) -> Int[Array, "n"]:
    """The order of falling lengths, by counting what is longer: one step for a GPU, where sorting takes many."""
    index = jnp.arange(length.shape[0], dtype=jnp.int32)
    longer = length[None] > length[:, None]
    longer |= (length[None] == length[:, None]) & (index[None] < index[:, None])
    rank = longer.sum(1, dtype=jnp.int32)
    return jnp.zeros_like(index).at[rank].set(index, unique_indices=True)


def spans(work: WorkList, time: int) -> Int[Array, "batch tiles pieces 4"]:
    """(low, whole, whole_end, high) of every tile, by mechanism and once more for its sinks: the slots [low, high) have
    the blocks that meet it, and among them those of [whole, whole_end) see all of it. They are neighbours, since the
    tiles of the blocks of one sequence begin and end in order."""
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
        spans.append((low, whole, whole_end, high))
        if work.reaches[m].sinks:
            low, high = slot(blocks.sink_high), slot(blocks.sink_low)
            spans.append((low, low, low, high))
    return jnp.stack([jnp.stack(span, -1) for span in spans], -2)


class Rows(NamedTuple):
    """Packed queries: where they stand, which of them do not only fill a block, and the keys that they may see."""

    position: Int[Array, "queries"]
    valid: Array
    first: Int[Array, "queries"]
    last: Int[Array, "queries"]
    sinks: tuple[Array, ...]  # (first, last) of the sinks, the last excluded; or nothing.


def lists(work: WorkList) -> tuple[Array, ...]:
    sinks = () if work.sink_first is None else (work.sink_first, work.sink_last)
    return (work.order, work.first, work.last, *sinks)


def rows(lists, row, slot, queries: int, time: int) -> Rows:
    order, first, last, *sinks = (x[row, pl.ds(slot, queries)] for x in lists)
    valid = order < time
    return Rows(jnp.where(valid, order, order - time), valid, first, last, tuple(sinks))


def walk(rows: Rows, keys: int, meet, carry):
    """meet(tile, its keys, whole, carry) for every tile of a block: those that need no mask, then the others, then
    small ones for the sinks before them."""
    low, high = rows.first.min() // keys, rows.last.max() // keys + 1
    whole = jnp.minimum((rows.first.max() + keys - 1) // keys, high)
    whole_end = jnp.maximum((rows.last.min() + 1) // keys, whole)
    if rows.sinks:
        high = jnp.maximum(high, (rows.sinks[1].max() + keys - 1) // keys)  # In both directions they can lie ahead.
        # Those of later segments stand among the tiles above.
        begins = rows.sinks[0].min()
        ends = jnp.where(rows.sinks[0] == begins, rows.sinks[1], 0).max()
    carry = three(low, whole, whole_end, high, lambda j, whole, carry: meet(j, keys, whole, carry), carry)
    if not rows.sinks:
        return carry
    ends = jnp.minimum((ends + LEAST - 1) // LEAST, low * (keys // LEAST))
    return jax.lax.fori_loop(begins // LEAST, ends, lambda j, carry: meet(j, LEAST, False, carry), carry)


def three(low, whole, whole_end, high, meet, carry):
    """meet(i, whole, carry) for i in [whole, whole_end), then for the others in [low, high)."""

    def edge(step, carry):
        i = low + step
        return meet(jnp.where(i >= whole, i + whole_end - whole, i), False, carry)

    carry = jax.lax.fori_loop(whole, whole_end, lambda i, carry: meet(i, True, carry), carry)
    return jax.lax.fori_loop(0, high - low - (whole_end - whole), edge, carry)


def unravel(n, parts: int, heads: int):
    """(block, part of it, head): the heads of a block, which read neighbouring keys, run side by side."""
    n, h = divide(n, heads)
    return *divide(n, parts), h


def of_part(count, places, lists, queries: int, parts: int, heads: int, time: int):
    """Decorator: body(sequence, head, rows) for this program's part of a block, if it has a query.

    A slot that only fills a block repeats the query before it: in the same part, if the part has one.
    """
    n, part, h = unravel(pl.program_id(0), parts, heads)
    row, slot = places[n, 0], places[n, 1] + part * queries

    def given(body):
        @pl.when((n < count[0]) & (lists[0][row, slot] < time))
        def _():
            body(row, h, rows(lists, row, slot, queries, time))

    return given


def start(j, keys: int, time: int):
    """First key of a tile; the last one is moved inwards."""
    return jnp.minimum(j * keys, time - keys)


def allowed(rows: Rows, j, start, keys: int, transposed: bool = False):
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
