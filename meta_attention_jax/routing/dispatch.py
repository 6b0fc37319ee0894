"""Attention by routes: the mixture of all mechanisms, or hard routing that only does what is asked for.

    soft   o_t = sum_k w_tk o^k_t          hard   o_t = o^{k*_t}_t

In hard dispatch, mechanisms with a reach (full, local) serve their own queries alone, by one packed kernel and one work
list, so a batch pays for the sum of its rows: `kernels/worklist.py` says which queries meet which keys,
`kernels/portable.py`, `gpu.py` or `tpu.py` computes them. The others run on all tokens of the batch, if any token but
padding asks for them: linear attention's state needs every key whoever reads it.

No token is dropped whatever the routes are, all shapes are static, and trip counts follow the data: under `vmap` every
example would wait for the longest, so map over the batch axis instead. Inside `shard_map`, as in the training step, and
where `jax.set_mesh` has set a mesh, each device loops over its own rows; `jit` alone, over rows that are split, would
communicate inside the loops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import select, worklist
from meta_attention_jax.kernels.worklist import WorkList
from meta_attention_jax.mechanisms import blocks
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.mechanisms.registry import attend, get_mechanism
from meta_attention_jax.routing.decide import checked_route
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import MECHANISMS, AttentionSpec, Keys, Queries, Route, SegmentIds, Values, expect_record

DISPATCHES = ("auto", "dense", "packed")

PACKED_TIME = 512
"""Length from which "auto" prefers `packed`. Hard forward pass of a layer, 10 % full, packed / dense on two CPU cores:
0.83 at T 256, 0.7 at 512, 0.5 at 1024 (H 4, d 32 to 64). Below 512 the gain is smaller than what other shares and
devices may change; less than 256 was not measured."""


class Heads(NamedTuple):
    """Projected tokens; the rotated ones equal the plain ones where the layer is not rotary."""

    q: Queries
    k: Keys
    v: Values
    rotated_q: Queries
    rotated_k: Keys

    def of(self, mechanism: Mechanism) -> tuple[Queries, Keys, Values]:
        """q, k, v as the mechanism wants them."""
        if mechanism.rotary:
            return self.rotated_q, self.rotated_k, self.v
        return self.q, self.k, self.v


def resolve_dispatch(dispatch: str, *, time: int) -> str:
    """What "auto" stands for at this length: "packed" from PACKED_TIME tokens on, else "dense"."""
    expect(dispatch in DISPATCHES, "dispatch", f"one of {DISPATCHES}", dispatch)
    chosen = "packed" if time >= PACKED_TIME else "dense"
    return chosen if dispatch == "auto" else dispatch


def all_outputs(
    names: Sequence[str], heads: Heads, *, spec: AttentionSpec, segment_ids: Optional[SegmentIds]
) -> list[Queries]:
    """o^k of every mechanism on all tokens."""
    records = [get_mechanism(name) for name in names]
    return [attend(record, *heads.of(record), spec=spec, segment_ids=segment_ids) for record in records]


def hard_attention(
    q: Queries,
    k: Keys,
    v: Values,
    route: Route,
    *,
    mechanisms: Sequence[str] = MECHANISMS,
    spec: AttentionSpec,
    rotated: Optional[tuple[Queries, Keys]] = None,
    segment_ids: Optional[SegmentIds] = None,
) -> Queries:
    """Every token by the mechanism of its route; equal to "compute all, select", in the dtype of q, 0 at padding.

    Routes are integers in [0, K) on the axis `mechanisms` (not checked under `jit`: the output of a token outside means
    nothing) and have no gradient. `rotated` is (q, k) after rotary positions, for the mechanisms that want them; None
    means q, k.
    """
    expect(mechanisms and len(set(mechanisms)) == len(mechanisms), "mechanisms", "distinct names", tuple(mechanisms))
    expect_record("spec", spec, AttentionSpec)
    blocks.validate_qkv(q, k, v, segment_ids)
    route = checked_route(route, q.shape[:2], len(mechanisms))
    heads = Heads(q, k, v, *(rotated if rotated is not None else (q, k)))
    records = tuple(get_mechanism(name) for name in mechanisms)
    attention = functools.partial(_hard_attention, records=records, spec=spec)
    return by_rows(attention, (0, 0, 0), split=True)(heads, route, segment_ids)


@functools.partial(jax.jit, static_argnames=("records", "spec"), inline=True)
def _hard_attention(
    heads: Heads,
    route: Route,
    segment_ids: Optional[SegmentIds],
    *,
    records: tuple[Mechanism, ...],
    spec: AttentionSpec,
) -> Queries:
    """Compiled once also where the caller does not compile: its loops are new functions every time."""
    q = heads.q
    if blocks.is_empty(q):
        return jnp.zeros_like(q)
    if segment_ids is not None:
        route = jnp.where(segment_ids != 0, route, -1)
    out = jnp.zeros_like(q)
    kernel = select.packed(spec.kernel, q.shape, q.dtype)
    work = plan(route, segment_ids, records=records, spec=spec, kernel=kernel)
    if work is not None:
        out, _ = kernel.attend(heads.rotated_q, heads.rotated_k, heads.v, work, spec.softcap)
    for index, record in enumerate(records):
        if record.reach is not None:
            continue
        chosen = route == index

        def everywhere(*qkv, record=record):
            return attend(record, *qkv, spec=spec, segment_ids=segment_ids)

        def nothing(*qkv):
            return jnp.zeros_like(q)

        dense = jax.lax.cond(jnp.any(chosen), everywhere, nothing, *heads.of(record))
        out = jnp.where(chosen[..., None, None], dense, out)
    return out


def plan(
    route: Route,
    segment_ids: Optional[SegmentIds],
    *,
    records: Sequence[Mechanism],
    spec: AttentionSpec,
    kernel: select.Kernel,
) -> Optional[WorkList]:
    """What the packed kernel has to do for these routes; None where no mechanism has a reach. Routes outside the axis,
    padding's among them, ask for nothing."""
    packed = [index for index, record in enumerate(records) if record.reach is not None]
    if not packed:
        return None
    reaches = [records[index].reach(spec) for index in packed]
    sizes = kernel.sizes(route.shape[1], reaches)
    group = jnp.full_like(route, -1)
    for m, index in enumerate(packed):
        group = jnp.where(route == index, m, group)
    return worklist.build(group, segment_ids, causal=spec.causal, reaches=reaches, sizes=sizes)
