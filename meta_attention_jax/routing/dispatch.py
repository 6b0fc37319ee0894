"""Hard routing that only does the work its routes ask for: exact, causal, differentiable.

    o_t = o^{k*_t}_t,    k* = route

Mechanisms with a packed form (full, local) serve their own queries alone, so a batch pays for the
sum of its rows. The others run on all tokens of the batch, if any token but padding asks for them:
linear attention's state needs every key whoever reads it. The rows are written over one another in
one buffer, so selecting costs nothing.

No token is dropped whatever the routes are, all shapes are static, and trip counts follow the data:
under `vmap` every example would wait for the longest, so map over the batch axis instead. Inside
`shard_map`, as in the training step, and where `jax.set_mesh` has set a mesh, each device loops
over its own rows; `jit` alone, over rows that are split, would communicate inside the loops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Optional

import jax
import jax.numpy as jnp

from meta_attention_jax.mechanisms import blocks
from meta_attention_jax.mechanisms.registry import (
    Mechanism,
    attend_with,
    get_mechanism,
    select_options,
)
from meta_attention_jax.routing import mixture
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import MECHANISMS, Keys, Queries, Route, SegmentIds, Values

DISPATCHES = ("auto", "dense", "packed")

PACKED_TIME = 512
"""Length from which "auto" prefers `packed`. Hard forward pass of a layer, 10 % full, packed / dense on
two CPU cores: 0.83 at T 256, 0.7 at 512, 0.5 at 1024 (H 4, d 32 to 64). Below 512 the gain is smaller
than what other shares and devices may change; less than 256 was not measured."""


def resolve_dispatch(dispatch: str, *, time: int) -> str:
    """What "auto" stands for at this length: "packed" from PACKED_TIME tokens on, else "dense".

    Raises:
      ValueError: unknown name.
    """
    if dispatch not in DISPATCHES:
        raise ValueError(f"dispatch: expected one of {DISPATCHES}, got {dispatch!r}.")
    if dispatch != "auto":
        return dispatch
    return "packed" if time >= PACKED_TIME else "dense"


def hard_attention(
    q: Queries,
    k: Keys,
    v: Values,
    route: Route,
    *,
    mechanisms: Sequence[str] = MECHANISMS,
    rotated: Optional[tuple[Queries, Keys]] = None,
    segment_ids: Optional[SegmentIds] = None,
    causal: bool = True,
    window: Optional[int] = None,
    implementation: str = "auto",
) -> Queries:
    """Every token by the mechanism of its route; equal to "compute all, select".

    Args:
      q: `[B, T, H, d]`.
      k, v: `[B, T, G, d]`, G a divisor of H.
      route: `[B, T]`, integers in [0, K) on the axis `mechanisms` (not checked under `jit`: the
        output of a token outside means nothing); it has no gradient.
      mechanisms: names, in order.
      rotated: (q, k) after rotary positions, for the mechanisms that want them; None means q, k.
      segment_ids: `[B, T]`, 0 is padding (output 0); None for one segment.
      causal: False attends to both sides.
      window: of mechanisms that have one, in tokens, the token itself included.
      implementation: of mechanisms that have several, where they run on all tokens.

    Returns:
      `[B, T, H, d]` in the dtype of q.

    Raises:
      ValueError: unknown, repeated or no mechanisms, a missing window, shapes that do not fit.
    """
    if not mechanisms or len(set(mechanisms)) != len(mechanisms):
        raise ValueError(f"mechanisms: expected distinct names, got {tuple(mechanisms)}.")
    blocks.validate_qkv(q, k, v, segment_ids, window)
    route = mixture.checked_route(route, q.shape[:2], len(mechanisms))
    query, key = rotated if rotated is not None else (q, k)
    attention = functools.partial(
        _hard_attention,
        records=tuple(get_mechanism(name) for name in mechanisms),
        causal=causal, window=window, implementation=implementation,
    )
    return by_rows(attention, (0,) * 7, split=True)(q, k, v, query, key, route, segment_ids)


@functools.partial(
    jax.jit, static_argnames=("records", "causal", "window", "implementation"), inline=True
)
def _hard_attention(
    q: Queries,
    k: Keys,
    v: Values,
    rotated_q: Queries,
    rotated_k: Keys,
    route: Route,
    segment_ids: Optional[SegmentIds],
    *,
    records: tuple[Mechanism, ...],
    causal: bool,
    window: Optional[int],
    implementation: str,
) -> Queries:
    """Compiled once also where the caller does not compile: its loops are new functions every time."""
    if segment_ids is not None:
        route = jnp.where(segment_ids != 0, route, -1)
    out = jnp.zeros_like(q)
    # Packed rows go over dense ones, so the dense ones come first, and the first of them as it is.
    first = True
    for index, mechanism in enumerate(records):
        if mechanism.attend_packed is not None:
            continue
        query, key = (rotated_q, rotated_k) if mechanism.rotary else (q, k)
        chosen = route == index

        def attend(query, key, value, mechanism=mechanism):
            return attend_with(
                mechanism,
                query,
                key,
                value,
                segment_ids=segment_ids,
                causal=causal,
                window=window,
                implementation=implementation,
            )

        def nothing(query, key, value):
            return jnp.zeros_like(q)

        dense = jax.lax.cond(jnp.any(chosen), attend, nothing, query, key, v)
        out = dense if first else jnp.where(chosen[..., None, None], dense, out)
        first = False
    for index, mechanism in enumerate(records):
        if mechanism.attend_packed is None:
            continue
        query, key = (rotated_q, rotated_k) if mechanism.rotary else (q, k)
        options = select_options(mechanism, window=window, implementation=implementation)
        out = mechanism.attend_packed(
            query, key, v, route == index, out,
            segment_ids=segment_ids, causal=causal, **options,
        )
    return out
