"""What kernels for NVIDIA GPUs share: Pallas in its Triton form, on whole arrays, by a list of programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from meta_attention_jax import targets
from meta_attention_jax.targets import Target

LEAST = 16
"""Rows and columns of the smallest product of the matrix units, and so tokens of a sequence."""

MOST_DIM = 256
CAPABILITY = 9.0
"""Of the GPUs whose shared memory holds the tiles: Hopper and later."""

DTYPES = ("bfloat16", "float16", "float32")

store = triton.store


def serves(kernel: str, shape: Sequence[Any], dtype: Any, target: Optional[Target] = None) -> bool:
    """Whether "pallas" is asked for, and serves queries of this shape, [B, T, H, d], in this form: shorter ones than
    LEAST, and those with symbols (`jax.export`), are left to portable forms, and a TPU to its own kernels or XLA.
    Raises ValueError where it is asked for and cannot be had.

    `target` is what is compiled for; None is `targets.current()`.
    """
    if kernel != "pallas":
        return False
    (platform, capability), name, dim = target or targets.current(), jnp.dtype(dtype).name, shape[-1]
    if platform == "tpu":
        return False
    if platform != "gpu" or capability < CAPABILITY or name not in DTYPES or dim > MOST_DIM:
        raise ValueError(
            f"kernel: expected for 'pallas' a TPU, or an NVIDIA GPU of compute capability {CAPABILITY} or more, "
            f"{', '.join(DTYPES)} and a head dim of at most {MOST_DIM}, got {platform}, {capability}, {name} and head "
            f"dim {dim}."
        )
    return all(isinstance(size, int) for size in shape) and shape[1] >= LEAST


def width_for(dim: int) -> int:
    """The power of two up to which a head is filled."""
    return max(LEAST, 1 << (dim - 1).bit_length())


def dot(x, y, x_axis: int, y_axis: int):
    """Product over one axis of each, accumulated in float32; of float32 as `jax.default_matmul_precision` says."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def divide(n, by: int):
    """Quotient and rest of what is not negative."""
    by = np.int32(by)
    return jax.lax.div(n, by), jax.lax.rem(n, by)


def call(
    kernel: Callable[..., None],
    arguments: Sequence[jax.Array],
    outputs: Sequence[Any],
    programs: int,
    *,
    warps: int,
    stages: int,
    written_over: Optional[int] = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Runs `kernel(*arguments, *outputs)`, as references to whole arrays, once a program. Outputs have the shapes and
    dtypes of `outputs`; from argument `written_over` on they are the arrays that outputs are written into."""
    # With parameters of this kind Pallas means Triton, whatever its default is.
    params = {} if interpret else {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}
    # Inside `shard_map` outputs vary over the mesh as what they are made of does.
    varying = jax.typeof(arguments[0]).manual_axis_type
    aliases = {} if written_over is None else {written_over + i: i for i in range(len(outputs))}
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs],
        input_output_aliases=aliases,
        interpret=interpret,
        **params,
    )(*arguments)
