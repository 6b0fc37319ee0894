"""The Meta-Attention layer: one set of projections, K mechanisms, a controller that chooses.

    o_t = sum_k w_tk o^k_t,    w_t on the simplex, from the controller and the mode

Source: "Meta-Attention: Bayesian Per-Token Routing for Efficient Transformer Inference",
arXiv 2605.28384.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.controller.prior import validate_prior
from meta_attention_jax.cost import resolve_costs
from meta_attention_jax.mechanisms import decode as stepwise
from meta_attention_jax.mechanisms.modules import Projections
from meta_attention_jax.mechanisms.registry import (
    attend_with,
    check_decodes,
    decode_with,
    get_mechanism,
)
from meta_attention_jax.mechanisms.rotary import rotate
from meta_attention_jax.routing import mixture
from meta_attention_jax.routing.dispatch import hard_attention, resolve_dispatch
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import (
    MECHANISMS,
    Keys,
    Positions,
    Queries,
    Route,
    Routing,
    RoutingHypers,
    SegmentIds,
    Values,
    Weights,
    positions_in_segment,
)


class Heads(NamedTuple):
    """Projected tokens; the rotated ones equal the plain ones where the layer is not rotary."""

    q: Queries
    k: Keys
    v: Values
    rotated_q: Queries
    rotated_k: Keys


class MetaAttention(nn.Module):
    """Self-attention in which every token is routed to full, linear or local attention.

    Usable in the place of `nn.MultiHeadDotProductAttention` for self-attention: `layer(x)` returns
    the array alone; the `Routing` is sown as `("intermediates", "routing")`. `routed` returns both;
    `prefill` and `decode` generate with the same parameters.

    Without `keys` the layer is deterministic: weights are those of the posterior mean. With `keys`
    (one per example) it trains: one reparameterised sample of pi per token, and straight-through
    gradients at the tokens that the gate makes hard.

    Attributes:
      num_heads: H query heads.
      num_kv_heads: G key/value heads, G divides H; None means H.
      qkv_features: H d; None means the width of the input.
      out_features: width of the output; None means the width of the input.
      mechanisms: names on the mechanism axis, in order.
      window: w of the local mechanism, in tokens, the token itself included.
      causal: False lets every token see its whole segment.
      rotary: rotate q and k of the mechanisms that want it (full and local).
      implementation: of full attention: "auto", "xla", "blockwise" or "cudnn".
      mode: "soft" mixes all mechanisms, "hard" uses argmax E[pi] alone, "gated" is hard where the
        uncertainty is at most the threshold and soft elsewhere.
      dispatch: where every token is hard (mode "hard" without keys, or a forced route): "packed"
        does only the work that the routes ask for, "dense" computes all mechanisms and selects,
        "auto" is packed for long sequences. The output is the same.
      controller: one of `CONTROLLERS`: "bayesian", "softmax" (prior-free), ... or "fixed".
      controller_hidden: width of the controller's hidden layer.
      prior: "cost_aware" or "uniform".
      posterior: "mean_strength" or "additive".
      uncertainty: "entropy", "mutual_information" or "vacuity".
      fixed: the mechanism of every token when `controller="fixed"`; the others are not computed.
      costs: "nominal" or one positive number per mechanism, used when `hypers` is not given. What
        depends on the length ("analytic") is refused: a token's route must not.
      strength: kappa of the prior, when `hypers` is not given.
      preference: eta of the prior, when `hypers` is not given.
      threshold: theta of the gate, when `hypers` is not given.
      dtype: of the computation; None infers it. Softmax, linear state and routing stay float32.
      param_dtype: of the parameters.
    """

    num_heads: int
    num_kv_heads: Optional[int] = None
    qkv_features: Optional[int] = None
    out_features: Optional[int] = None
    mechanisms: Sequence[str] = MECHANISMS
    window: int = 128
    causal: bool = True
    rotary: bool = False
    implementation: str = "auto"
    mode: str = "soft"
    dispatch: str = "auto"
    controller: str = "bayesian"
    controller_hidden: int = 64
    prior: str = "cost_aware"
    posterior: str = "mean_strength"
    uncertainty: str = "entropy"
    fixed: str = "full"
    costs: str | Sequence[float] = "nominal"
    strength: float = 2.0
    preference: float = 0.1
    threshold: float = 0.0
    use_bias: bool = False
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
        """Attends from every token to its segment; returns the output array alone.

        Args:
          inputs_q: x.
          inputs_k: refused unless it is `inputs_q` itself, as are inputs_v and inputs_kv.
          mask: refused; padding and packing are `segment_ids`.
          deterministic: False draws the keys from the rng stream "routing" when none are given; a
            Python value, so under `nn.remat` name it in `static_argnums` or give `keys`.
          **kwargs: those of `routed`.

        Raises:
          ValueError: cross-attention, an arbitrary mask, or a field that cannot be.
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
                "[batch, time] (0 = padding), causality by the field `causal`."
            )
        if deterministic is not None and not deterministic and kwargs.get("keys") is None:
            kwargs["keys"] = jax.random.split(self.make_rng("routing"), inputs_q.shape[0])
        return self.routed(inputs_q, **kwargs)[0]

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
    ) -> tuple[Float[Array, "batch time out"], Routing]:
        """The output and the routing behind it.

        Args:
          x: input, usually normalised.
          segment_ids: 0 is padding (output: the bias alone); None means one segment, no padding.
          positions: index within the segment; None derives it from `segment_ids`.
          residual: the stream before normalisation, whose norm the controller sees; None means x.
          route: forces k*_t; every token is then hard.
          hypers: kappa, eta, c and theta as arrays; None takes them from the fields.
          keys: one PRNG key per example; None is deterministic.

        Raises:
          ValueError: a field that cannot be, or a shape that does not fit; one sentence.
        """

        def attention(names, heads: Heads, weights, segment_ids, route, cache, layer):
            del layer
            return self._attend(names, heads, weights, segment_ids, route), cache

        out, routing, _ = self._forward(
            x, attention, segment_ids, positions, residual, route, hypers, keys
        )
        return out, routing

    def prefill(
        self,
        cache: stepwise.Cache,
        layer: stepwise.Layer,
        x: Float[Array, "batch time model"],
        *,
        segment_ids: SegmentIds,
        hypers: RoutingHypers,
        residual: Optional[Float[Array, "batch time model"]] = None,
        route: Optional[Route] = None,
    ) -> tuple[stepwise.Cache, Float[Array, "batch time out"], Routing]:
        """`routed` over right-padded prompts, which also fills the cache.

        Args:
          cache: whose `layer` is overwritten.
          layer: index of this layer in the cache.
          x: input.
          segment_ids: 1 in the prompts, 0 behind them.
          hypers, residual, route: as in `routed`.

        Raises:
          ValueError: as `routed`; a mechanism that cannot decode, `causal` False, or prompts longer
            than the capacity.
        """
        self._validate_decoding()

        def attention(names, heads: Heads, weights, segment_ids, route, cache, layer):
            filled = stepwise.fill(cache, layer, heads.rotated_k, heads.k, heads.v, segment_ids)
            return self._attend(names, heads, weights, segment_ids, route), filled

        out, routing, filled = self._forward(
            x, attention, segment_ids, None, residual, route, hypers, None, cache, layer
        )
        return filled, out, routing

    def decode(
        self,
        cache: stepwise.Cache,
        layer: stepwise.Layer,
        x: Float[Array, "batch 1 model"],
        *,
        hypers: RoutingHypers,
        residual: Optional[Float[Array, "batch 1 model"]] = None,
        route: Optional[Int[Array, "batch 1"]] = None,
    ) -> tuple[stepwise.Cache, Float[Array, "batch 1 out"], Routing]:
        """One more token per row: (cache, token) -> (cache, output, routing).

        The token's position is its row's length. Every token enters the cache; a row then reads
        only what the mechanisms of non-zero weight need.

        Raises:
          ValueError: as `prefill`; more than one token.
        """
        self._validate_decoding()
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"x: expected [batch, 1, model], one token per row, got {x.shape}.")

        def attention(names, heads: Heads, weights, segment_ids, route, cache, layer):
            del segment_ids, route  # Weights of 0 say which rows need nothing.
            longer = stepwise.append(
                cache, layer, heads.rotated_k[:, 0], heads.k[:, 0], heads.v[:, 0]
            )
            outputs = [
                decode_with(
                    name,
                    (heads.rotated_q if get_mechanism(name).rotary else heads.q)[:, 0],
                    longer,
                    layer,
                    needed=weights[:, 0, k] != 0,
                    window=self.window,
                )[:, None]
                for k, name in enumerate(names)
            ]
            return mixture.soft(outputs, weights), longer

        length = by_rows(lambda cache, layer: cache.length[layer], (1, None))(cache, layer)
        positions = length[:, None]
        out, routing, longer = self._forward(
            x, attention, jnp.ones_like(positions), positions, residual, route, hypers, None,
            cache, layer,
        )
        return longer, out, routing

    @nn.compact
    def _forward(
        self,
        x: Float[Array, "batch time model"],
        attention: Callable[..., tuple[Queries, Any]],
        segment_ids: Optional[SegmentIds],
        positions: Optional[Positions],
        residual: Optional[Float[Array, "batch time model"]],
        route: Optional[Route],
        hypers: Optional[RoutingHypers],
        keys: Optional[Key[Array, "batch"]],
        cache: Optional[stepwise.Cache] = None,
        layer: Optional[stepwise.Layer] = None,
    ) -> tuple[Float[Array, "batch time out"], Routing, Optional[stepwise.Cache]]:
        """What training, prefill and decoding share: all but how the heads attend.

        Args:
          attention: (mechanisms to mix, heads, their weights, segment_ids, the route where every
            token is hard or None, cache, layer) -> (mixed, cache).

        Returns:
          The output, the routing, and the new cache.
        """
        heads, kv_heads, dim = self._validate(x)
        batch, time, model = x.shape
        if segment_ids is None:
            segment_ids = jnp.ones((batch, time), jnp.int32)
        for name, given in (("segment_ids", segment_ids), ("positions", positions), ("route", route)):
            if given is not None and given.shape != (batch, time):
                raise ValueError(f"{name}: expected shape {(batch, time)}, got {given.shape}.")
        if positions is None:
            positions = by_rows(positions_in_segment, (0,))(segment_ids)

        projections = Projections(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            features=self.out_features or model,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            out_kernel_init=self.out_kernel_init,
            name="projections",
        )
        q, k, v = projections.project(x)
        turn = by_rows(rotate, (0, 0))
        rotated = (turn(q, positions), turn(k, positions)) if self.rotary else (q, k)

        controller = make_controller(
            self.controller,
            num_mechanisms=len(self.mechanisms),
            hidden=self.controller_hidden,
            prior=self.prior,
            posterior=self.posterior,
            uncertainty=self.uncertainty,
            fixed=tuple(self.mechanisms).index(self.fixed) if self.controller == "fixed" else 0,
            dtype=self.dtype or jnp.float32,
            name="controller",
        )
        hypers = self._hypers(time, dim) if hypers is None else hypers
        routing = controller(
            x,
            residual=x if residual is None else residual,
            positions=positions,
            segment_ids=segment_ids,
            hypers=hypers,
            keys=keys,
        )

        def mix(heads, routing, segment_ids, route, cache, layer, threshold):
            weights, route_used, hard = mixture.token_weights(
                routing,
                mode=self.mode,
                threshold=threshold,
                route=route,
                training=keys is not None,
            )
            names = tuple(self.mechanisms)
            if self.controller == "fixed" and route is None:
                # One mechanism for all: the baselines pay for what they use, and for nothing else.
                names, weights = (self.fixed,), jnp.ones_like(weights[..., :1])
            all_hard = route is not None or (self.mode == "hard" and keys is None)
            mixed, cache = attention(
                names, heads, weights, segment_ids, route_used if all_hard else None, cache, layer
            )
            return (mixed, routing.replace(route=route_used, hard=hard)), cache

        (mixed, routing), cache = by_rows(mix, (0, 0, 0, 0, 1, None, None), (0, 1))(
            Heads(q, k, v, *rotated), routing, segment_ids, route, cache, layer, hypers.threshold
        )
        self.sow("intermediates", "routing", routing)
        return projections.merge(mixed), routing, cache

    def _attend(
        self,
        names: Sequence[str],
        heads: Heads,
        weights: Weights,
        segment_ids: SegmentIds,
        route: Optional[Route],
    ) -> Queries:
        """Whole sequences: packed dispatch where every token has a route, else all mechanisms on all
        tokens, mixed by weight."""

        def attend(name: str) -> Queries:
            mechanism = get_mechanism(name)
            q, k = (heads.rotated_q, heads.rotated_k) if mechanism.rotary else (heads.q, heads.k)
            return attend_with(
                mechanism,
                q,
                k,
                heads.v,
                segment_ids=segment_ids,
                causal=self.causal,
                window=self.window,
                implementation=self.implementation,
            )

        if len(names) == 1:
            return attend(names[0])
        time = heads.q.shape[1]
        if route is not None and resolve_dispatch(self.dispatch, time=time) == "packed":
            return hard_attention(
                heads.q,
                heads.k,
                heads.v,
                route,
                mechanisms=names,
                rotated=(heads.rotated_q, heads.rotated_k),
                segment_ids=segment_ids,
                causal=self.causal,
                window=self.window,
                implementation=self.implementation,
            )
        return mixture.soft([attend(name) for name in names], weights)

    def _validate_decoding(self) -> None:
        if not self.causal:
            raise ValueError("causal: expected True for generation, got False.")
        check_decodes(self.mechanisms)

    def _hypers(self, time: int, dim: int) -> RoutingHypers:
        if self.costs == "analytic":
            raise ValueError(
                "costs: expected 'nominal' or numbers, such as those of "
                "`cost.analytic_costs(..., time=...)` at one fixed length, got 'analytic'."
            )
        costs = resolve_costs(self.costs, self.mechanisms, time=time, dim=dim, window=self.window)
        if self.controller != "fixed":
            validate_prior(strength=self.strength, preference=self.preference, costs=costs)
        return RoutingHypers(
            strength=jnp.float32(self.strength),
            preference=jnp.float32(self.preference),
            costs=jnp.asarray(costs),
            threshold=jnp.float32(self.threshold),
        )

    def _validate(self, x: Array) -> tuple[int, int, int]:
        """Checks the fields against each other; returns (H, G, d)."""
        if x.ndim != 3:
            raise ValueError(f"inputs_q: expected [batch, time, model], got shape {x.shape}.")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        features = x.shape[-1] if self.qkv_features is None else self.qkv_features
        if self.num_heads <= 0 or features % self.num_heads:
            raise ValueError(
                f"num_heads: expected a positive divisor of qkv_features = {features}, "
                f"got {self.num_heads}."
            )
        if kv_heads <= 0 or self.num_heads % kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a positive divisor of num_heads = {self.num_heads}, "
                f"got {kv_heads}."
            )
        if self.window <= 0:
            raise ValueError(f"window: expected a positive number of tokens, got {self.window}.")
        resolve_dispatch(self.dispatch, time=x.shape[1])
        if self.mode not in mixture.MODES:
            raise ValueError(f"mode: expected one of {mixture.MODES}, got {self.mode!r}.")
        for name in self.mechanisms:
            get_mechanism(name)
        least = 1 if self.controller == "fixed" else 2
        if len(set(self.mechanisms)) != len(self.mechanisms) or len(self.mechanisms) < least:
            raise ValueError(
                f"mechanisms: expected {least} or more distinct names, got {tuple(self.mechanisms)}."
            )
        if self.controller == "fixed" and self.fixed not in self.mechanisms:
            raise ValueError(
                f"fixed: expected one of the mechanisms {tuple(self.mechanisms)}, got {self.fixed!r}."
            )
        return self.num_heads, kv_heads, features // self.num_heads
