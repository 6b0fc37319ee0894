"""Which packed kernel runs: by platform, and named, so that a log can say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from meta_attention_jax.kernels import portable
from meta_attention_jax.kernels.worklist import Sizes
from meta_attention_jax.types import Reach

BLOCK, TILE, LOCAL_TILE = 64, 128, 64
"""Queries of a block; keys of a tile where nothing bounds the reach, at T below LONG_TIME (block and tile are twice
that from there on), and of a tile of a window. Larger blocks are faster per pair, but their queries span more
positions, so they meet more keys in vain. Forward+backward at 10 % full, twice / once, on two CPU cores (4 heads, d
64), one trial that was not recorded: 1.09 at T 4096, 0.88 at 8192, 0.87 at 32768."""

LONG_TIME = 8192


class Kernel(NamedTuple):
    """A packed kernel."""

    name: str  # For logs.
    attend: Callable  # `(q, k, v, work) -> (packed output, log-sum-exp)`, as `portable.attend`.
    sizes: Callable[[int, Reach], Sizes]  # `(time, reach) -> Sizes` that it wants.


def portable_sizes(time: int, reach: Reach) -> Sizes:
    """Blocks and tiles of the portable kernel; a tile has at most T keys."""
    if reach.window is not None:
        return Sizes(BLOCK, min(LOCAL_TILE, time))
    factor = 2 if time >= LONG_TIME else 1
    return Sizes(factor * BLOCK, min(factor * TILE, time))


def packed(platform: str, *, dtype: Any, dim: int) -> Kernel:
    """The kernel for these arrays on this platform; the loops of XLA, on all of them so far."""
    del platform, dtype, dim
    return Kernel("portable", portable.attend, portable_sizes)
