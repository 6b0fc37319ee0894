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
IMPLEMENTATIONS = ("auto", "xla", "blockwise", "cudnn")  # Of full attention; see `mechanisms.full`.
SEGMENTS = ("any", "padded", "one")
FALLBACKS = ("soft", "full")


def expect_record(name: str, value: Any, kind: type) -> None:
    """Refuses what is not a record of that kind."""
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    expect(isinstance(value, kind), name, f"{article} {kind.__name__}", value)


def _at_least(record: Any, least: int, name: str, optional: bool = False) -> None:
    """Makes a field an int of Python's, of at least `least`."""
    value = getattr(record, name)
    if optional and value is None:
        return
    number = whole(name, value)
    expect(number >= least, name, f"at least {least}", number)
    object.__setattr__(record, name, number)


def _positive(record: Any, name: str) -> None:
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

    def __post_init__(self) -> None:
        expect(isinstance(self.causal, (bool, np.bool_)), "causal", "True or False", self.causal)
        _at_least(self, 1, "window", optional=True)
        _at_least(self, 0, "sinks")
        _positive(self, "softcap")
        expected = f"one of {', '.join(IMPLEMENTATIONS)}"
        expect(self.implementation in IMPLEMENTATIONS, "implementation", expected, self.implementation)
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
        _at_least(self, 1, "hidden")

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


ACTIVATIONS = ("silu", "gelu")
BIASES = ("qkv", "out", "mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a language model is; static, and handed on whole.

    Attributes:
      vocab_size, model_dim, num_layers, num_heads: V, D, L, H.
      num_kv_heads: G, a divisor of H; None for H.
      qkv_features: H d; None means D.
      mlp_dim: F of the gated MLP; None means 8 D / 3 rounded up to a multiple of 32.
      activation: of the MLP's gate; "gelu" by tanh.
      biases: which products have one, of BIASES.
      qk_norm: RMS norms of every query and key head, before they are turned.
      post_norms: RMS norms also of what attention and MLP add to the stream.
      attention_scale: of q . k; None means d^-1/2.
      windows: window of each layer that is a window by nature and is never routed, in tokens; None for the others. ()
        for all.
      window_rope: of those layers; None means `rope`.
      embedding_scale: of the input; None means D^1/2.
      tied: whether the embedding gives the logits too.
      logit_softcap: c: logits z become c tanh(z / c); None leaves them.
      attention: who may attend to whom.
      router: who chooses.
      scan_layers: compile one layer and loop over L of them.
      remat: recompute each layer in the backward pass.
      dtype: of the computation; None infers it. Softmax, linear state and routing stay float32.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: Optional[int] = None
    qkv_features: Optional[int] = None
    mlp_dim: Optional[int] = None
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    norm_epsilon: float = 1e-6
    attention_scale: Optional[float] = None
    rope: Rope = Rope()
    windows: tuple[Optional[int], ...] = ()
    window_rope: Optional[Rope] = None
    embedding_scale: Optional[float] = None
    tied: bool = True
    logit_softcap: Optional[float] = None
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
        for name in ("num_kv_heads", "qkv_features", "mlp_dim"):
            _at_least(self, 1, name, optional=True)
        expect(self.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", self.activation)
        for name in ("attention_scale", "embedding_scale", "logit_softcap"):
            _positive(self, name)
        expect(real("norm_epsilon", self.norm_epsilon) >= 0, "norm_epsilon", "a number >= 0", self.norm_epsilon)
        expect_record("rope", self.rope, Rope)
        expect_record("window_rope", self.window_rope or self.rope, Rope)
        expect(set(self.biases) <= set(BIASES), "biases", f"some of {BIASES}", self.biases)
        expect(len(self.windows) in (0, self.num_layers), "windows", f"none or {self.num_layers}", self.windows)
        for window in self.windows:
            expect(window is None or whole("windows", window) > 0, "windows", "None or tokens > 0", window)
        expect(not self.windows or None in self.windows, "windows", "None for some layer", self.windows)

    @property
    def routed(self) -> tuple[int, ...]:
        """The layers that have a router: those that are no window by nature."""
        return tuple(i for i in range(self.num_layers) if not self.windows or self.windows[i] is None)

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """d."""
        return (self.qkv_features or self.model_dim) // self.num_heads

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
