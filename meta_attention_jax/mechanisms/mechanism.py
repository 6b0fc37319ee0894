"""What an attention mechanism is: a record of pure functions, one file each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Optional

from meta_attention_jax.types import AttentionSpec, Queries


class Reach(NamedTuple):
    """Which keys a query of a mechanism may see, its segment and the direction aside."""

    window: Optional[int] = None  # Keys to one side, the token itself included; None for no bound.
    sinks: int = 0  # First tokens of its segment that it sees besides.


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One way to attend.

    Attributes:
      attend: `attend(q, k, v, *, spec, segment_ids) -> out`; q `[B, T, H, d]`, k and v `[B, T, G, d]`, out like q,
        exactly 0 at padding (segment id 0), and a function of its own segment alone.
      flops: `flops(time, dim, spec)`, FLOPs of the matrix products (2 per multiply-add) that the equation needs for one
        head and one sequence of `time` tokens.
      cost: its nominal cost, in units of that of full attention; None: it needs `costs` as numbers.
      rotary: whether q and k arrive rotated when the layer uses rotary positions.
      step: `step(q, cache, layer, *, needed, spec) -> out`, attention of the newest token of each row; q and out `[B,
        H, d]`, the `cache.Cache` has the token, `needed` `[B]` are the rows that will be used. None: it cannot
        generate. A layer with rotary positions keeps its keys rotated, and hides them (`cache.k` is None) from a
        mechanism that is not rotary.
      work: `work(q, k, spec)`, what `attend` really spends on all tokens, forward, as an `AttentionCost`; q and k may
        be abstract. None counts `flops`, and every array once.
      reach: `reach(spec)`, the keys that a query may see, where `attend` is softmax attention to them with rotated q
        and k: hard dispatch then serves the chosen queries alone. None, as without `rotary`: it attends everywhere and
        selects.
    """

    attend: Callable[..., Queries]
    flops: Callable[[int, int, AttentionSpec], float]
    cost: Optional[float] = None
    rotary: bool = False
    step: Optional[Callable[..., Queries]] = None
    work: Optional[Callable] = None
    reach: Optional[Callable[[AttentionSpec], Reach]] = None

    def __post_init__(self) -> None:
        if self.reach is not None and not self.rotary:
            raise ValueError("reach: expected None for a mechanism that is not rotary, got a function.")
