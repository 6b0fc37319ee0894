"""The table of attention mechanisms; custom ones join by `register_mechanism`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence

from jaxtyping import Array, Bool

from meta_attention_jax.mechanisms import decode, full, linear, local
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import Keys, Queries, SegmentIds, Values

OPTIONS = ("window", "implementation")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One way to attend, as a record of pure functions.

    Attributes:
      attend: `attend(q, k, v, *, segment_ids, causal, **options) -> out`; q `[B, T, H, d]`, k and v
        `[B, T, G, d]`, out like q, exactly 0 at padding (segment id 0).
      flops: `flops(time, dim, *, causal=True, window=None)`, FLOPs of the matrix products (2 per
        multiply-add) that the equation needs for one head and one sequence of `time` tokens.
      rotary: whether q and k arrive rotated when the layer uses rotary positions.
      options: the static options that `attend` takes, among `window` and `implementation`.
      decode: `decode(q, cache, layer, *, needed, **options) -> out`, attention of the newest token of
        each row; q and out `[B, H, d]`, `cache` a `decode.Cache` that has the token, `needed` `[B]`
        the rows that will be used, `options` the `window` if declared. None: it cannot generate.
      work: `work(q, k, *, causal, **options)`, what `attend` really spends on all tokens, forward, as
        a `Work`; q and k may be abstract. None counts `flops`, and every array once.
      attend_packed: `attend_packed(q, k, v, chosen, base, *, segment_ids, causal, **options)`:
        `attend` at the chosen tokens, `base` elsewhere, in work proportional to the choice; None
        makes hard dispatch attend everywhere and select.
      packed_work: `packed_work(q, k, chosen, *, segment_ids, causal, **options)`, what
        `attend_packed` really spends, forward. None counts the chosen tokens' share of `work`.
    """

    attend: Callable[..., Queries]
    flops: Callable[..., float]
    rotary: bool = False
    options: tuple[str, ...] = ()
    decode: Callable[..., Queries] | None = None
    attend_packed: Callable | None = None
    work: Callable | None = None
    packed_work: Callable | None = None

    def __post_init__(self):
        unknown = [option for option in self.options if option not in OPTIONS]
        if unknown:
            raise ValueError(f"options: expected names among {OPTIONS}, got {unknown[0]!r}.")


_REGISTRY: dict[str, Mechanism] = {}


def register_mechanism(name: str, mechanism: Mechanism) -> None:
    """Adds a mechanism under a new name.

    Raises:
      ValueError: a name that is not an identifier or is taken; a value that is no `Mechanism`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected an identifier such as 'full', got {name!r}.")
    if name in _REGISTRY:
        raise ValueError(f"name: expected a new mechanism, got {name!r}, which is registered.")
    if not isinstance(mechanism, Mechanism):
        raise ValueError(f"mechanism: expected a Mechanism, got {type(mechanism).__name__}.")
    _REGISTRY[name] = mechanism


def get_mechanism(name: str) -> Mechanism:
    """The mechanism of that name.

    Raises:
      ValueError: unknown name; the sentence lists the known ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(str(name), _REGISTRY, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"mechanism: expected one of {', '.join(sorted(_REGISTRY))}, got {name!r}{hint}"
    )


def attend_with(
    mechanism: str | Mechanism,
    q: Queries,
    k: Keys,
    v: Values,
    *,
    segment_ids: SegmentIds | None = None,
    causal: bool = True,
    window: int | None = None,
    implementation: str = "auto",
) -> Queries:
    """`attend` of a mechanism, given only the options that it declares.

    Raises:
      ValueError: unknown mechanism; a mechanism with a window and `window` None.
    """
    if not isinstance(mechanism, Mechanism):
        mechanism = get_mechanism(mechanism)
    options = select_options(mechanism, window=window, implementation=implementation)

    def attend(q, k, v, segment_ids):
        return mechanism.attend(q, k, v, segment_ids=segment_ids, causal=causal, **options)

    return by_rows(attend, (0, 0, 0, 0))(q, k, v, segment_ids)


def select_options(
    mechanism: Mechanism, *, window: int | None, implementation: str
) -> dict[str, object]:
    """The options that the mechanism declares.

    Raises:
      ValueError: a mechanism with a window and `window` None.
    """
    if "window" in mechanism.options and window is None:
        raise ValueError("window: expected a positive integer for this mechanism, got None.")
    given = {"window": window, "implementation": implementation}
    return {name: given[name] for name in mechanism.options}


def decode_with(
    name: str,
    q: decode.StepQuery,
    cache: decode.Cache,
    layer: decode.Layer,
    *,
    needed: Bool[Array, "batch"],
    window: int,
) -> decode.StepQuery:
    """`decode` of a mechanism, given only the options that it declares.

    Raises:
      ValueError: unknown mechanism, or one that cannot decode.
    """
    mechanism = get_mechanism(name)
    check_decodes((name,))
    options = {"window": window} if "window" in mechanism.options else {}
    return mechanism.decode(q, cache, layer, needed=needed, **options)


def check_decodes(names: Sequence[str]) -> None:
    """Raises ValueError when one of the mechanisms cannot decode."""
    for name in names:
        if get_mechanism(name).decode is None:
            raise ValueError(
                f"mechanism: expected one with a `decode` function for generation, got {name!r}."
            )


def full_flops(time: int, dim: int, *, causal: bool = True, window: int | None = None) -> float:
    """Logits and weighted sum, 4 d per pair: 2 d T (T + 1) causal, 4 d T^2 bidirectional."""
    del window
    pairs = time * (time + 1) // 2 if causal else time * time
    return 4.0 * dim * pairs


def local_flops(time: int, dim: int, *, causal: bool = True, window: int | None = None) -> float:
    """4 d per pair within the window, w T - w (w - 1) / 2 pairs causal, w = min(window, T)."""
    if window is None or window < 1:
        raise ValueError(f"window: expected at least 1, got {window}.")
    width = min(window, time)
    causal_pairs = width * time - width * (width - 1) // 2
    pairs = causal_pairs if causal else 2 * causal_pairs - time
    return 4.0 * dim * pairs


def linear_flops(time: int, dim: int, *, causal: bool = True, window: int | None = None) -> float:
    """Per token: state update 2 d^2, read 2 d^2, normaliser 2 d; independent of direction."""
    del causal, window
    return float(time) * (4.0 * dim * dim + 2.0 * dim)


register_mechanism(
    "full",
    Mechanism(
        full.attend,
        full_flops,
        rotary=True,
        options=("implementation",),
        decode=decode.decode_full,
        work=full.count_work,
        attend_packed=full.attend_packed,
        packed_work=full.count_packed_work,
    ),
)
# Rotation would break the positivity of the linear kernel.
register_mechanism(
    "linear",
    Mechanism(
        linear.attend, linear_flops, decode=decode.decode_linear, work=linear.count_work
    ),
)
register_mechanism(
    "local",
    Mechanism(
        local.attend,
        local_flops,
        rotary=True,
        options=("window",),
        decode=decode.decode_local,
        work=local.count_work,
        attend_packed=local.attend_packed,
        packed_work=local.count_packed_work,
    ),
)
