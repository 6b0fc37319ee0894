"""What an attention mechanism is: a record of pure functions, one file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Optional

from meta_attention_jax.types import AttentionSpec, Queries, Reach


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One way to attend.

    Raises:
      ValueError: a reach without rotary.
    """

    # `attend(q, k, v, *, spec, segment_ids) -> out`; q `[B, T, H, d]`, k and v `[B, T, G, d]`, out like q, exactly 0 at
    # padding (segment id 0), and a function of its own segment alone.
    attend: Callable[..., Queries]
    # `flops(time, dim, spec)`, FLOPs of the matrix products (2 per multiply-add) that the equation needs for one head
    # and one sequence of `time` tokens.
    flops: Callable[[int, int, AttentionSpec], float]
    # Its nominal cost, in units of that of full attention; None: it needs `costs` as numbers.
    cost: Optional[float] = None
    rotary: bool = False  # Whether q and k arrive rotated when the layer uses rotary positions.
    # `step(q, cache, layer, *, needed, spec) -> out`, attention of the newest token of each row; q and out `[B, H, d]`,
    # the `cache.Cache` has the token, `needed` `[B]` are the rows that will be used. None: it cannot generate. A layer
    # with rotary positions keeps its keys rotated, and hides them (`cache.k` is None) from a mechanism that is not
    # rotary.
    step: Optional[Callable[..., Queries]] = None
    # `work(q, k, spec)`, what `attend` really spends on all tokens, forward, as an `AttentionCost`; q and k may be
    # abstract. None counts `flops`, and every array once.
    work: Optional[Callable] = None
    # `reach(spec)`, the keys that a query may see, where `attend` is softmax attention to them with rotated q and k:
    # hard dispatch then serves the chosen queries alone. None makes it attend everywhere and select.
    reach: Optional[Callable[[AttentionSpec], Reach]] = None

    def __post_init__(self) -> None:
        if self.reach is not None and not self.rotary:
            raise ValueError("reach: expected None for a mechanism that is not rotary, got a function.")
