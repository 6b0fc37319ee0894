"""Who may attend to whom, from indices in the array and segment ids.

Masks are made block by block from index vectors; no function here sees the whole T x T square unless it is asked for
it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASKED = -1e30
"""Logit of a masked pair: finite, so that a row without any key stays free of NaN."""


def band(
    query: Int[Array, "q"], key: Int[Array, "k"], *, causal: bool, window: int | None = None
) -> Bool[Array, "q k"]:
    """Pairs (t, s) by index: causal s in [t - window + 1, t], else |s - t| < window.

    window=None stands for no bound.
    """
    distance = query[:, None] - key[None, :]
    allowed = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    if window is not None:
        allowed &= jnp.abs(distance) < window
    return allowed


def same_segment(query: Int[Array, "*batch q"], key: Int[Array, "*batch k"]) -> Bool[Array, "*batch q k"]:
    """Pairs of one segment. Padding (id 0) attends to padding; callers zero those outputs."""
    return query[..., :, None] == key[..., None, :]
