"""Logits in units of log 2, which accelerators raise to powers of: 2^x takes one instruction, e^x two."""

from __future__ import annotations

import math
from typing import Optional

import jax.numpy as jnp

LOG2E = math.log2(math.e)


def logits(products, scale: float, softcap: Optional[float]):
    """Of q . k, soft-capped."""
    if softcap is None:
        return products * (scale * LOG2E)
    return softcap * LOG2E * _tanh(products * (scale / softcap))


def slope(logits, softcap: Optional[float]):
    """d logits / d products, but for the scale."""
    if softcap is None:
        return 1.0
    return 1.0 - (logits / (softcap * LOG2E)) ** 2


def _tanh(x):
    """By powers, in float32; the units' own is too coarse."""
    return 1.0 - 2.0 / (jnp.exp2(2.0 * LOG2E * x) + 1.0)
