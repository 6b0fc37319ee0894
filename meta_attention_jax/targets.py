"""What a program is compiled for: the devices of this process, unless something else is said.

Which form of attention runs depends on it. A compiler for a GPU does not need the GPU, so the platform of this process
(`jax.default_backend()`) is not always the one that counts.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple, Optional

import jax


class Target(NamedTuple):
    """A platform ("cpu", "gpu", "tpu"), and the compute capability of an NVIDIA GPU, else 0."""

    platform: str
    capability: float


_STATED: contextvars.ContextVar[Optional[Target]] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """What is compiled for."""
    return _STATED.get() or Target(jax.default_backend(), _capability())


@contextlib.contextmanager
def compiling_for(platform: str, capability: float = 0.0) -> Iterator[None]:
    """Within it, programs are made for devices that need not be here; nothing is run for them."""
    token = _STATED.set(Target(platform, capability))
    # What was traced for another platform must not be taken up.
    jax.clear_caches()
    try:
        yield
    finally:
        _STATED.reset(token)
        jax.clear_caches()


def _capability() -> float:
    """Of the first device; 0 where the vendor has no such number."""
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, TypeError, ValueError):  # AMD reports names such as "gfx90a".
        return 0.0
