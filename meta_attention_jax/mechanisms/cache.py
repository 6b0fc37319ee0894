"""What all layers remember of every row while text is generated, for all mechanisms.

Whatever a token's own route is, its key, value and linear state enter, and the routes of later tokens decide what is
read; how is said by the mechanisms' `step`. Rows have lengths of their own.

Keys and values are read where they lie: loops take slices of the whole stack of layers, so that a compiled decode loop
updates its cache in place.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from meta_attention_jax.fields import expect
from meta_attention_jax.mechanisms.blocks import MASKED, capped, dot, feature_map
from meta_attention_jax.types import Keys, SegmentIds, Values

BLOCK = 1024
"""Keys that full attention reads at a time, so of what capacities are multiples. Measured on one CPU core (d 64, 4
heads), against one product over all keys: 256 reach 0.6 of its speed, 1024 and 4096 reach 0.9."""

StepQuery = Float[Array, "batch heads dim"]
StepKey = Float[Array, "batch kv_heads dim"]
Layer = int | Int[Array, ""]
Stack = Shaped[Array, "layer batch kv_heads capacity dim"]
State = Float[Array, "layer batch kv_heads dim dim"]
Normaliser = Float[Array, "layer batch kv_heads dim"]


@flax.struct.dataclass
class Cache:
    """What all layers remember of every row.

    bfloat16 keys and values are kept as their bits, in uint16 (`stored`, `loaded`): XLA's CPU backend would widen the
    whole stack to float32 and back for every update.
    """

    k: Stack  # Keys as full and local attention want them (rotated where the layer is rotary); 0 from the length on.
    v: Stack  # Values; 0 from the length on.
    s: State  # S = sum phi(k_s) v_s^T over the unrotated keys, float32.
    z: Normaliser  # z = sum phi(k_s), float32.
    length: Int[Array, "layer batch"]  # Tokens seen, by layer and row.

    @property
    def capacity(self) -> int:
        """C, tokens that a row can hold."""
        return self.v.shape[3]


def init_cache(*, layers: int, batch: int, capacity: int, kv_heads: int, dim: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache. A capacity above BLOCK is rounded up to a multiple of it.

    Bytes: L B G d (2 C + d + 1 numbers), the 2 C of them in `dtype`, the rest float32.
    """
    for name, size in dict(layers=layers, batch=batch, capacity=capacity, kv_heads=kv_heads, dim=dim).items():
        expect(size >= 1, name, "at least 1", size)
    if capacity > BLOCK:
        capacity = -(-capacity // BLOCK) * BLOCK
    kept = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    empty = jnp.zeros((layers, batch, kv_heads, capacity, dim), kept)
    return Cache(
        k=empty,
        v=jnp.zeros_like(empty),
        s=jnp.zeros((layers, batch, kv_heads, dim, dim), jnp.float32),
        z=jnp.zeros((layers, batch, kv_heads, dim), jnp.float32),
        length=jnp.zeros((layers, batch), jnp.int32),
    )


def stored(x: Float[Array, "..."], dtype: Any) -> Shaped[Array, "..."]:
    """x as a stack of `dtype` holds it: uint16 stands for the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def loaded(x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `stored`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def fill(cache: Cache, layer: Layer, rotated: Keys, k: Keys, v: Values, segment_ids: SegmentIds) -> Cache:
    """The cache after one layer has seen right-padded prompts of at least one token; what it held of that layer is
    overwritten. `rotated` are the keys for full and local attention, `k` those for linear attention, unrotated;
    `segment_ids` are 0 from the end of each prompt on, and nothing of that enters."""
    time = k.shape[1]
    expect(time <= cache.capacity, "prompt", f"at most {cache.capacity} tokens", time)
    valid = (segment_ids != 0)[:, :, None, None]
    phi = jnp.where(valid, feature_map(k), 0.0)
    state = jnp.einsum("btgd,btge->bgde", phi, v.astype(jnp.float32))

    def written(stack, x):
        x = stored(jnp.where(valid, x, 0), stack.dtype).transpose(0, 2, 1, 3)
        return jax.lax.dynamic_update_slice(stack, x[None], _index(layer, 0, 0, 0, 0))

    return Cache(
        k=written(cache.k, rotated),
        v=written(cache.v, v),
        s=cache.s.at[layer].set(state),
        z=cache.z.at[layer].set(phi.sum(1)),
        length=cache.length.at[layer].set((segment_ids != 0).sum(1).astype(jnp.int32)),
    )


def append(cache: Cache, layer: Layer, rotated: StepKey, k: StepKey, v: StepKey) -> Cache:
    """The cache after a layer has seen one more token per row.

    A row at its capacity overwrites its last key: callers bound the lengths beforehand.
    """
    length = cache.length[layer]
    phi = feature_map(k)
    outer = phi[..., :, None] * v.astype(jnp.float32)[..., None, :]

    def written(stack, x):
        x = stored(x, stack.dtype)[:, None, None, :, None]

        def row(b, stack):
            return jax.lax.dynamic_update_slice(stack, x[b], _index(layer, b, 0, length[b], 0))

        return jax.lax.fori_loop(0, x.shape[0], row, stack)

    return Cache(
        k=written(cache.k, rotated),
        v=written(cache.v, v),
        s=cache.s.at[layer].add(outer),
        z=cache.z.at[layer].add(phi),
        length=cache.length.at[layer].add(1),
    )


def by_row(attend, q: StepQuery, kv_heads: int, needed: Bool[Array, "batch"]) -> StepQuery:
    """attend(query [G, r, d], row) in the needed rows, one after the other; 0 in the others."""
    query = grouped(q, kv_heads)
    order = jnp.argsort(~needed, stable=True).astype(jnp.int32)

    def visit(i, out):
        row = order[i]
        return out.at[row].set(attend(query[row], row))

    start = jnp.zeros(query.shape, jnp.float32)
    out = jax.lax.fori_loop(0, needed.sum(dtype=jnp.int32), visit, start)
    return out.reshape(q.shape).astype(q.dtype)


def grouped(q: StepQuery, kv_heads: int) -> Float[Array, "batch kv_heads group dim"]:
    """Queries that share a key side by side."""
    batch, heads, dim = q.shape
    return q.reshape(batch, kv_heads, heads // kv_heads, dim)


def read(stack: Stack, layer: Layer, row, first, size: int) -> Float[Array, "kv_heads size dim"]:
    """`size` keys or values of a row from `first` on."""
    _, _, kv_heads, _, dim = stack.shape
    start = _index(layer, row, 0, first, 0)
    return loaded(jax.lax.dynamic_slice(stack, start, (1, 1, kv_heads, size, dim))[0, 0])


def _index(*places: Layer) -> tuple[Int[Array, ""], ...]:
    """Where a slice starts: of one dtype, whatever the default integer is."""
    return tuple(jnp.asarray(place, jnp.int32) for place in places)


def logits_of(
    query, key, allowed: Bool[Array, "size"], softcap: float | None = None
) -> Float[Array, "kv_heads group size"]:
    """Scaled logits of one row's queries; those of other keys are masked."""
    logits = capped(dot("grd,gkd->grk", query, key) * query.shape[-1] ** -0.5, softcap)
    return jnp.where(allowed[None, None], logits, MASKED)
