"""Shape legend, the mechanism axis, and the small structs every room shares.

Dimension names used in signatures throughout the package:

=============  ==========================================================
``batch``      B, sequences
``time``       T, tokens of a sequence
``model``      D, width of the residual stream
``heads``      H, query heads
``kv_heads``   G, key/value heads; G divides H (grouped-query attention)
``dim``        d, width of one head
``mechanism``  K, the attention mechanisms, in the order of ``mechanisms``
``layer``      L, layers of a model
=============  ==========================================================

``segment_ids``: 0 is padding; equal non-zero ids attend to each other and are contiguous in time.
``positions``: index of a token within its segment, an explicit input, so that padding and packing
change nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Optional

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.scalars import whole

Queries = Float[Array, "batch time heads dim"]
Keys = Float[Array, "batch time kv_heads dim"]
Values = Float[Array, "batch time kv_heads dim"]
Abstract = Array | jax.ShapeDtypeStruct
"""Of what only the shape and the dtype are asked."""
SegmentIds = Int[Array, "batch time"]
Positions = Int[Array, "batch time"]
Route = Int[Array, "batch time"]
Weights = Float[Array, "batch time mechanism"]
Costs = Float[Array, "mechanism"]
Scalar = Float[Array, ""]

MECHANISMS = ("full", "linear", "local")
"""Default order of the mechanism axis."""


IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")
"""Of full attention; see `mechanisms.full`."""

SEGMENTS = ("any", "padded", "one")

FALLBACKS = ("soft", "full")


def expect_record(name: str, value: Any, kind: type) -> None:
    """Raises ValueError of one sentence unless `value` is a record of that kind."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"{name}: expected {article} {kind.__name__}, got {value!r}.")


def _at_least(record: Any, least: int, name: str, optional: bool = False) -> None:
    """Makes a field an int of Python's; raises ValueError unless it is one of at least `least`."""
    value = getattr(record, name)
    if optional and value is None:
        return
    number = whole(name, value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}.")
    object.__setattr__(record, name, number)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Who may attend to whom, and by which program; static, and handed on whole.

    Attributes:
      causal: s <= t; False lets every token see both sides.
      window: w of mechanisms that have one, in tokens, the token itself included.
      sinks: first tokens of its segment that a windowed token sees besides its window.
      implementation: of full attention on all tokens, one of IMPLEMENTATIONS.
      segments: what the caller promises of `segment_ids`: nothing ("any"), one segment with padding
        behind it alone ("padded"), or one segment without padding ("one"). Kernels without ids can
        serve the last two; a promise that is broken gives wrong results.

    Raises:
      ValueError: a field that cannot be.
    """

    causal: bool = True
    window: Optional[int] = None
    sinks: int = 0
    implementation: str = "auto"
    segments: str = "any"

    def __post_init__(self) -> None:
        if not isinstance(self.causal, (bool, np.bool_)):
            raise ValueError(f"causal: expected True or False, got {self.causal!r}.")
        _at_least(self, 1, "window", optional=True)
        _at_least(self, 0, "sinks")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {self.implementation!r}."
            )
        if self.segments not in SEGMENTS:
            raise ValueError(f"segments: expected one of {SEGMENTS}, got {self.segments!r}.")

    @property
    def width(self) -> int:
        """w, for what needs one; raises ValueError where there is none."""
        if self.window is None:
            raise ValueError("window: expected a positive integer for this mechanism, got None.")
        return self.window


class Reach(NamedTuple):
    """Which keys a query of a mechanism may see, its segment and the direction aside.

    Attributes:
      window: keys to one side, the token itself included; None for no bound.
      sinks: first tokens of its segment that it sees besides.
    """

    window: Optional[int] = None
    sinks: int = 0


@dataclasses.dataclass(frozen=True)
class Router:
    """Which mechanisms there are, and who chooses among them; static, and handed on whole.

    Attributes:
      mechanisms: names on the mechanism axis, in order.
      controller: one of `controller.CONTROLLERS`: "bayesian", "softmax" (prior-free), ... or "fixed".
      hidden: width of the controller's hidden layer.
      prior: form of the prior, one of `controller.PRIORS`.
      posterior: "mean_strength" or "additive".
      network: form of the controller's network, one of `controller.NETWORKS`.
      uncertainty: measure of u_t, one of `controller.MEASURES`.
      fallback: what an uncertain token does in gated mode: "soft" mixes, "full" goes to full attention.
      fixed: with `controller="fixed"`: mechanisms of the layers, repeated to L layers, e.g.
        ("local", "local", "full"); a layer alone takes the first. The others are not computed.
    """

    mechanisms: tuple[str, ...] = MECHANISMS
    controller: str = "bayesian"
    hidden: int = 64
    prior: str = "cost_aware"
    posterior: str = "mean_strength"
    network: str = "zero_output"
    uncertainty: str = "entropy"
    fallback: str = "soft"
    fixed: tuple[str, ...] = ("full",)

    def __post_init__(self) -> None:
        # Static arguments are hashed, and JSON has lists alone.
        for name in ("mechanisms", "fixed"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else given
            ok = isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)
            if not ok or not given:
                raise ValueError(f"{name}: expected names of mechanisms, got {given!r}.")
            object.__setattr__(self, name, tuple(given))
        for name in ("controller", "prior", "posterior", "network", "uncertainty"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a name, got {getattr(self, name)!r}.")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback: expected one of {FALLBACKS}, got {self.fallback!r}.")
        if self.fallback == "full" and "full" not in self.mechanisms:
            raise ValueError(f"fallback: expected 'soft' without full attention among {self.mechanisms}, got 'full'.")
        _at_least(self, 1, "hidden")

    @property
    def is_fixed(self) -> bool:
        """Whether every token of a layer uses one mechanism, known before any data."""
        return self.controller == "fixed"

    def of_layer(self, index: int) -> Router:
        """The router of layer `index`."""
        return dataclasses.replace(self, fixed=(self.fixed[index % len(self.fixed)],))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a language model is; static, and handed on whole.

    Attributes:
      vocab_size: V.
      model_dim: D.
      num_layers: L.
      num_heads: H.
      num_kv_heads: G, a divisor of H; None for H.
      mlp_dim: F of the gated MLP; None means 8 D / 3 rounded up to a multiple of 32.
      attention: who may attend to whom.
      router: who chooses.
      scan_layers: compile one layer and loop over L of them.
      remat: recompute each layer in the backward pass.
      dtype: of the computation; None infers it. Softmax, linear state and routing stay float32.
      param_dtype: of the parameters.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: Optional[int] = None
    mlp_dim: Optional[int] = None
    attention: AttentionSpec = AttentionSpec(window=128)
    router: Router = Router()
    scan_layers: bool = False
    remat: bool = False
    dtype: Optional[Any] = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        expect_record("attention", self.attention, AttentionSpec)
        expect_record("router", self.router, Router)
        for name in ("vocab_size", "model_dim", "num_layers", "num_heads"):
            _at_least(self, 1, name)
        for name in ("num_kv_heads", "mlp_dim"):
            _at_least(self, 1, name, optional=True)

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """d = D / H."""
        return self.model_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.mlp_dim or -(-self.model_dim * 8 // 3 // 32) * 32


@flax.struct.dataclass
class Routing:
    """What a controller says about every token, and what the layer did with it.

    Attributes:
      mean: E[pi_t] under the posterior (or the softmax weights), on the simplex.
      weights: the pi_t that mixes the soft output: a reparameterised sample in training, else `mean`.
      uncertainty: u_t in [0, 1], by the configured measure.
      kl: KL(q_t || p) in nats; zero for controllers without a prior.
      penalty: what the objective adds of this token and layer, times beta; mostly the KL.
      log_uncertainty: log u_t, for a measure whose u underflows; None for the others.
      concentration: alpha_t of the Dirichlet posterior; None for controllers without one.
      route: k*_t, the mechanism a hard token uses; see `routing.decide`. Set by the layer.
      hard: whether token t used one mechanism only. Set by the layer.
    """

    mean: Weights
    weights: Weights
    uncertainty: Float[Array, "batch time"]
    kl: Float[Array, "batch time"]
    penalty: Float[Array, "batch time"]
    log_uncertainty: Optional[Float[Array, "batch time"]] = None
    concentration: Optional[Weights] = None
    route: Optional[Route] = None
    hard: Optional[Bool[Array, "batch time"]] = None


@flax.struct.dataclass
class RoutingHypers:
    """Hyper-parameters of routing. Array inputs, so that a sweep never recompiles.

    Attributes:
      strength: kappa > 0, the prior's pseudo-counts in all.
      preference: eta > 0, the preference floor of the prior mean.
      costs: c in (0, 1]^K, divided by the largest.
      threshold: theta; a token is hard iff theta > 0 and u_t <= theta (gated mode and training).
      entropy_bonus: rho of the `cost_penalty` controller, cost per nat.
      temperature: tau > 0 of the `gumbel` controller.
      price: lambda of the decision k* = argmax_k (E pi_k - lambda c_k); negative is a discount.
    """

    strength: Scalar
    preference: Scalar
    costs: Costs
    threshold: Scalar
    entropy_bonus: Scalar = np.float32(0.0)
    temperature: Scalar = np.float32(1.0)
    price: Scalar = np.float32(0.0)


@flax.struct.dataclass
class Batch:
    """One batch of token windows (NumPy on the host, jax.Array on devices).

    Attributes:
      tokens: inputs x_t.
      targets: x_{t+1}, what the model predicts at t.
      segment_ids: 0 is padding.
      positions: index within the segment.
      loss_mask: True where the target counts in every metric.
      kind: what a token is, for corpora that know (`recall`: 1 at query tokens); else 0.
      num_bytes: UTF-8 bytes of the target, for bits per byte; 0 where bytes mean nothing.
      row: global row number within the batch; with the step it names the row's PRNG key.
    """

    tokens: Int[Array, "batch time"]
    targets: Int[Array, "batch time"]
    segment_ids: SegmentIds
    positions: Positions
    loss_mask: Bool[Array, "batch time"]
    kind: Int[Array, "batch time"]
    num_bytes: Int[Array, "batch time"]
    row: Int[Array, "batch"]


def positions_in_segment(segment_ids: SegmentIds) -> Positions:
    """Index of every token within its segment (0 at padding).

    A segment starts where the id changes, so left padding and packing give the positions that the
    segment would have alone.
    """
    time = segment_ids.shape[1]
    if not time:
        return jnp.zeros_like(segment_ids, jnp.int32)
    index = jnp.arange(time, dtype=jnp.int32)[None, :]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    start = jax.lax.cummax(starts, axis=1)
    return jnp.where(segment_ids == 0, 0, index - start)
