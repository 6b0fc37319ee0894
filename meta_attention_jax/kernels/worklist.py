"""What packed attention has to do for a batch of routes: which queries, in which blocks, on which keys.

The tokens of every mechanism that has a packed form are packed in order of position, in blocks that belong to one
mechanism and one sequence; the last block of each is filled up. A token may see one interval of keys, its window or its
whole past, and the first tokens (`sinks`) of its segment. For every block the list names the tiles of keys that hold
one which one of its queries may see. It is built once for a layer's routes; forward pass, backward pass and accounting
all read it.

All shapes are static; how many blocks and tiles there are follows the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.types import SegmentIds

Index = Int[Array, ""]


class Sizes(NamedTuple):
    """Queries of a block, and keys of a tile."""

    block: int
    tile: int


class Blocks(NamedTuple):
    """The blocks of one mechanism, those of the first sequence first.

    Entries from `count` on mean nothing. Tiles are half-open intervals of tile indices.
    """

    count: Index  # How many there are.
    row: Int[Array, "blocks"]  # Sequence of each.
    slot: Int[Array, "blocks"]  # Its first slot.
    low: Int[Array, "blocks"]  # Tiles that hold the windows of its queries, and sinks ahead of them.
    high: Int[Array, "blocks"]
    whole: Int[Array, "blocks"]  # Those among them in which every query of the block sees every key.
    whole_end: Int[Array, "blocks"]
    sink_low: Int[Array, "blocks"]  # Tiles before `low` that hold sinks; empty without any.
    sink_high: Int[Array, "blocks"]


@flax.struct.dataclass
class WorkList:
    """What there is to do. A *slot* is a place of a packed query in its sequence."""

    # Position of a slot's query; slots that only fill a block repeat a query of it, T higher, which no array has.
    order: Int[Array, "batch slots"]
    slot: Int[Array, "batch time"]  # Of every token; S, which there is not, for tokens of no packed mechanism.
    first: Int[Array, "batch slots"]  # Of every slot the keys of its window, last included.
    last: Int[Array, "batch slots"]
    sink_first: Optional[Int[Array, "batch slots"]]  # Of every slot the sinks, `sink_last` excluded; None without any.
    sink_last: Optional[Int[Array, "batch slots"]]
    blocks: tuple[Blocks, ...]  # By mechanism.
    reaches: tuple[Reach, ...] = flax.struct.field(pytree_node=False)  # By mechanism, static.
    sizes: tuple[Sizes, ...] = flax.struct.field(pytree_node=False)


def build(
    group: Int[Array, "batch time"],
    segment_ids: Optional[SegmentIds],
    *,
    causal: bool,
    reaches: Sequence[Reach],
    sizes: Sequence[Sizes],
) -> WorkList:
    """The list of a batch. `group` is of every token the index of its mechanism in `reaches`, any other number for
    none; padding has none."""
    batch, time = group.shape
    if segment_ids is not None:
        group = jnp.where(segment_ids != 0, group, -1)
    slots = time + sum(size.block - 1 for size in sizes)
    served = jnp.stack([group == m for m in range(len(reaches))], axis=-1)
    place, starts, counts = _places(served, sizes)
    slot = jnp.where(served.any(-1), place, slots)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    index = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (batch, time))
    packed = jnp.full((batch, slots), time, jnp.int32).at[row, slot].set(index, mode="drop")
    # A slot that fills a block repeats the query before it.
    filled = jax.lax.cummax(jnp.where(packed < time, jnp.arange(slots, dtype=jnp.int32)[None], 0), axis=1)
    query = jnp.minimum(_take(packed, filled), time - 1)
    first, last, sink_first, sink_last = (
        None if x is None else _take(x, query) for x in _bounds(served, segment_ids, index, causal, reaches)
    )
    order = jnp.where(packed < time, packed, time + query)
    blocks = tuple(
        _blocks(starts[:, m], counts[:, m], first, last, sink_first, sink_last, time, size)
        for m, size in enumerate(sizes)
    )
    return WorkList(order, slot, first, last, sink_first, sink_last, blocks, tuple(reaches), tuple(sizes))


def count_tiles(work: WorkList) -> tuple[Float[Array, ""], ...]:
    """Tiles that are met, of every mechanism."""

    def total(blocks: Blocks) -> Float[Array, ""]:
        tiles = blocks.high - blocks.low + blocks.sink_high - blocks.sink_low
        exists = jnp.arange(tiles.shape[0], dtype=jnp.int32) < blocks.count
        return jnp.sum(jnp.where(exists, tiles, 0).astype(jnp.float32))

    return tuple(total(blocks) for blocks in work.blocks)


def _take(x: Int[Array, "batch a"], index: Int[Array, "batch b"]) -> Int[Array, "batch b"]:
    return jnp.take_along_axis(x, index, axis=1)


def _places(
    served: Bool[Array, "batch time mechanism"], sizes: Sequence[Sizes]
) -> tuple[Int[Array, "batch time"], Int[Array, "batch mechanism"], Int[Array, "batch mechanism"]]:
    """Slot of every served token; first slot and blocks of every mechanism, by sequence."""
    rank = jnp.cumsum(served, axis=1, dtype=jnp.int32)
    block = jnp.asarray([size.block for size in sizes], jnp.int32)[None]
    counts = -(-rank[:, -1] // block)
    length = counts * block
    starts = jnp.cumsum(length, axis=1, dtype=jnp.int32) - length
    place = jnp.where(served, rank - 1 + starts[:, None], 0).sum(-1, dtype=jnp.int32)
    return place, starts, counts


def _bounds(
    served: Bool[Array, "batch time mechanism"],
    segments: Optional[SegmentIds],
    index: Int[Array, "batch time"],
    causal: bool,
    reaches: Sequence[Reach],
) -> tuple[Optional[Int[Array, "batch time"]], ...]:
    """(first, last, sink_first, sink_last) of every token."""
    batch, time = index.shape
    start, end = jnp.zeros_like(index), jnp.full_like(index, time - 1)
    if segments is not None:
        change = segments[:, 1:] != segments[:, :-1]
        edge = jnp.ones_like(change[:, :1], shape=(batch, 1))
        opens = jnp.where(jnp.concatenate([edge, change], 1), index, 0)
        closes = jnp.where(jnp.concatenate([change, edge], 1), index, time - 1)
        start = jax.lax.cummax(opens, axis=1)
        end = jax.lax.cummin(closes, axis=1, reverse=True)
    if causal:
        end = index
    first, last, sink_last = start, end, start
    for m, reach in enumerate(reaches):
        mine = served[..., m]
        if reach.window is not None:
            far = min(reach.window, time) - 1
            first = jnp.where(mine, jnp.maximum(start, index - far), first)
            last = jnp.where(mine, jnp.minimum(end, index + far), last)
        if reach.sinks:
            here = jnp.minimum(start + min(reach.sinks, time), end + 1)
            sink_last = jnp.where(mine, here, sink_last)
    if not any(reach.sinks for reach in reaches):
        return first, last, None, None
    return first, last, start, sink_last


def _blocks(
    starts: Int[Array, "batch"],
    counts: Int[Array, "batch"],
    first: Int[Array, "batch slots"],
    last: Int[Array, "batch slots"],
    sink_first: Optional[Int[Array, "batch slots"]],
    sink_last: Optional[Int[Array, "batch slots"]],
    time: int,
    size: Sizes,
) -> Blocks:
    """The blocks of the mechanism whose slots begin at `starts`, `counts` of them a sequence."""
    batch, (block, tile) = starts.shape[0], size
    most = batch * -(-time // block)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    n = jnp.arange(most, dtype=jnp.int32)
    if isinstance(batch, int):
        row = jnp.searchsorted(ends, n, side="right").astype(jnp.int32)
    else:  # Halving needs a number, and a batch can be a symbol (`jax.export`).
        row = (ends[None] <= n[:, None]).sum(1, dtype=jnp.int32)
    row = jnp.minimum(row, batch - 1)
    slot = starts[row] + (n - (ends - counts)[row]) * block
    slot = jnp.clip(slot, 0, first.shape[1] - block)
    inside = slot[:, None] + jnp.arange(block, dtype=jnp.int32)[None]

    def of_block(x: Int[Array, "batch slots"]) -> Int[Array, "blocks block"]:
        return x[row[:, None], inside]

    first, last = of_block(first), of_block(last)
    low, high = first.min(1) // tile, last.max(1) // tile + 1
    whole = jnp.minimum(-(-first.max(1) // tile), high)
    whole_end = jnp.maximum((last.min(1) + 1) // tile, whole)
    sink_low = sink_high = low
    if sink_first is not None:
        sinks = of_block(sink_last) > of_block(sink_first)
        begins = jnp.where(sinks, of_block(sink_first), time).min(1)
        finishes = jnp.where(sinks, of_block(sink_last), 0)
        # In both directions, sinks can lie ahead of the window.
        high = jnp.maximum(high, -(-finishes.max(1) // tile))
        # Those of a block's later segments stand among the tiles of its windows.
        finishes = jnp.where(of_block(sink_first) == begins[:, None], finishes, 0).max(1)
        sink_high = jnp.minimum(low, -(-finishes // tile))
        sink_low = jnp.minimum(begins // tile, sink_high)
    return Blocks(ends[-1], row, slot, low, high, whole, whole_end, sink_low, sink_high)
