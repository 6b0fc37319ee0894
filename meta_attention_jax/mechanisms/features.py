"""The feature map of linear attention."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def feature_map(x: Array) -> Array:
    """phi(x) = ELU(x) + 1 > 0, in float32."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))
