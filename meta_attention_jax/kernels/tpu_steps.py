"""What the grid of the TPU's kernels goes through: a block of queries and a tile of keys a step, in lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from meta_attention_jax.fields import expect
from meta_attention_jax.kernels.worklist import WorkList

SCALARS = 1_000_000
"""Bytes of the memory of scalars that the lists may take; a v5e has 1 MiB."""
_TILE_BITS, _FLAG_BITS = 13, 3
WHOLE, FIRST, LAST = 1, 2, 4
"""Flags of a step: every query sees every key; the first and the last step of what it adds to."""


class Steps(NamedTuple):
    """What the grid goes through."""

    count: Int[Array, ""]
    # A number each: the block, the tile (of its sequence), and the flags.
    packed: Int[Array, "steps"]
    row: Int[Array, "blocks"]  # Sequence of every block.
    slot: Int[Array, "blocks"]  # Its place among the blocks of its sequence.


def _meetings(work: WorkList) -> tuple[Array, Array, Array, Array]:
    """Of every block and tile: whether they meet, and whether all of it is seen; sequence and place of every block."""
    block, tile = work.sizes[0]
    tiles = jnp.arange(-(-work.slot.shape[1] // tile), dtype=jnp.int32)[None]
    meets, whole = [], []
    for blocks in work.blocks:
        exists = (jnp.arange(blocks.row.shape[0], dtype=jnp.int32) < blocks.count)[:, None]
        between = lambda low, high: (low[:, None] <= tiles) & (tiles < high[:, None])  # noqa: E731
        near, sinks = between(blocks.low, blocks.high), between(blocks.sink_low, blocks.sink_high)
        meets.append(exists & (near | sinks))
        whole.append(between(blocks.whole, blocks.whole_end))
    row, slot = (jnp.concatenate([getattr(b, name) for b in work.blocks]) for name in ("row", "slot"))
    return jnp.concatenate(meets), jnp.concatenate(whole), row, slot // block


def _steps(
    meets: Bool[Array, "outer inner"], whole: Array, pack: Callable[..., Array], row, slot, most: int
) -> Steps:
    """The meetings in order, at most so many, those of one outer index together; `pack` makes a number of both indices.
    Where there are none, the first block makes one step that nobody reads."""
    held = 4 * (most + 2 * row.shape[0])
    expect(held <= SCALARS, "kernel", f"lists of at most {SCALARS:,} bytes for 'pallas' on a TPU, so fewer tokens of "
           "a device (another kernel, or more devices)", f"{held:,}")
    outer, inner = jnp.nonzero(meets, size=most, fill_value=0)
    count = jnp.maximum(meets.sum(dtype=jnp.int32), 1)
    outer, inner, index = outer.astype(jnp.int32), inner.astype(jnp.int32), jnp.arange(most, dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones(1, bool), outer[1:] != outer[:-1]]) | (index == 0)
    ends = jnp.concatenate([outer[1:] != outer[:-1], jnp.ones(1, bool)]) | (index == count - 1)
    flags = sum(jnp.where(is_so, np.int32(flag), np.int32(0)) for is_so, flag in (
        (whole[outer, inner], WHOLE), (new, FIRST), (ends, LAST)
    ))
    return Steps(count, (pack(outer, inner) << _FLAG_BITS) | flags, row, slot)


def _check(blocks: int, tiles: int) -> None:
    most = 1 << (31 - _TILE_BITS - _FLAG_BITS)
    expect(tiles <= 1 << _TILE_BITS, "time", f"at most {1 << _TILE_BITS} tiles of keys", tiles)
    expect(blocks <= most, "batch", f"at most {most} blocks of queries", blocks)


def by_block(work: WorkList) -> Steps:
    meets, whole, row, slot = _meetings(work)
    _check(*meets.shape)
    return _steps(meets, whole, lambda n, j: (n << _TILE_BITS) | j, row, slot, meets.size)


def by_tile(work: WorkList) -> Steps:
    """The blocks of every tile of every sequence; a tile that nobody sees has one step, of no block, that writes 0."""
    meets, whole, row, slot = _meetings(work)
    _check(meets.shape[0] + work.slot.shape[0], meets.shape[1])
    batch, tiles = work.slot.shape[0], meets.shape[1]
    mine = row[None, None] == jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    seen = (mine & meets.T[None]).reshape(batch * tiles, -1)
    alone = ~seen.any(axis=1, keepdims=True)
    whole = jnp.broadcast_to(whole.T[None], (batch, *whole.T.shape)).reshape(seen.shape)

    def pack(outer, inner):
        return (inner << _TILE_BITS) | (outer % tiles)

    # The sequence of a step of no block is its tile's: such blocks come behind the others, one a sequence.
    empty = alone.reshape(batch, tiles, 1) & jnp.eye(batch, dtype=bool)[:, None]
    empty = empty.reshape(batch * tiles, batch)
    seen, whole = jnp.concatenate([seen, empty], 1), jnp.concatenate([whole, jnp.zeros_like(empty)], 1)
    row = jnp.concatenate([row, jnp.arange(batch, dtype=jnp.int32)])
    slot = jnp.concatenate([slot, jnp.zeros(batch, jnp.int32)])
    return _steps(seen, whole, pack, row, slot, meets.size + batch * tiles)  # A block is of one sequence.


def of(packed):
    """(block, tile, flags) of a step."""
    mask = np.int32((1 << _TILE_BITS) - 1)
    return packed >> (_TILE_BITS + _FLAG_BITS), (packed >> _FLAG_BITS) & mask, packed & np.int32((1 << _FLAG_BITS) - 1)


def flag(flags, which: int):
    return (flags & np.int32(which)) != 0
