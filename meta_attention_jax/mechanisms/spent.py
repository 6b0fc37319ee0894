"""What one call of a mechanism spends: FLOPs, and bytes between its arrays and the products.

FLOPs are 2 per multiply-add of matrix products, as everywhere in the project. Bytes are queries, keys and values as
often as a tile or a chunk takes them, and outputs as they are written; each in the dtype of its array. Copies that
change a layout, running sums and masks are left out: what a compiler makes of them differs from device to device.

Arrays are asked for their shape and dtype only, so abstract ones will do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from meta_attention_jax.types import Abstract

Number = float | Num[Array, ""]


class AttentionCost(NamedTuple):
    """Of one call, whole batch, all heads, forward."""

    flops: Number
    bytes: Number


def of_tiles(
    q: Abstract, k: Abstract, *, blocks: Number, tiles: Number, rows: Number, block: int, tile: int
) -> AttentionCost:
    """Softmax attention by tiles: 4 d H per query-key pair, block x tile pairs a tile.

    `blocks` of `block` queries are read, `tiles` met, each of `tile` keys and as many values, and `rows` of the output
    written.
    """
    heads, dim = q.shape[2:]
    kv_row = 2 * k.shape[2] * dim * jnp.dtype(k.dtype).itemsize
    q_row = heads * dim * jnp.dtype(q.dtype).itemsize
    lines = blocks * block + rows
    if isinstance(lines, jax.Array):
        lines = lines.astype(jnp.float32)
    return AttentionCost(
        flops=tiles * (4.0 * heads * dim * block * tile), bytes=tiles * float(tile * kv_row) + lines * float(q_row)
    )


def of_arrays(q: Abstract, k: Abstract, flops: Number) -> AttentionCost:
    """These FLOPs, and every array read or written once."""
    batch, time, heads, dim = q.shape
    row = 2 * heads * dim * jnp.dtype(q.dtype).itemsize
    row += 2 * k.shape[2] * dim * jnp.dtype(k.dtype).itemsize
    return AttentionCost(flops=flops, bytes=float(batch * time * row))
