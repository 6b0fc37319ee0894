"""Full softmax attention: every token attends to its whole past."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from meta_attention_jax.mechanisms import blocks, blockwise, masks, packed, work
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")

BLOCKWISE_TIME = 256
"""Length from which "auto" prefers `blockwise`."""

PACKED_BLOCK, PACKED_TILE = 64, 128
"""Queries of a packed block, and keys that it meets at once, at T below LONG_TIME; twice these from
there on. Larger blocks are faster per pair, but their queries span more positions, so they meet more
keys in vain. Forward+backward at 10 % full, twice / once, on two CPU cores (4 heads, d 64), one trial
that was not recorded: 1.09 at T 4096, 0.88 at 8192, 0.87 at 32768."""

LONG_TIME = 8192

CUDNN_DIM = 128
CUDNN_CAPABILITY = 8.0


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    implementation: str = "auto",
) -> Queries:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over s <= t of the segment of t.

    Bidirectional (`causal` False): over the whole segment. Softmax in float32.

    Args:
      q: `[B, T, H, d]`.
      k, v: `[B, T, G, d]`, G a divisor of H.
      segment_ids: `[B, T]`, 0 is padding (output 0); None for one segment.
      causal: False attends to both sides.
      implementation: "xla" builds the T x T square; "blockwise" an online softmax whose memory is
        linear in T, gradients included; "cudnn" the fused kernel of NVIDIA GPUs; "auto" is
        `resolve_implementation`.

    Returns:
      `[B, T, H, d]` in the dtype of q.

    Raises:
      ValueError: shapes that do not fit (see `validate_qkv`); an implementation that is unknown or
        cannot serve these arguments on this backend.
    """
    blocks.validate_qkv(q, k, v, segment_ids)
    chosen = resolve_implementation(
        implementation,
        time=q.shape[1],
        dtype=q.dtype,
        head_dim=q.shape[3],
        has_segments=segment_ids is not None,
        backend=jax.default_backend(),
    )
    if blocks.is_empty(q):
        return jnp.zeros_like(q)
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if chosen == "xla":
        return _square(q, k, v, segment_ids, causal)
    return blockwise.attend(
        q, k, v, segment_ids=segment_ids, causal=causal, window=None, block=_dense_block(q)
    )


def count_work(
    q: Queries, k: Keys, *, causal: bool = True, implementation: str = "auto"
) -> work.Work:
    """What `attend` with segment ids spends on all tokens, forward.

    "xla": all T x T pairs, keys and values read once. "blockwise": the tiles that it visits. q and k
    are asked for shape and dtype only.

    Raises:
      ValueError: an implementation that is unknown or cannot serve with segment ids ("cudnn").
    """
    batch, time, _, dim = q.shape
    chosen = resolve_implementation(
        implementation, time=time, dtype=q.dtype, head_dim=dim, has_segments=True,
        backend=jax.default_backend(),
    )
    if chosen == "xla":
        return work.of_tiles(
            q, k, blocks=batch, tiles=batch, rows=batch * time, block=time, tile=time
        )
    return blockwise.count_work(q, k, causal=causal, window=None, block=_dense_block(q))


def attend_packed(
    q: Queries,
    k: Keys,
    v: Values,
    chosen: Bool[Array, "batch time"],
    base: Queries,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    implementation: str = "auto",
) -> Queries:
    """`attend` at the chosen rows, `base` at the others, in work proportional to the choice.

    See `packed.attend`; `implementation` is of no consequence here.

    Raises:
      ValueError: as `packed.attend`; an unknown implementation.
    """
    _check_name(implementation)
    return packed.attend(
        q, k, v, chosen, base,
        segment_ids=segment_ids, causal=causal,
        **packed_sizes(q.shape[1]),
    )


def packed_sizes(time: int) -> dict[str, int]:
    """block and tile of packed queries at T tokens."""
    factor = 2 if time >= LONG_TIME else 1
    return {"block": factor * PACKED_BLOCK, "tile": factor * PACKED_TILE}


def count_packed_work(
    q: Queries,
    k: Keys,
    chosen: Bool[Array, "batch time"],
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    implementation: str = "auto",
) -> work.Work:
    """What `attend_packed` spends on these choices, forward; see `packed.count_work`."""
    del implementation
    return packed.count_work(
        q, k, chosen, segment_ids=segment_ids, causal=causal, **packed_sizes(q.shape[1])
    )


def _dense_block(q: Queries) -> int:
    """Edge of a tile of all tokens; on a 2-core CPU, tiles of all heads together should fit the
    last-level cache (measured)."""
    batch, _, heads, _ = q.shape
    # A batch that is a symbol (`jax.export`) may be large.
    return 128 if not isinstance(batch, int) or batch * heads >= 16 else 256


def resolve_implementation(
    implementation: str,
    *,
    time: int,
    dtype: jnp.dtype,
    head_dim: int,
    has_segments: bool,
    backend: str,
    compute_capability: float | None = None,
) -> str:
    """What "auto" stands for, and whether an explicit choice can be served; never a fallback.

    "auto": `cudnn` where it can serve, else `blockwise` from BLOCKWISE_TIME tokens on, else `xla`.

    Args:
      implementation: one of IMPLEMENTATIONS.
      time: T.
      dtype: of q, k and v.
      head_dim: d.
      has_segments: whether segment ids are given (cuDNN has no ids without a T x T mask).
      backend: `jax.default_backend()`.
      compute_capability: of the GPU; None asks the first device. cuDNN's kernel needs 8.0.

    Returns:
      "xla", "blockwise" or "cudnn": deterministic, so that a training log can name it.

    Raises:
      ValueError: unknown implementation, or "cudnn" where it cannot serve.
    """
    _check_name(implementation)
    dtype = jnp.dtype(dtype)
    fused = (
        backend == "gpu"
        and dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
        and head_dim <= CUDNN_DIM
        and head_dim % 8 == 0
        and time % 2 == 0  # Its backward pass refuses an odd length.
        and not has_segments
    )
    if fused and compute_capability is None:
        compute_capability = _compute_capability()
    fused = fused and compute_capability >= CUDNN_CAPABILITY
    if implementation == "cudnn" and not fused:
        raise ValueError(
            f"implementation: expected for 'cudnn' an NVIDIA GPU of compute capability "
            f"{CUDNN_CAPABILITY}, bfloat16 or float16, an even length, a head dim that is a multiple "
            f"of 8 up to {CUDNN_DIM} and no segment_ids, got {backend}, {dtype.name}, length {time}, "
            f"head dim {head_dim} and "
            f"{'segment_ids' if has_segments else 'no segment_ids'}."
        )
    if implementation != "auto":
        return implementation
    if fused:
        return "cudnn"
    return "blockwise" if time >= BLOCKWISE_TIME else "xla"


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}."
        )


def _compute_capability() -> float:
    """Of the first device; 0 where the vendor has no such number."""
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, TypeError, ValueError):  # AMD reports names such as "gfx90a".
        return 0.0


def _square(
    q: Queries, k: Keys, v: Values, segment_ids: SegmentIds | None, causal: bool
) -> Queries:
    """The textbook form, with all T x T logits at once."""
    index = jnp.arange(q.shape[1])
    segments = blocks.default_segments(q, segment_ids)
    allowed = masks.band(index, index, causal=causal)[None] & masks.same_segment(segments, segments)
    queries = blocks.group_queries(q, k.shape[2])
    keys, values = blocks.head_major(k), blocks.head_major(v)
    logits = blockwise.dot("bgrqd,bgkd->bgrqk", queries, keys) * q.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, masks.MASKED), axis=-1)
    out = blockwise.dot("bgrqk,bgkd->bgrqd", weights, values)
    out = jnp.where(segments[:, None, None, :, None] != 0, out, 0.0)
    return blocks.ungroup_queries(out).astype(q.dtype)
