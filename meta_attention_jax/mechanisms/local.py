"""Sliding-window softmax attention: every token attends to its last `window` tokens."""

from __future__ import annotations

from jaxtyping import Array, Bool

from meta_attention_jax.mechanisms import blocks, blockwise, packed, work
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

BLOCK = 64
"""Edge of a tile of all tokens."""

PACKED_BLOCK, PACKED_TILE = 64, 64
"""Queries of a packed block, and keys that it meets at once."""


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int,
) -> Queries:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over s in [t - window + 1, t] of the segment.

    Bidirectional (`causal` False): |s - t| < window. Distances are by index in the array. Softmax
    in float32. Time and memory, gradients included, are O(T window); a window of T or more gives
    full attention.

    Args:
      q: `[B, T, H, d]`.
      k, v: `[B, T, G, d]`, G a divisor of H.
      segment_ids: `[B, T]`, 0 is padding (output 0); None for one segment.
      causal: False attends to both sides.
      window: tokens seen to one side, the token itself included; at least 1.

    Returns:
      `[B, T, H, d]` in the dtype of q.

    Raises:
      ValueError: shapes that do not fit (see `validate_qkv`), window below 1.
    """
    blocks.validate_qkv(q, k, v, segment_ids, window)
    return blockwise.attend(
        q, k, v, segment_ids=segment_ids, causal=causal, window=window, block=BLOCK
    )


def count_work(q: Queries, k: Keys, *, causal: bool = True, window: int) -> work.Work:
    """What `attend` spends on all tokens, forward; q and k are asked for shape and dtype only."""
    return blockwise.count_work(q, k, causal=causal, window=window, block=BLOCK)


def attend_packed(
    q: Queries,
    k: Keys,
    v: Values,
    chosen: Bool[Array, "batch time"],
    base: Queries,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int,
) -> Queries:
    """`attend` at the chosen rows, `base` at the others; see `packed.attend`.

    A packed block sees the windows of all its rows, which lie further apart than neighbours do: with
    every second token chosen the work halves no longer, but falls to about two thirds.
    """
    return packed.attend(
        q, k, v, chosen, base,
        segment_ids=segment_ids, causal=causal, window=window,
        block=PACKED_BLOCK, tile=PACKED_TILE,
    )


def count_packed_work(
    q: Queries,
    k: Keys,
    chosen: Bool[Array, "batch time"],
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int,
) -> work.Work:
    """What `attend_packed` spends on these choices, forward; see `packed.count_work`."""
    return packed.count_work(
        q, k, chosen, segment_ids=segment_ids, causal=causal, window=window,
        block=PACKED_BLOCK, tile=PACKED_TILE,
    )
