"""Which packed kernel runs: by platform, dtype and shape, and never another one than was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax.numpy as jnp

from meta_attention_jax import targets
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import gpu, portable
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.mechanisms import triton
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.targets import Target
from meta_attention_jax.types import KERNELS


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
    serves = triton.serves(time=time, dim=dim, dtype=dtype, target=target)
    if kernel == "pallas" and not serves:
        platform, capability = target or targets.current()
        raise ValueError(
            f"kernel: expected for 'pallas' an NVIDIA GPU of compute capability {triton.CAPABILITY} or more, "
            f"{', '.join(triton.DTYPES)}, a head dim of at most {triton.MOST_DIM} and {triton.LEAST} tokens or more, got "
            f"{platform}, {capability}, {jnp.dtype(dtype).name}, head dim {dim} and {time} tokens."
        )
    if kernel == "portable" or not serves:
        return Kernel("portable", portable.attend, lambda time, reaches: [portable.sizes_for(time, r) for r in reaches])
    sizes = gpu.tuning_for(dim, dtype, time).sizes
    return Kernel("pallas", gpu.attend, lambda time, reaches: [sizes] * len(reaches))
