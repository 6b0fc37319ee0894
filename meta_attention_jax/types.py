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
from typing import Any, Optional

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.fields import expect, real, whole

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

MECHANISMS = ("full", "linear", "local")  # Default order of the mechanism axis.
KERNELS = ("auto", "portable", "pallas")  # Of packed and linear attention; see `kernels.select`.
IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")  # Of full attention; see `mechanisms.full`.
SEGMENTS = ("any", "padded", "one")
FALLBACKS = ("soft", "full")
STAGES = ("end_to_end", "local")
LOSSES = ("nll", "kl")


def expect_record(name: str, value: Any, kind: type) -> None:
    """Refuses what is not a record of that kind."""
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    expect(isinstance(value, kind), name, f"{article} {kind.__name__}", value)


def at_least(record: Any, least: int, name: str, optional: bool = False) -> None:
    """Makes a field an int of Python's, of at least `least`."""
    value = getattr(record, name)
    if optional and value is None:
        return
    number = whole(name, value)
    expect(number >= least, name, f"at least {least}", number)
    object.__setattr__(record, name, number)


def positive(record: Any, name: str) -> None:
    """Checks a field that may be None."""
    value = getattr(record, name)
    expect(value is None or real(name, value) > 0, name, "None or a number > 0", value)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Who may attend to whom, and by which program; static, and handed on whole.

    Attributes:
      causal: s <= t; False lets every token see both sides.
      window: w of mechanisms that have one, in tokens, the token itself included.
      sinks: first tokens of its segment that a windowed token sees besides its window.
      softcap: c: logits z become c tanh(z / c) before the mask; None leaves them.
      implementation: of full attention on all tokens, one of IMPLEMENTATIONS.
      kernel: of packed attention, and with "pallas" of causal linear attention too; one of KERNELS.
      segments: what the caller promises of `segment_ids`: nothing ("any"), one segment with padding behind it alone
        ("padded"), or one segment without padding ("one"). Kernels without ids can serve the last two; a promise that
        is broken gives wrong results.
    """

    causal: bool = True
    window: Optional[int] = None
    sinks: int = 0
    softcap: Optional[float] = None
    implementation: str = "auto"
    segments: str = "any"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        expect(isinstance(self.causal, (bool, np.bool_)), "causal", "True or False", self.causal)
        at_least(self, 1, "window", optional=True)
        at_least(self, 0, "sinks")
        positive(self, "softcap")
        expected = f"one of {', '.join(IMPLEMENTATIONS)}"
        expect(self.implementation in IMPLEMENTATIONS, "implementation", expected, self.implementation)
        expect(self.kernel in KERNELS, "kernel", f"one of {', '.join(KERNELS)}", self.kernel)
        expect(self.segments in SEGMENTS, "segments", f"one of {SEGMENTS}", self.segments)

    @property
    def width(self) -> int:
        """w, for what needs one."""
        expect(self.window is not None, "window", "a positive integer for this mechanism", None)
        return self.window


@dataclasses.dataclass(frozen=True)
class Router:
    """Which mechanisms there are, and who chooses among them; static, and handed on whole.

    Attributes:
      mechanisms: names on the mechanism axis, in order.
      controller: one of `CONTROLLERS`: "bayesian", "softmax" (prior-free), ... or "fixed".
      hidden: width of the controller's hidden layer.
      prior: form of the prior, one of `PRIORS`.
      posterior: "mean_strength" or "additive".
      network: form of the controller's network, one of `NETWORKS`.
      uncertainty: measure of u_t, one of `MEASURES`.
      fallback: what an uncertain token does in gated mode: "soft" mixes, "full" goes to full attention.
      fixed: with `controller="fixed"`: mechanisms of the layers, repeated to L layers, e.g. ("local", "local", "full");
        a layer alone takes the first. The others are not computed.
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
            expect(ok and given, name, "names of mechanisms", given)
            object.__setattr__(self, name, tuple(given))
        for name in ("controller", "prior", "posterior", "network", "uncertainty"):
            expect(isinstance(getattr(self, name), str), name, "a name", getattr(self, name))
        expect(self.fallback in FALLBACKS, "fallback", f"one of {FALLBACKS}", self.fallback)
        if self.fallback == "full" and "full" not in self.mechanisms:
            raise ValueError(f"fallback: expected 'soft' without full attention among {self.mechanisms}, got 'full'.")
        at_least(self, 1, "hidden")

    @property
    def is_fixed(self) -> bool:
        """Whether every token of a layer uses one mechanism, known before any data."""
        return self.controller == "fixed"

    def of_layer(self, index: int) -> Router:
        """The router of layer `index`."""
        return dataclasses.replace(self, fixed=(self.fixed[index % len(self.fixed)],))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al., arXiv 2104.09864): at position p the pair (x_i, x_{i + d/2}), i < d/2, turns by the
    angle p base^(-2i/d) / divisors_i, so that q . k depends on the difference of positions alone."""

    base: float = 10000.0  # The slowest pair turns once in about 2 pi base tokens.
    divisors: tuple[float, ...] = ()  # d/2 numbers: what stretches the positions of a pair; () for none.
    scale: float = 1.0  # Of the turned vectors.

    def __post_init__(self) -> None:
        for name in ("base", "scale"):
            expect(real(name, getattr(self, name)) > 0, name, "a number > 0", getattr(self, name))
        object.__setattr__(self, "divisors", tuple(real("divisors", x) for x in self.divisors))
        expect(all(x > 0 for x in self.divisors), "divisors", "numbers > 0", self.divisors)


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
      harm: ||o_full - o||^2 / ||x||^2, how far the layer's output is from full attention's; where it is asked for.
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
    harm: Optional[Float[Array, "batch time"]] = None


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
    """One batch of token windows (NumPy on the host, jax.Array on devices)."""

    tokens: Int[Array, "batch time"]  # Inputs x_t.
    targets: Int[Array, "batch time"]  # x_{t+1}, what the model predicts at t.
    segment_ids: SegmentIds  # 0 is padding.
    positions: Positions  # Index within the segment.
    loss_mask: Bool[Array, "batch time"]  # True where the target counts in every metric.
    kind: Int[Array, "batch time"]  # What a token is, for corpora that know (`recall`: 1 at query tokens); else 0.
    num_bytes: Int[Array, "batch time"]  # UTF-8 bytes of the target, for bits per byte; 0 where bytes mean nothing.
    row: Int[Array, "batch"]  # Global row number within the batch; with the step it names the row's PRNG key.


def positions_in_segment(segment_ids: SegmentIds) -> Positions:
    """Index of every token within its segment; 0 at padding. A segment starts where the id changes: left padding and
    packing give the positions that the segment would have alone."""
    time = segment_ids.shape[1]
    if not time:
        return jnp.zeros_like(segment_ids, jnp.int32)
    index = jnp.arange(time, dtype=jnp.int32)[None, :]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return jnp.where(segment_ids == 0, 0, index - start)
