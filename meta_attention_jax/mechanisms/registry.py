"""The table of attention mechanisms; custom ones join by a line in it, or by `register_mechanism`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from meta_attention_jax.fields import expect, near
from meta_attention_jax.mechanisms import full, linear, local
from meta_attention_jax.mechanisms.mechanism import Mechanism
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import AttentionSpec, Keys, Queries, SegmentIds, Values, expect_record

REGISTRY: dict[str, Mechanism] = {
    "full": full.MECHANISM,
    "linear": linear.MECHANISM,
    "local": local.MECHANISM,
}


def register_mechanism(name: str, mechanism: Mechanism) -> None:
    """Adds a mechanism under a new name, an identifier; raises ValueError for another one."""
    expect(isinstance(name, str) and name.isidentifier(), "name", "an identifier such as 'full'", name)
    if name in REGISTRY:
        raise ValueError(f"name: expected a new mechanism, got {name!r}, which is registered.")
    if not isinstance(mechanism, Mechanism):
        raise ValueError(f"mechanism: expected a Mechanism, got {type(mechanism).__name__}.")
    REGISTRY[name] = mechanism


def get_mechanism(name: str) -> Mechanism:
    """The mechanism of that name; raises ValueError, with the known ones, if there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    known = ", ".join(sorted(REGISTRY))
    raise ValueError(f"mechanism: expected one of {known}, got {name!r}{near(str(name), REGISTRY)}")


def attend(
    mechanism: str | Mechanism,
    q: Queries,
    k: Keys,
    v: Values,
    *,
    spec: AttentionSpec = AttentionSpec(),
    segment_ids: Optional[SegmentIds] = None,
) -> Queries:
    """`attend` of a mechanism (see `Mechanism`), on every device's own rows where a mesh is set; raises ValueError for
    one that is unknown, and for shapes, a window or an implementation that cannot be."""
    expect_record("spec", spec, AttentionSpec)
    if not isinstance(mechanism, Mechanism):
        mechanism = get_mechanism(mechanism)

    def own(q, k, v, segment_ids):
        return mechanism.attend(q, k, v, spec=spec, segment_ids=segment_ids)

    # Of kernels no compiler knows how to split them.
    return by_rows(own, (0, 0, 0, 0), split=spec.kernel == "pallas")(q, k, v, segment_ids)


def check_decodes(names: Sequence[str]) -> None:
    """Refuses mechanisms of which one cannot decode."""
    for name in names:
        expect(get_mechanism(name).step is not None, "mechanism", "one with a `step` function for generation", name)
