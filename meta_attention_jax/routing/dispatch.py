"""Hard routing that only does the work its routes ask for: exact, causal, differentiable.

    o_t = o^{k*_t}_t,    k* = route

Mechanisms with a packed form (full, local) serve their own queries alone. The others run on all
tokens, if any token asks for them: linear attention's state needs every key whoever reads it. The
rows are written over one another in one buffer, so selecting costs nothing.

No token is dropped whatever the routes are, all shapes are static, and trip counts follow the data:
under `vmap` every example would wait for the longest, so map over the batch axis instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import jax
import jax.numpy as jnp

from meta_attention_jax.mechanisms.registry import attend_with, get_mechanism, select_options
from meta_attention_jax.types import MECHANISMS, Keys, Queries, Route, SegmentIds, Values

DISPATCHES = ("auto", "dense", "packed")

PACKED_TIME = 512
"""Length from which "auto" prefers `packed`. Hard forward pass of a layer, 10 % full, packed / dense on
two CPU cores: 0.83 at T 256, 0.7 at 512, 0.5 at 1024 (H 4, d 32 to 64). Shorter was not measured."""


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
      route: `[B, T]`, indices on the axis `mechanisms`; it has no gradient.
      mechanisms: names, in order.
      rotated: (q, k) after rotary positions, for the mechanisms that want them; None means q, k.
      segment_ids: `[B, T]`, 0 is padding (output 0); None for one segment.
      causal: False attends to both sides.
      window: of mechanisms that have one, in tokens, the token itself included.
      implementation: of mechanisms that have several, where they run on all tokens.

    Returns:
      `[B, T, H, d]` in the dtype of q.

    Raises:
      ValueError: unknown mechanism, a missing window, shapes that do not fit.
    """
    if route.shape != q.shape[:2]:
        raise ValueError(f"route: expected shape {q.shape[:2]}, got {route.shape}.")
    records = [get_mechanism(name) for name in mechanisms]
    out = jnp.zeros_like(q)
    # Packed rows go over dense ones, so the dense ones come first, and the first of them as it is.
    first = True
    for index, mechanism in enumerate(records):
        if mechanism.attend_packed is not None:
            continue
        query, key = rotated if mechanism.rotary and rotated is not None else (q, k)
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
        query, key = rotated if mechanism.rotary and rotated is not None else (q, k)
        options = select_options(mechanism, window=window, implementation=implementation)
        out = mechanism.attend_packed(
            query, key, v, route == index, out,
            segment_ids=segment_ids, causal=causal, **options,
        )
    return out
