"""The Meta-Attention layer: one set of projections, K mechanisms, a controller that chooses.

    o_t = sum_k w_tk o^k_t,    w_t on the simplex, from the controller and the mode

Source: "Meta-Attention: Bayesian Per-Token Routing for Efficient Transformer Inference", arXiv 2605.28384.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.controller.prior import validate_prior
from meta_attention_jax.cost import resolve_costs
from meta_attention_jax.fields import expect
from meta_attention_jax.mechanisms import cache as caches
from meta_attention_jax.mechanisms.blocks import rotate
from meta_attention_jax.mechanisms.projections import Projections
from meta_attention_jax.mechanisms.registry import check_decodes, get_mechanism
from meta_attention_jax.routing import dispatch
from meta_attention_jax.routing.decide import MODES, decide, mix
from meta_attention_jax.routing.dispatch import Heads
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import (
    AttentionSpec,
    Positions,
    Queries,
    Rope,
    Route,
    Router,
    Routing,
    RoutingHypers,
    SegmentIds,
    Weights,
    expect_record,
    positions_in_segment,
)


class MetaAttention(nn.Module):
    """Self-attention in which every token is routed to full, linear or local attention.

    Usable in the place of `nn.MultiHeadDotProductAttention` for self-attention: `layer(x)` returns the array alone; the
    `Routing` is sown as `("intermediates", "routing")`. `routed` returns both, and generates with a cache.

    Without `keys` the layer is deterministic: weights are those of the posterior mean. With `keys` (one per example) it
    trains: one reparameterised sample of pi per token, and straight-through gradients at the tokens that the gate makes
    hard.

    Attributes:
      num_heads: H, of queries.
      num_kv_heads: G, of keys and values, a divisor of H; None means H.
      qkv_features: H d; None means the width of the input.
      out_features: width of the output; None means the width of the input.
      spec: who may attend to whom.
      router: the mechanisms, and who chooses among them.
      rotary: rotate q and k of the mechanisms that want it (full and local), as `rope` says.
      scale: of q . k; None means d^-1/2.
      norm_epsilon: of RMS norms of the query and key heads; None: there are none.
      mode: "soft" mixes all mechanisms, "hard" uses argmax E[pi] alone, "gated" is hard where the uncertainty is at
        most the threshold and soft elsewhere.
      dispatch: where every token is hard (mode "hard" without keys, or a forced route): "packed" does only the work
        that the routes ask for, "dense" computes all mechanisms and selects, "auto" is packed for long sequences. The
        output is the same.
      costs: "nominal" or one positive number per mechanism, used when `hypers` is not given. What depends on the length
        ("analytic") is refused: a token's route must not.
      strength: kappa of the prior, when `hypers` is not given.
      preference: eta of the prior, when `hypers` is not given.
      threshold: theta of the gate, when `hypers` is not given.
      out_bias: of the output alone; None means `use_bias`.
      adapter_rank: of low-rank adapters beside the projections; 0: there are none.
      dtype: of the computation; None infers it. Softmax, linear state and routing stay float32.
    """

    num_heads: int
    num_kv_heads: Optional[int] = None
    qkv_features: Optional[int] = None
    out_features: Optional[int] = None
    spec: AttentionSpec = AttentionSpec(window=128)
    router: Router = Router()
    rotary: bool = False
    rope: Rope = Rope()
    scale: Optional[float] = None
    norm_epsilon: Optional[float] = None
    mode: str = "soft"
    dispatch: str = "auto"
    costs: str | Sequence[float] = "nominal"
    strength: float = 2.0
    preference: float = 0.1
    threshold: float = 0.0
    use_bias: bool = False
    out_bias: Optional[bool] = None
    adapter_rank: int = 0
    dtype: Optional[Any] = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Optional[nn.initializers.Initializer] = None

    def __call__(
        self,
        inputs_q: Float[Array, "batch time model"],
        inputs_k: Optional[Array] = None,
        inputs_v: Optional[Array] = None,
        *,
        inputs_kv: Optional[Array] = None,
        mask: Optional[Array] = None,
        deterministic: Optional[bool] = None,
        **kwargs: Any,
    ) -> Float[Array, "batch time out"]:
        """Attends from every token to its segment; returns the output array alone. Further arguments are `routed`'s.

        Raises ValueError for cross-attention (inputs_k, inputs_v and inputs_kv can only be `inputs_q` itself), for a
        mask (padding and packing are `segment_ids`), and for a field that cannot be. `deterministic=False` draws the
        keys from the rng stream "routing" when none are given; it is a Python value, so under `nn.remat` name it in
        `static_argnums` or give `keys`.
        """
        for name, other in (("inputs_k", inputs_k), ("inputs_v", inputs_v), ("inputs_kv", inputs_kv)):
            if other is not None and other is not inputs_q:
                raise ValueError(
                    f"{name}: expected None or inputs_q itself, got another array; MetaAttention is "
                    "self-attention, and which tokens may see each other is said by `segment_ids`."
                )
        if mask is not None:
            raise ValueError(
                "mask: expected None, got an array; padding and packing are said by `segment_ids` "
                "[batch, time] (0 = padding), causality by the field `spec`."
            )
        if deterministic is not None and not deterministic and kwargs.get("keys") is None:
            kwargs["keys"] = jax.random.split(self.make_rng("routing"), inputs_q.shape[0])
        return self.routed(inputs_q, **kwargs)[0]

    @nn.compact
    def routed(
        self,
        x: Float[Array, "batch time model"],
        *,
        segment_ids: Optional[SegmentIds] = None,
        positions: Optional[Positions] = None,
        residual: Optional[Float[Array, "batch time model"]] = None,
        route: Optional[Route] = None,
        hypers: Optional[RoutingHypers] = None,
        keys: Optional[Key[Array, "batch"]] = None,
        cache: Optional[caches.Cache] = None,
        layer: caches.Layer = 0,
    ) -> tuple[Float[Array, "batch time out"], Routing, Optional[caches.Cache]]:
        """The output, the routing behind it, and the cache with these tokens in it.

        With a cache, one token per row goes on where the row ends: every token enters the cache, and a row then reads
        only what the mechanisms of non-zero weight need. More tokens per row are prompts from the beginning, padded
        behind; what the cache held of this layer is overwritten. Raises ValueError for a field that cannot be, shapes
        that do not fit, prompts longer than the capacity, or a cache for what cannot generate.

        Args:
          segment_ids: 0 is padding (output: the bias alone); None means one segment, no padding.
          positions: index within the segment; None derives it from `segment_ids` or the cache.
          residual: the stream before normalisation, whose norm the controller sees; None means x.
          route: forces k*_t; every token is then hard.
          hypers: None takes them from the fields, and lambda 0.
          keys: one PRNG key per example; None is deterministic.
          cache: of all layers, this one's at index `layer`; None reads whole sequences and remembers nothing.
        """
        heads, kv_heads, dim = self._validate(x, cache)
        batch, time, model = x.shape
        spec = self.spec
        if segment_ids is None:
            spec = dataclasses.replace(spec, segments="one")
            segment_ids = jnp.ones((batch, time), jnp.int32)
        for name, given in (("segment_ids", segment_ids), ("positions", positions), ("route", route)):
            if given is not None:
                expect(given.shape == (batch, time), name, f"shape {(batch, time)}", given.shape)
        if positions is None and cache is not None and time == 1:
            ends = by_rows(lambda cache, layer: cache.length[layer], (1, None))(cache, layer)
            positions = ends[:, None]
        elif positions is None:
            positions = by_rows(positions_in_segment, (0,))(segment_ids)

        projections = Projections(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            features=self.out_features or model,
            use_bias=self.use_bias,
            out_bias=self.out_bias,
            norm_epsilon=self.norm_epsilon,
            adapter_rank=self.adapter_rank,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            out_kernel_init=self.out_kernel_init,
            name="projections",
        )
        controller = make_controller(self.router, dtype=self.dtype or jnp.float32, name="controller")
        hypers = self._hypers(time, dim) if hypers is None else hypers
        routing = controller(
            x,
            residual=x if residual is None else residual,
            positions=positions,
            segment_ids=segment_ids,
            hypers=hypers,
            keys=keys,
        )

        fixed = self.router.is_fixed  # Then there is no decision that a price or a doubt could change.
        cautious = self.router.fallback == "full" and not fixed
        fallback = self.router.mechanisms.index("full") if cautious else None

        def own_rows(qkv, routing, segment_ids, positions, route, cache, layer, threshold, prices):
            q, k, v = qkv
            if self.scale is not None:  # The mechanisms divide by d^1/2.
                q = q * jnp.asarray(self.scale * dim**0.5, q.dtype)
            turned = (rotate(q, positions, self.rope), rotate(k, positions, self.rope)) if self.rotary else (q, k)
            decision = decide(
                routing, mode=self.mode, threshold=threshold, prices=prices, fallback=fallback,
                route=route, training=keys is not None,
            )
            routing = routing.replace(route=decision.route, hard=decision.hard)
            names, weights = self.router.mechanisms, decision.weights
            if fixed and route is None:
                # One mechanism for all: the baselines pay for what they use, and for nothing else.
                names, weights = self.router.fixed[:1], jnp.ones_like(weights[..., :1])
            no_soft = self.mode == "hard" or (self.mode == "gated" and fallback is not None)
            every_token_hard = route is not None or (no_soft and keys is None)
            tokens = Heads(q, k, v, *turned)
            if cache is not None and time == 1:
                cache = caches.append(cache, layer, *(x[:, 0] for x in (turned[1], k, v)))
                return (self._step(names, tokens, weights, cache, layer), routing), cache
            if cache is not None:
                cache = caches.fill(cache, layer, turned[1], k, v, segment_ids)
            chosen = decision.route if every_token_hard else None
            mixed = self._attend(names, tokens, weights, spec, segment_ids, chosen)
            return (mixed, routing), cache

        (mixed, routing), cache = by_rows(own_rows, (0, 0, 0, 0, 0, 1, None, None, None), (0, 1))(
            projections.project(x), routing, segment_ids, positions, route, cache, layer,
            hypers.threshold, None if fixed else hypers.price * hypers.costs,
        )
        self.sow("intermediates", "routing", routing)
        return projections.merge(mixed), routing, cache

    def _attend(
        self,
        names: Sequence[str],
        heads: Heads,
        weights: Weights,
        spec: AttentionSpec,
        segment_ids: SegmentIds,
        route: Optional[Route],
    ) -> Queries:
        """Whole sequences: packed where every token has a route, else all mechanisms on all tokens, mixed by weight."""
        packed = dispatch.resolve_dispatch(self.dispatch, time=heads.q.shape[1]) == "packed"
        if len(names) > 1 and route is not None and packed:
            return dispatch.hard_attention(
                heads.q, heads.k, heads.v, route, mechanisms=names, spec=spec,
                rotated=(heads.rotated_q, heads.rotated_k), segment_ids=segment_ids,
            )
        outputs = dispatch.all_outputs(names, heads, spec=spec, segment_ids=segment_ids)
        return mix(outputs, weights) if len(names) > 1 else outputs[0]

    def _step(
        self, names: Sequence[str], heads: Heads, weights: Weights, cache: caches.Cache, layer: caches.Layer
    ) -> Queries:
        """One token per row, which the cache has. Weights of 0 say which rows need nothing."""
        outputs = []
        for k, name in enumerate(names):
            record = get_mechanism(name)
            query = heads.of(record)[0][:, 0]
            needed = weights[:, 0, k] != 0
            # Rotated keys are of no use to a query that is not.
            held = cache.replace(k=None) if self.rotary and not record.rotary else cache
            out = record.step(query, held, layer, needed=needed, spec=self.spec)
            outputs.append(out[:, None])
        return mix(outputs, weights)

    def _hypers(self, time: int, dim: int) -> RoutingHypers:
        expected = "'nominal' or numbers, such as those of `cost.analytic_costs(..., time=...)` at one fixed length"
        expect(self.costs != "analytic", "costs", expected, "analytic")
        costs = resolve_costs(self.costs, self.router.mechanisms, time=time, dim=dim, spec=self.spec)
        expect(0 <= self.threshold <= 1, "threshold", "theta in [0, 1]", self.threshold)
        if not self.router.is_fixed:
            validate_prior(strength=self.strength, preference=self.preference, costs=costs)
        return RoutingHypers(
            strength=jnp.float32(self.strength),
            preference=jnp.float32(self.preference),
            costs=jnp.asarray(costs),
            threshold=jnp.float32(self.threshold),
        )

    def _validate(self, x: Array, cache: Optional[caches.Cache]) -> tuple[int, int, int]:
        """Checks the fields against each other; returns (H, G, d)."""
        expect_record("spec", self.spec, AttentionSpec)
        expect_record("router", self.router, Router)
        if x.ndim != 3:
            raise ValueError(f"inputs_q: expected [batch, time, model], got shape {x.shape}.")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        features = x.shape[-1] if self.qkv_features is None else self.qkv_features
        expected = f"a positive divisor of qkv_features = {features}"
        expect(self.num_heads > 0 and not features % self.num_heads, "num_heads", expected, self.num_heads)
        expected = f"a positive divisor of num_heads = {self.num_heads}"
        expect(kv_heads > 0 and not self.num_heads % kv_heads, "num_kv_heads", expected, kv_heads)
        dispatch.resolve_dispatch(self.dispatch, time=x.shape[1])
        expect(self.mode in MODES, "mode", f"one of {MODES}", self.mode)
        for name in self.router.mechanisms:
            get_mechanism(name)
        if cache is not None:
            if not self.spec.causal:
                raise ValueError("causal: expected True for generation, got False.")
            check_decodes(self.router.mechanisms)
        return self.num_heads, kv_heads, features // self.num_heads
