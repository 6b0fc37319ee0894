"""What kernels for TPUs share: Pallas in its Mosaic form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LANES, MOST_DIM = 128, 256
DTYPES = ("bfloat16", "float32")
PRECISE = ("high", "highest", "tensorfloat32", "float32")
"""Of `jax.default_matmul_precision`: what asks for more than the units do on their own."""


def dot(x, y, x_axis: int, y_axis: int):
    """Product over one axis of each, accumulated in float32; of float32 in full precision where PRECISE is asked for,
    else as the units do; they know no other."""
    asked = x.dtype == jnp.float32 and jax.config.jax_default_matmul_precision in PRECISE
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if asked else jax.lax.Precision.DEFAULT,
    )


def result(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of a kernel, which inside `shard_map` varies over the mesh as an input does."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def lanes(x, width: int):
    """Numbers that are in all lanes, as wide as asked for: from one lane to the others they would have to be sent."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
