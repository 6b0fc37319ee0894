"""Controllers to compare with. Layer, schedule, gate and network are shared; what they make of its outputs differs."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from meta_attention_jax.controller import prior, sampling
from meta_attention_jax.controller.controller import Controller, DirichletController
from meta_attention_jax.controller.uncertainty import MEASURES, categorical_entropy, measured
from meta_attention_jax.fields import expect
from meta_attention_jax.types import Positions, Router, Routing, RoutingHypers, SegmentIds, Weights


class SoftmaxController(Controller):
    """Prior-free router: pi_t = softmax(f_t), deterministic, no penalty.

    The routers below are this one with another penalty, another offset of the logits, or other weights in training.
    """

    def routing_of(
        self,
        logits: Weights,
        positions: Positions,
        segment_ids: SegmentIds,
        keys: Optional[Key[Array, "batch"]],
        hypers: RoutingHypers,
    ) -> Routing:
        """What follows from the network's logits."""
        logits += jnp.broadcast_to(self.offset(hypers), logits.shape)
        mean = jax.nn.softmax(logits, axis=-1)
        weights = mean
        if keys is not None:
            weights = self.training_weights(logits, hypers, sampling.token_keys(keys, positions, segment_ids))
        return Routing(
            mean=mean,
            weights=weights,
            **measured(self.uncertainty, mean, None)._asdict(),
            kl=self.kl(mean, hypers),
            penalty=self.penalty(mean, hypers, segment_ids),
        )

    def offset(self, hypers: RoutingHypers) -> Float[Array, "mechanism"]:
        """What is added to the network's logits."""
        return jnp.zeros_like(hypers.costs)

    def kl(self, mean: Weights, hypers: RoutingHypers) -> Float[Array, "batch time"]:
        """KL of the weights to a prior, nats; 0 without a prior."""
        return jnp.zeros(mean.shape[:-1], jnp.float32)

    def penalty(self, mean: Weights, hypers: RoutingHypers, segment_ids: SegmentIds) -> Float[Array, "batch time"]:
        """What the objective adds, times beta."""
        del segment_ids
        return self.kl(mean, hypers)

    def training_weights(self, logits: Weights, hypers: RoutingHypers, keys: Key[Array, "batch time"]) -> Weights:
        """pi_t of soft tokens in training."""
        return jax.nn.softmax(logits, axis=-1)


class SoftmaxKLController(SoftmaxController):
    """pi_t = softmax(log m + f_t) with the penalty KL(pi_t || m) = sum_k pi_tk log(pi_tk / m_k).

    The prior mean without the Dirichlet: no sample, no strength, no second-order uncertainty.
    """

    has_prior = has_penalty = True

    prior: str = "cost_aware"  # One of `PRIORS`; only its mean m is used.

    def offset(self, hypers: RoutingHypers) -> Float[Array, "mechanism"]:
        return jnp.log(prior.make_prior(self.prior, hypers).mean)

    def kl(self, mean: Weights, hypers: RoutingHypers) -> Float[Array, "batch time"]:
        return -categorical_entropy(mean) - mean @ self.offset(hypers)


class CostPenaltyController(SoftmaxController):
    """pi_t = softmax(f_t) with the penalty c . pi_t - rho H[pi_t]: the price itself, and a bonus for entropy, rho =
    `hypers.entropy_bonus` in units of cost per nat."""

    has_penalty = True

    def penalty(
        self, mean: Weights, hypers: RoutingHypers, segment_ids: SegmentIds
    ) -> Float[Array, "batch time"]:
        del segment_ids
        return mean @ hypers.costs - hypers.entropy_bonus * categorical_entropy(mean)


class SwitchController(SoftmaxController):
    """pi_t = softmax(f_t) with the load balance of the Switch Transformer (arXiv 2101.03961, eq. 4).

        N K sum_k F_k P_k,   F_k share of tokens with argmax k,   P_k mean of pi_k

    over the N tokens of each sequence rather than of a device's batch, so that sharding and micro-batches change
    nothing. As a penalty of token t: K sum_k F_k pi_tk. It asks for equal use, whatever the mechanisms cost.
    """

    has_penalty = True

    def penalty(
        self, mean: Weights, hypers: RoutingHypers, segment_ids: SegmentIds
    ) -> Float[Array, "batch time"]:
        del hypers
        real = (segment_ids != 0).astype(jnp.float32)
        chosen = jax.nn.one_hot(jnp.argmax(mean, axis=-1), self.num_mechanisms, dtype=jnp.float32)
        share = jnp.einsum("btk,bt->bk", chosen, real) / jnp.maximum(real.sum(1), 1.0)[:, None]
        return self.num_mechanisms * jnp.einsum("btk,bk->bt", mean, share)


class GumbelController(SoftmaxController):
    """pi_t = softmax(f_t); in training a hard sample (Jang et al., arXiv 1611.01144).

        y = softmax((f_t + g_t) / tau),  g ~ Gumbel;   weights = one_hot(argmax y) + y - stop(y)

    so the gradient is the relaxed sample's. tau = `hypers.temperature` falls during the run.
    """

    def training_weights(
        self, logits: Weights, hypers: RoutingHypers, keys: Key[Array, "batch time"]
    ) -> Weights:
        shape = (self.num_mechanisms,)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32)))
        relaxed = jax.nn.softmax((logits + draw(keys)) / hypers.temperature, axis=-1)
        one_hot = jax.nn.one_hot(jnp.argmax(relaxed, axis=-1), *shape, dtype=jnp.float32)
        # The difference is exactly 0; (one_hot + relaxed) - relaxed would not be exactly one_hot.
        return one_hot + (relaxed - jax.lax.stop_gradient(relaxed))


class BayesianMeanController(DirichletController):
    """The Dirichlet posterior and its KL, without sampling: weights are E[pi_t] in training too."""

    samples: bool = False


class FixedController(nn.Module):
    """One mechanism for every token of the layer, with certainty: u_t = 0 and KL = 0; no parameters."""

    has_prior = has_posterior = has_penalty = False

    num_mechanisms: int  # K.
    fixed: int = 0  # Index of the mechanism on the mechanism axis.

    def __call__(
        self,
        x: Float[Array, "batch time model"],
        *,
        residual: Float[Array, "batch time model"],
        positions: Positions,
        segment_ids: SegmentIds,
        hypers: RoutingHypers,
        keys: Optional[Key[Array, "batch"]] = None,
    ) -> Routing:
        del residual, positions, segment_ids, hypers, keys
        expect(0 <= self.fixed < self.num_mechanisms, "fixed", f"an index in [0, {self.num_mechanisms})", self.fixed)
        row = jax.nn.one_hot(self.fixed, self.num_mechanisms, dtype=jnp.float32)
        mean = jnp.broadcast_to(row, (*x.shape[:2], self.num_mechanisms))
        zeros = jnp.zeros(x.shape[:2], jnp.float32)
        return Routing(mean=mean, weights=mean, uncertainty=zeros, kl=zeros, penalty=zeros)


CONTROLLERS: dict[str, type[nn.Module]] = {
    "bayesian": DirichletController,
    "bayesian_mean": BayesianMeanController,
    "softmax": SoftmaxController,
    "softmax_kl": SoftmaxKLController,
    "cost_penalty": CostPenaltyController,
    "switch": SwitchController,
    "gumbel": GumbelController,
    "fixed": FixedController,
}
"""Controllers by the name that a config uses."""


def measures_of(controller: str) -> tuple[str, ...]:
    """The measures of uncertainty that the named controller has: all of a posterior's, or of a mean's."""
    posterior = CONTROLLERS[controller].has_posterior
    return tuple(name for name, one in MEASURES.items() if posterior or not one.of_posterior)


def make_controller(router: Router, **fields: Any) -> nn.Module:
    """The router's controller; `fields` are those that all have: `dtype`, `name`."""
    names = router.mechanisms
    expect(router.controller in CONTROLLERS, "controller", f"one of {tuple(CONTROLLERS)}", router.controller)
    least = 1 if router.is_fixed else 2
    if len(set(names)) != len(names) or len(names) < least:
        raise ValueError(f"mechanisms: expected {least} or more distinct names, got {names}.")
    expect(not router.is_fixed or router.fixed[0] in names, "fixed", f"one of the mechanisms {names}", router.fixed[0])
    module = CONTROLLERS[router.controller]
    known = {field.name for field in dataclasses.fields(module)}
    own = {
        "num_mechanisms": len(names),
        "fixed": names.index(router.fixed[0]) if router.is_fixed else 0,
        **{name: getattr(router, name) for name in ("hidden", "network", "prior", "posterior", "uncertainty")},
        **fields,
    }
    return module(**{field: value for field, value in own.items() if field in known})
