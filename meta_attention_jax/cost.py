"""What a mechanism costs: the vector c that shapes the prior, and the FLOPs and bytes of a model.

Three kinds of numbers live here and are never mixed:

* *costs* c in (0, 1]^K, dimensionless, divided by the largest. They enter the prior and the
  projected cost of a routing.
* *projected FLOPs*, 2 per multiply-add, of the matrix products that the equations need. Softmax,
  norms and activations are left out, as is the usual convention for model FLOPs.
* *executed* FLOPs and bytes: those of the blocks, tiles and chunks that the programs really visit
  for given routes (`account`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time as clock
from typing import Any, Callable, Mapping, Optional, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meta_attention_jax.mechanisms.registry import (
    Mechanism,
    attend_with,
    get_mechanism,
    select_options,
)
from meta_attention_jax.mechanisms.work import Work, of_arrays
from meta_attention_jax.types import Keys, Queries, Route, SegmentIds

NOMINAL = {"full": 1.0, "linear": 0.15, "local": 0.30}
"""Costs of the paper (arXiv 2605.28384)."""

COST_KINDS = ("nominal", "analytic", "measured")

ROUNDS = 7
MINIMUM_SECONDS = 2e-3
"""A mechanism is called repeatedly until a round takes so long: clocks and queues are coarse."""


def nominal_costs(mechanisms: Sequence[str]) -> np.ndarray:
    """The paper's costs, on the axis `mechanisms`, divided by their largest.

    Raises:
      ValueError: a mechanism without a nominal cost (a custom one needs `costs` as numbers).
    """
    unknown = [name for name in mechanisms if name not in NOMINAL]
    if unknown:
        raise ValueError(
            f"costs: expected numbers, since 'nominal' covers {', '.join(NOMINAL)} only; "
            f"got the mechanism {unknown[0]!r}."
        )
    costs = np.array([NOMINAL[name] for name in mechanisms], np.float32)
    return costs / costs.max()


def analytic_costs(
    mechanisms: Sequence[str], *, time: int, dim: int, window: int, causal: bool = True
) -> np.ndarray:
    """FLOPs of each mechanism on a sequence of `time` tokens, divided by the largest.

    Short sequences can make `linear` the dearest of the three (it costs about 4 d^2 per token
    against 2 d T of causal full attention); that is the truth, not a mistake.
    """
    flops = [
        get_mechanism(name).flops(time, dim, causal=causal, window=window) for name in mechanisms
    ]
    costs = np.array(flops, np.float64)
    return (costs / costs.max()).astype(np.float32)


def resolve_costs(
    costs: str | Sequence[float],
    mechanisms: Sequence[str],
    *,
    time: int,
    dim: int,
    window: int,
    causal: bool = True,
) -> np.ndarray:
    """`costs` as numbers: "nominal", "analytic", or one positive number per mechanism.

    Raises:
      ValueError: unknown kind, wrong length, or a number that is not positive; "measured", whose
        numbers belong to a run directory (see `measure_costs`).
    """
    if isinstance(costs, str):
        if costs == "nominal":
            return nominal_costs(mechanisms)
        if costs == "analytic":
            return analytic_costs(mechanisms, time=time, dim=dim, window=window, causal=causal)
        if costs == "measured":
            raise ValueError(
                "costs: expected 'nominal', 'analytic' or numbers without a run directory to freeze "
                "measured ones in, got 'measured'."
            )
        raise ValueError(f"costs: expected one of {COST_KINDS} or numbers, got {costs!r}.")
    with np.errstate(over="ignore"):  # Infinity is refused below.
        values = np.asarray(costs, np.float32)
    if values.shape != (len(mechanisms),) or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(
            f"costs: expected {len(mechanisms)} positive numbers, one per mechanism, got {costs!r}."
        )
    return values / values.max()


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token of a model, split by what spends them.

    Attributes:
      projections: q, k, v and output projections of all layers.
      mlp: gated MLPs of all layers.
      logits: the output head.
      controller: the routing MLPs of all layers.
      mechanisms: attention proper, per mechanism, as if every token of every layer used it.
    """

    projections: float
    mlp: float
    logits: float
    controller: float
    mechanisms: dict[str, float]

    @property
    def trunk(self) -> float:
        """Everything that no route can save."""
        return self.projections + self.mlp + self.logits + self.controller

    @property
    def dense(self) -> float:
        """FLOPs per token when every mechanism runs on every token (soft, and dense select)."""
        return self.trunk + sum(self.mechanisms.values())

    def routed(self, fractions: dict[str, float]) -> float:
        """FLOPs per token if only the chosen mechanism ran, at these route fractions.

        A projection: it holds only where dispatch skips what no token asks for.
        """
        return self.trunk + sum(self.mechanisms[name] * f for name, f in fractions.items())

    @property
    def controller_share(self) -> float:
        """Share of the dense FLOPs that decides rather than attends."""
        return self.controller / self.dense


def count_flops(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    mechanisms: Sequence[str],
    window: int,
    time: int,
    controller_hidden: int,
    controller_outputs: int,
) -> FlopCount:
    """Forward FLOPs per token of the language model at sequences of `time` tokens.

    Per layer: projections 2 D d (2 H + 2 G), gated MLP 6 D F, controller 2 ((D + 2) h + h n) with h
    hidden units and n outputs (0 for a fixed route), mechanisms H flops_k(T) / T; logits 2 D V.
    """
    controller = 0.0
    if controller_outputs:
        controller = 2.0 * controller_hidden * (model_dim + 2 + controller_outputs)
    per_mechanism = {
        name: num_layers * num_heads * get_mechanism(name).flops(time, head_dim, window=window) / time
        for name in mechanisms
    }
    return FlopCount(
        projections=num_layers * 2.0 * model_dim * head_dim * (2 * num_heads + 2 * num_kv_heads),
        mlp=num_layers * 6.0 * model_dim * mlp_dim,
        logits=2.0 * model_dim * vocab_size,
        controller=num_layers * controller,
        mechanisms=per_mechanism,
    )


@flax.struct.dataclass
class Spending:
    """One quantity of attention proper, forward, in four views.

    Attributes:
      projected: if every token paid for its own mechanism alone.
      executed_packed: what packed dispatch does for these routes.
      executed_dense: what "compute all, select" does: every mechanism on every token.
      full_only: what full attention does on every token.
    """

    projected: Float[Array, ""]
    executed_packed: Float[Array, ""]
    executed_dense: Float[Array, ""]
    full_only: Float[Array, ""]


@flax.struct.dataclass
class Accounting:
    """FLOPs and bytes of some tokens. Additive until `per_token` divides.

    Attributes:
      tokens: tokens that are not padding.
      flops: 2 per multiply-add of matrix products.
      bytes: queries, keys and values as often as they are read, outputs as they are written
        (see `mechanisms.work`).
    """

    tokens: Float[Array, ""]
    flops: Spending
    bytes: Spending

    def per_token(self) -> Accounting:
        """The same for one token: FLOPs and bytes divided by `tokens`."""
        scaled = jax.tree.map(lambda x: x / self.tokens, (self.flops, self.bytes))
        return Accounting(self.tokens / self.tokens, *scaled)


def count_attention(
    route: Route,
    *,
    mechanisms: Sequence[str],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    segment_ids: Optional[SegmentIds] = None,
    causal: bool = True,
    window: Optional[int] = None,
    implementation: str = "auto",
    dtype: Any = jnp.float32,
    fixed: bool = False,
) -> Accounting:
    """FLOPs and bytes of one layer's attention for these routes, totals over the batch. Jittable.

    Packed dispatch: full and local by the blocks of chosen queries and the tiles of keys that the
    packed loops visit; a mechanism without a packed form on all tokens of the batch if any token,
    padding left out, is routed to it. Dense select: every mechanism on all tokens; the selection itself
    makes no product and is not counted. Projected FLOPs are those of the equation at T tokens,
    divided by T; projected bytes, for which there is no equation, those of the mechanism on all
    tokens, divided by B T.

    Args:
      route: `[B, T]`, indices on the axis `mechanisms`.
      mechanisms: names, in order.
      num_heads: H.
      num_kv_heads: G, a divisor of H.
      head_dim: d.
      segment_ids: `[B, T]`, 0 is padding; None for one segment.
      causal: False attends to both sides.
      window: of mechanisms that have one.
      implementation: of full attention on all tokens.
      dtype: of q, k and v.
      fixed: the layer has one mechanism for all tokens and computes no other: both executed numbers
        are then those of the routed mechanisms on all tokens.

    Raises:
      ValueError: unknown mechanism, a missing window, shapes that do not fit.
    """
    if route.ndim != 2:
        raise ValueError(f"route: expected shape [batch, time], got {route.shape}.")
    if segment_ids is not None and segment_ids.shape != route.shape:
        raise ValueError(f"segment_ids: expected shape {route.shape}, got {segment_ids.shape}.")
    batch, time = route.shape
    q = jax.ShapeDtypeStruct((batch, time, num_heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, time, num_kv_heads, head_dim), dtype)
    real = jnp.ones(route.shape, bool) if segment_ids is None else segment_ids != 0

    def everywhere(mechanism: Mechanism) -> Work:
        return _work(mechanism, q, k, causal, window, implementation)

    projected, packed, dense = [Work(0.0, 0.0)], [Work(0.0, 0.0)], [Work(0.0, 0.0)]
    for index, name in enumerate(mechanisms):
        mechanism = get_mechanism(name)
        chosen, whole = (route == index) & real, everywhere(mechanism)
        used = jnp.any(chosen).astype(jnp.float32)
        own = jnp.sum(chosen, dtype=jnp.float32)
        flops = num_heads * mechanism.flops(time, head_dim, causal=causal, window=window) / time
        projected.append(Work(own * flops, own * (whole.bytes / route.size)))
        if fixed:
            packed.append(Work(*(used * x for x in whole)))
            dense.append(packed[-1])
            continue
        dense.append(whole)
        if mechanism.attend_packed is None:
            packed.append(Work(*(used * x for x in whole)))
        elif mechanism.packed_work is None:
            packed.append(Work(*(own / route.size * x for x in whole)))
        else:
            options = select_options(mechanism, window=window, implementation=implementation)
            packed.append(
                mechanism.packed_work(
                    q, k, chosen, segment_ids=segment_ids, causal=causal, **options
                )
            )
    sides = projected, packed, dense, [everywhere(get_mechanism("full"))]
    return Accounting(
        jnp.sum(real, dtype=jnp.float32),
        *(
            Spending(*(jnp.float32(sum(work[kind] for work in side)) for side in sides))
            for kind in range(2)
        ),
    )


def account(route: Route, **arguments: Any) -> Accounting:
    """`count_attention` per token that is not padding: FLOPs and bytes per token of one layer."""
    return count_attention(route, **arguments).per_token()


def _work(
    mechanism: Mechanism,
    q: Queries,
    k: Keys,
    causal: bool,
    window: Optional[int],
    implementation: str,
) -> Work:
    """On all tokens."""
    if mechanism.work is not None:
        options = select_options(mechanism, window=window, implementation=implementation)
        return mechanism.work(q, k, causal=causal, **options)
    batch, time, heads, dim = q.shape
    per_head = mechanism.flops(time, dim, causal=causal, window=window)
    return of_arrays(q, k, batch * heads * per_head)


@dataclasses.dataclass(frozen=True)
class CostSetting:
    """What measured costs hold for.

    Attributes:
      mechanisms: names, in order.
      time: T, in tokens.
      window: of mechanisms that have one.
      num_heads, num_kv_heads, head_dim: H, G, d.
      dtype: of q, k and v.
      implementation: of full attention.
    """

    mechanisms: tuple[str, ...]
    time: int
    window: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    implementation: str = "auto"


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """Seconds of every mechanism, and where they were taken.

    Attributes:
      setting: what was timed.
      batch: sequences of a call.
      seconds: median of one call per mechanism.
      device: its kind.
      versions: of Python and the libraries.
    """

    setting: CostSetting
    batch: int
    seconds: tuple[float, ...]
    device: str
    versions: dict[str, str]

    @property
    def costs(self) -> np.ndarray:
        """c: seconds divided by the largest, float32."""
        seconds = np.array(self.seconds, np.float64)
        return (seconds / seconds.max()).astype(np.float32)


def measure_costs(
    setting: CostSetting, *, batch: int = 1, rounds: int = ROUNDS
) -> MeasuredCosts:
    """Times every mechanism once, causal and forward, on this process's first device.

    The compiled mechanisms run in turns on the same random q, k, v of `batch` sequences without
    padding; the median over rounds counts. Two calls never give the same numbers: freeze them.
    """
    device = jax.local_devices()[0]
    s = setting
    draw = np.random.default_rng(0).standard_normal

    def array(heads: int) -> Array:
        values = draw((batch, s.time, heads, s.head_dim), np.float32)
        return jax.device_put(jnp.asarray(values, s.dtype), device)

    q, k, v = array(s.num_heads), array(s.num_kv_heads), array(s.num_kv_heads)
    # The layer always gives ids, and what serves full attention may depend on that.
    ids = jax.device_put(jnp.ones((batch, s.time), jnp.int32), device)

    def call(name: str) -> Callable[[], Array]:
        @jax.jit
        def attend(q, k, v, ids):
            return attend_with(
                name, q, k, v, segment_ids=ids, window=s.window, implementation=s.implementation
            )

        return lambda: attend(q, k, v, ids)

    seconds = _time_in_turns({name: call(name) for name in s.mechanisms}, rounds)
    return MeasuredCosts(
        setting=setting,
        batch=batch,
        seconds=tuple(seconds[name] for name in s.mechanisms),
        device=device.device_kind,
        versions={"python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in ("jax", "jaxlib")},
    )


def _time_in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each; who goes first rotates from round to round."""

    def seconds(name: str, calls: int) -> float:
        start = clock.perf_counter()
        for _ in range(calls):
            result = functions[name]()
        jax.block_until_ready(result)
        return (clock.perf_counter() - start) / calls

    names = list(functions)
    calls = {}
    for name in names:
        seconds(name, 1)  # Compilation.
        calls[name] = max(1, round(MINIMUM_SECONDS / max(seconds(name, 1), 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(seconds(name, calls[name]))
    return {name: float(np.median(values)) for name, values in taken.items()}
