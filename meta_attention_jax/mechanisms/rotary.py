"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.fields import expect
from meta_attention_jax.types import Positions


def rotate(
    x: Float[Array, "batch time heads dim"], positions: Positions, *, base: float = 10000.0
) -> Float[Array, "batch time heads dim"]:
    """Rotates the pair (x_i, x_{i + d/2}) by the angle p base^(-2i/d), i < d/2.

    The scalar product of a rotated query and a rotated key depends on the difference of their positions alone. Angles
    are float32 whatever the dtype of x; the result has the dtype of x.

    Args:
      x: queries or keys.
      positions: p, the index of each token within its segment.
      base: wavelength scale; the slowest pair turns once in about 2 pi base tokens.

    Raises:
      ValueError: odd `dim`, or positions of another shape than [batch, time].
    """
    batch, time, _, dim = x.shape
    expect(not dim % 2, "dim", "an even number for rotary positions", dim)
    expect(positions.shape == (batch, time), "positions", f"shape {(batch, time)}", positions.shape)
    half = dim // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
