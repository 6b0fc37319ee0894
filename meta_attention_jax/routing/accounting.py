"""Executed FLOPs and bytes of attention for given routes: what the programs really visit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Optional

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.cost import natural_windows
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import select, worklist
from meta_attention_jax.mechanisms import spent
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.mechanisms.registry import get_mechanism
from meta_attention_jax.mechanisms.spent import AttentionCost
from meta_attention_jax.routing import dispatch
from meta_attention_jax.types import Abstract, AttentionSpec, Route, Router, SegmentIds


@flax.struct.dataclass
class Spending:
    """One quantity of attention proper, forward, in four views."""

    projected: Float[Array, ""]  # If every token paid for its own mechanism alone.
    executed_packed: Float[Array, ""]  # What packed dispatch does for these routes.
    executed_dense: Float[Array, ""]  # What "compute all, select" does: every mechanism on every token.
    full_only: Float[Array, ""]  # What full attention does on every token.


@flax.struct.dataclass
class Accounting:
    """FLOPs and bytes of some tokens. Additive until `per_token` divides."""

    tokens: Float[Array, ""]  # Tokens that are not padding.
    flops: Spending  # 2 per multiply-add of matrix products.
    # Queries, keys and values as often as they are read, outputs as they are written (see `mechanisms.spent`).
    bytes: Spending

    def per_token(self) -> Accounting:
        """The same for one token: FLOPs and bytes divided by `tokens`."""
        scaled = jax.tree.map(lambda x: x / self.tokens, (self.flops, self.bytes))
        return Accounting(self.tokens / self.tokens, *scaled)


def count_attention(route: Route, config: ModelConfig, *, segment_ids: Optional[SegmentIds] = None) -> Accounting:
    """FLOPs and bytes of one layer's attention for these routes, totals over the batch. Jittable.

    Packed dispatch: full and local by the blocks of chosen queries and the tiles of keys of the work list (the kernel of
    GPUs cuts them smaller, and its linear attention is counted as the portable form);
    a mechanism without a reach on all tokens of the batch if any token, padding left out, is routed to it. Dense
    select: every mechanism on all tokens; the selection itself makes no product and is not counted. Projected FLOPs are
    those of the equation at T tokens, divided by T; projected bytes, for which there is no equation, those of the
    mechanism on all tokens, divided by B T. With a fixed router the layer computes no other mechanism: both executed
    numbers are then those of the routed mechanisms on all tokens.
    """
    expect(route.ndim == 2, "route", "shape [batch, time]", route.shape)
    if segment_ids is not None and segment_ids.shape != route.shape:
        raise ValueError(f"segment_ids: expected shape {route.shape}, got {segment_ids.shape}.")
    (batch, time), spec, dim = route.shape, config.attention, config.head_dim
    if 0 in route.shape:
        zero = jnp.float32(0.0)
        return Accounting(zero, *(Spending(zero, zero, zero, zero) for _ in range(2)))
    dtype = config.dtype or jnp.float32
    q = jax.ShapeDtypeStruct((batch, time, config.num_heads, dim), dtype)
    k = jax.ShapeDtypeStruct((batch, time, config.kv_heads, dim), dtype)
    real = jnp.ones(route.shape, bool) if segment_ids is None else segment_ids != 0
    records = [get_mechanism(name) for name in config.router.mechanisms]
    asked = jnp.where(real, route, -1)
    kernel = select.packed(spec.kernel, q.shape, dtype)
    work = dispatch.plan(asked, segment_ids, records=records, spec=spec, kernel=kernel)
    met = iter(() if work is None else zip(work.blocks, worklist.count_tiles(work), work.sizes))

    nothing = AttentionCost(0.0, 0.0)
    projected, packed, dense = [nothing], [nothing], [nothing]
    for index, record in enumerate(records):
        chosen, whole = asked == index, _everywhere(record, q, k, spec)
        own = jnp.sum(chosen, dtype=jnp.float32)
        if_used = AttentionCost(*(jnp.any(chosen).astype(jnp.float32) * x for x in whole))
        flops = config.num_heads * record.flops(time, dim, spec) / time
        projected.append(AttentionCost(own * flops, own * (whole.bytes / route.size)))
        by_tiles = if_used
        if record.reach is not None:
            blocks, tiles, (block, tile) = next(met)
            rows = jnp.sum(chosen, dtype=jnp.int32)
            by_tiles = spent.of_tiles(q, k, blocks=blocks.count, tiles=tiles, rows=rows, block=block, tile=tile)
        packed.append(if_used if config.router.is_fixed else by_tiles)
        dense.append(if_used if config.router.is_fixed else whole)
    sides = projected, packed, dense, [_everywhere(get_mechanism("full"), q, k, spec)]
    return Accounting(
        jnp.sum(real, dtype=jnp.float32),
        *(Spending(*(jnp.float32(sum(work[kind] for work in side)) for side in sides)) for kind in range(2)),
    )


def count_layers(
    routes: Int[Array, "layer batch time"], config: ModelConfig, *, segment_ids: Optional[SegmentIds] = None
) -> Accounting:
    """`count_attention` of all layers, by the routes of those that have a router. Layers that are windows by nature are
    local attention on all tokens in every view, full_only too: no route could make them anything else."""
    count = functools.partial(count_attention, segment_ids=segment_ids)
    layers = jax.lax.map(functools.partial(count, config=config), routes)
    total = jax.tree.map(lambda x: x.sum(0), layers).replace(tokens=layers.tokens[0])  # The same in every layer.
    router = Router(mechanisms=("local",), controller="fixed", fixed=("local",))
    for spec in natural_windows(config):
        own = count(jnp.zeros_like(routes[0]), config=dataclasses.replace(config, attention=spec, router=router))
        own = [side.replace(full_only=side.executed_dense) for side in (own.flops, own.bytes)]
        flops, traffic = (jax.tree.map(jnp.add, *sides) for sides in zip((total.flops, total.bytes), own))
        total = total.replace(flops=flops, bytes=traffic)
    return total


def _everywhere(record: Mechanism, q: Abstract, k: Abstract, spec: AttentionSpec) -> AttentionCost:
    """On all tokens."""
    if record.work is not None:
        return record.work(q, k, spec)
    batch, time, heads, dim = q.shape
    return spent.of_arrays(q, k, batch * heads * record.flops(time, dim, spec))
