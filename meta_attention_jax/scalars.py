"""Numbers that callers give: those of NumPy and JAX are as good as Python's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def plain(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers, arrays as tuples of them, in lists and tuples too; anything else as it
    is."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = value.item() if value.ndim == 0 else tuple(value.tolist())
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def whole(field: str, value: Any) -> int:
    """An integer."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}: expected an integer, got {value!r}.")
    return value


def real(field: str, value: Any) -> float:
    """An integer or a float, NaN and infinities too."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{field}: expected a number, got {value!r}.")
    return value
