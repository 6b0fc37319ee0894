"""Which kernel reads a cache for one new token a row, where there is one."""

from __future__ import annotations

from types import ModuleType
from typing import Optional

from meta_attention_jax.mechanisms import decode_gpu, decode_tpu
from meta_attention_jax.mechanisms.cache import Stack, StepQuery


def kernel_for(kernel: str, q: StepQuery, stack: Stack) -> Optional[ModuleType]:
    """The module whose `attend` does; None leaves it to the portable form. Raises ValueError as `triton.serves`."""
    return next((module for module in (decode_gpu, decode_tpu) if module.serves(kernel, q, stack)), None)
