"""What a mechanism costs: the vector c that shapes the prior, and the FLOPs and bytes of a model.

Two kinds of numbers live here and are never mixed:

* *costs* c in (0, 1]^K, dimensionless, divided by the largest, enter the prior and the projected cost of a routing.
* *projected FLOPs*, 2 per multiply-add, of the matrix products that the equations need. Softmax, norms and activations
  are left out, as is the usual convention for model FLOPs.

Executed FLOPs and bytes, those of the tiles that the programs really visit for given routes, stand in
`routing.accounting`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time as clock
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.fields import expect
from meta_attention_jax.mechanisms.registry import attend, get_mechanism
from meta_attention_jax.types import AttentionSpec

COST_KINDS = ("nominal", "analytic", "measured")

ROUNDS = 7
MINIMUM_SECONDS = 2e-3
"""A mechanism is called repeatedly until a round takes so long: clocks and queues are coarse."""


def nominal_costs(mechanisms: Sequence[str]) -> np.ndarray:
    """The paper's costs, on the axis `mechanisms`, divided by their largest."""
    costs = [get_mechanism(name).cost for name in mechanisms]
    unknown = [name for name, cost in zip(mechanisms, costs) if cost is None]
    if unknown:
        raise ValueError(
            "costs: expected numbers, since 'nominal' needs mechanisms with a cost of their own, "
            f"got the mechanism {unknown[0]!r}."
        )
    costs = np.array(costs, np.float32)
    return costs / costs.max()


def analytic_costs(mechanisms: Sequence[str], *, time: int, dim: int, spec: AttentionSpec) -> np.ndarray:
    """FLOPs of each mechanism on a sequence of `time` tokens, divided by the largest.

    Short sequences can make `linear` the dearest of the three (it costs about 4 d^2 per token against 2 d T of causal
    full attention); that is the truth, not a mistake.
    """
    flops = [get_mechanism(name).flops(time, dim, spec) for name in mechanisms]
    costs = np.array(flops, np.float64)
    return (costs / costs.max()).astype(np.float32)


def resolve_costs(
    costs: str | Sequence[float], mechanisms: Sequence[str], *, time: int, dim: int, spec: AttentionSpec
) -> np.ndarray:
    """`costs` as numbers: "nominal", "analytic", or one positive number per mechanism."""
    if isinstance(costs, str):
        if costs == "nominal":
            return nominal_costs(mechanisms)
        if costs == "analytic":
            return analytic_costs(mechanisms, time=time, dim=dim, spec=spec)
        expected = "'nominal', 'analytic' or numbers without a run directory to freeze measured ones in"
        expect(costs != "measured", "costs", expected, "measured")
        raise ValueError(f"costs: expected one of {COST_KINDS} or numbers, got {costs!r}.")
    with np.errstate(over="ignore"):  # Infinity is refused below.
        values = np.asarray(costs, np.float32)
    if values.shape != (len(mechanisms),) or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"costs: expected {len(mechanisms)} positive numbers, one per mechanism, got {costs!r}.")
    return values / values.max()


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token of a model, split by what spends them."""

    projections: float  # q, k, v and output projections of all layers.
    mlp: float  # Gated MLPs of all layers.
    logits: float  # The output head.
    controller: float  # The routing MLPs of all layers that have one.
    mechanisms: dict[str, float]  # Attention proper, per mechanism, as if every token of every routed layer used it.
    windows: float = 0.0  # Attention proper of the layers that are windows by nature.

    @property
    def trunk(self) -> float:
        """Everything that no route can save."""
        return self.projections + self.mlp + self.logits + self.controller + self.windows

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


def count_flops(config: ModelConfig, *, time: int, controller_outputs: int) -> FlopCount:
    """Forward FLOPs per token of the language model at sequences of `time` tokens.

    Per layer: projections 2 D d (2 H + 2 G), gated MLP 6 D F, controller 2 ((D + 2) h + h n) with h hidden units and n
    outputs (0 for a fixed route), mechanisms H flops_k(T) / T; logits 2 D V. Layers that are windows by nature have no
    controller, and of the mechanisms local alone, with their own window.
    """
    width, layers, heads, dim = config.model_dim, config.num_layers, config.num_heads, config.head_dim
    hidden, routed = config.router.hidden if controller_outputs else 0, len(config.routed)

    def attention(name: str, spec: AttentionSpec) -> float:
        return heads * get_mechanism(name).flops(time, dim, spec) / time

    return FlopCount(
        projections=layers * 2.0 * width * dim * (2 * heads + 2 * config.kv_heads),
        mlp=layers * 6.0 * width * config.mlp_width,
        logits=2.0 * width * config.vocab_size,
        controller=routed * 2.0 * hidden * (width + 2 + controller_outputs),
        mechanisms={name: routed * attention(name, config.attention) for name in config.router.mechanisms},
        windows=sum(attention("local", spec) for spec in natural_windows(config)),
    )


def natural_windows(config: ModelConfig) -> list[AttentionSpec]:
    """Who may attend to whom in the layers that are windows by nature, which local attention serves."""
    windows = [window for window in config.windows if window is not None]
    return [dataclasses.replace(config.attention, window=window, sinks=0) for window in windows]


@dataclasses.dataclass(frozen=True)
class CostSetting:
    """What measured costs hold for."""

    mechanisms: tuple[str, ...]
    time: int
    window: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"  # Of q, k and v.
    implementation: str = "auto"  # Of full attention.
    segments: str = "any"  # What is known of them, as `AttentionSpec.segments`.
    sinks: int = 0  # Files from before the field hold for 0.
    kernel: str = "auto"  # Likewise.


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """Seconds of every mechanism, and where they were taken."""

    setting: CostSetting
    batch: int  # Sequences of a call.
    seconds: tuple[float, ...]  # Median of one call per mechanism.
    device: str  # Its kind.
    versions: dict[str, str]  # Of Python and the libraries.

    @property
    def costs(self) -> np.ndarray:
        """c: seconds divided by the largest, float32."""
        seconds = np.array(self.seconds, np.float64)
        return (seconds / seconds.max()).astype(np.float32)


def measure_costs(setting: CostSetting, *, batch: int = 1, rounds: int = ROUNDS) -> MeasuredCosts:
    """Times every mechanism once, causal and forward, on this process's first device.

    The compiled mechanisms run in turns on the same random q, k, v of `batch` sequences without padding; the median
    over rounds counts. Two calls never give the same numbers: freeze them.
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

    spec = AttentionSpec(
        window=s.window, sinks=s.sinks, implementation=s.implementation, segments=s.segments, kernel=s.kernel
    )

    def call(name: str) -> Callable[[], Array]:
        @jax.jit
        def run(q, k, v, ids):
            return attend(name, q, k, v, spec=spec, segment_ids=ids)

        return lambda: run(q, k, v, ids)

    seconds = time_in_turns({name: call(name) for name in s.mechanisms}, rounds)
    return MeasuredCosts(
        setting=setting,
        batch=batch,
        seconds=tuple(seconds[name] for name in s.mechanisms),
        device=device.device_kind,
        versions={"python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in ("jax", "jaxlib")},
    )


def time_in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
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
