"""Which packed kernel runs: by platform, dtype and shape, and never another one than was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax.numpy as jnp

from meta_attention_jax import targets
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import gpu, portable
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.targets import Target
from meta_attention_jax.types import KERNELS

CAPABILITY = 8.0
"""Of the GPUs whose matrix units the kernel is written for: Ampere and later."""

DTYPES = ("bfloat16", "float16", "float32")


class Kernel(NamedTuple):
    """A way to do what a work list says.

    Attributes:
      name: "portable" or "pallas".
      attend: (q, k, v, work, softcap) -> (outputs at their tokens, 0 elsewhere; log-sum-exp).
      sizes: (time, reaches) -> sizes of the work list, by mechanism.
    """

    name: str
    attend: Callable[..., tuple]
    sizes: Callable[[int, Sequence[Reach]], list[Sizes]]


def packed(kernel: str, *, time: int, dim: int, dtype: Any, target: Optional[Target] = None) -> Kernel:
    """What "auto" stands for: `pallas` where it can serve, else `portable`; raises ValueError where `pallas` is asked
    for and cannot. `target` is what is compiled for; None is `targets.current()`."""
    expect(kernel in KERNELS, "kernel", f"one of {', '.join(KERNELS)}", kernel)
    dtype, (platform, capability) = jnp.dtype(dtype), target or targets.current()
    # A length can be a symbol (`jax.export`).
    serves = platform == "gpu" and capability >= CAPABILITY and dtype.name in DTYPES and dim <= gpu.MOST_DIM
    serves = serves and isinstance(time, int) and time >= gpu.LEAST
    if kernel == "pallas" and not serves:
        raise ValueError(
            f"kernel: expected for 'pallas' an NVIDIA GPU of compute capability {CAPABILITY} or more, {', '.join(DTYPES)}, "
            f"a head dim of at most {gpu.MOST_DIM} and {gpu.LEAST} tokens or more, got {platform}, {capability}, "
            f"{dtype.name}, head dim {dim} and {time} tokens."
        )
    if kernel == "portable" or not serves:
        return Kernel("portable", portable.attend, lambda time, reaches: [portable.sizes_for(time, r) for r in reaches])
    sizes = gpu.tuning_for(dim, dtype, time).sizes
    return Kernel("pallas", gpu.attend, lambda time, reaches: [sizes] * len(reaches))
