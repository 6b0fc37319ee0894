"""Which packed kernel runs: by what is asked for, and an error where that cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from meta_attention_jax import targets
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import gpu, portable, tpu
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.mechanisms import triton
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.targets import Target
from meta_attention_jax.types import KERNELS


class Kernel(NamedTuple):
    """A way to do what a work list says.

    Attributes:
      name: "portable" or "pallas".
      attend: (q, k, v, work, softcap) -> (outputs at their tokens, and the log-sum-exp of their logits, [B, H, T]; 0
        elsewhere).
      sizes: (time, reaches) -> sizes of the work list, by mechanism.
    """

    name: str
    attend: Callable[..., tuple]
    sizes: Callable[[int, Sequence[Reach]], list[Sizes]]


def packed(kernel: str, shape: Sequence[Any], dtype: Any, target: Optional[Target] = None) -> Kernel:
    """The kernel of that name for queries of this shape, [B, T, H, d], as `triton.serves` and `tpu.serves` say; raises
    ValueError where it cannot run.

    "auto" is `portable`: on a GPU `pallas` has been timed, but no value of it has been compared there yet (`make
    gpu-check` does); on a TPU it has not been run.
    """
    expect(kernel in KERNELS, "kernel", f"one of {', '.join(KERNELS)}", kernel)
    target = target or targets.current()
    if kernel == "pallas" and target.platform == "tpu" and tpu.serves(shape, dtype):
        sizes_for = functools.partial(tpu.sizes_for, shape[3])
        return Kernel("pallas", tpu.attend, lambda time, reaches: [sizes_for(time, reaches)] * len(reaches))
    if not triton.serves(kernel, shape, dtype, target):
        return Kernel("portable", portable.attend, lambda time, reaches: [portable.sizes_for(time, r) for r in reaches])
    sizes = gpu.tuning_for(shape[3], dtype, shape[1]).sizes
    return Kernel("pallas", gpu.attend, lambda time, reaches: [sizes] * len(reaches))
