"""The Bayesian controller: features of a token, a two-layer network, a Dirichlet posterior.

Every feature of token t is a function of x_t, its residual stream and its position. None depends on the sequence
length, on other sequences or on later tokens, so a token's route is the same in training batches, in prefill and in
decoding.
"""

from __future__ import annotations

from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from meta_attention_jax.controller import posterior, prior, sampling
from meta_attention_jax.controller.uncertainty import measured
from meta_attention_jax.fields import expect
from meta_attention_jax.sharding import by_rows
from meta_attention_jax.types import Positions, Routing, RoutingHypers, SegmentIds


def features(
    x: Float[Array, "batch time model"], residual: Float[Array, "batch time model"], positions: Positions
) -> Float[Array, "batch time features"]:
    """h_t = [x_t ; ||r_t|| / sqrt(D) ; log(1 + position) / 10], D + 2 numbers in float32; r is the residual stream
    before normalisation. Its gradient is to be stopped, or the controller could pay for a route by rescaling the
    stream."""
    square = jnp.mean(jnp.square(residual.astype(jnp.float32)), axis=-1, keepdims=True)
    # The root has no gradient at 0.
    scale = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    position = jnp.log1p(positions.astype(jnp.float32))[..., None] / 10.0
    return jnp.concatenate([x.astype(jnp.float32), scale, position], axis=-1)


NETWORKS = ("zero_output", "paper")


class ControllerMLP(nn.Module):
    """f(h_t) = W_2 gelu(W_1 h_t + b_1) + b_2, the network that all controllers share.

    Two forms: "zero_output", W_2 = 0 at the start, so that every controller starts from what it knows without evidence;
    and "paper", the authors' (arXiv 2605.28384): all weights from N(0, 0.02), zero biases, the exact GELU, and ||x_t||
    / sqrt(D) of the layer's input in the place of the residual's. Their position feature, linspace(0, 1, T), is the one
    thing that is not followed: it would make a token's route depend on how much text comes after it.
    """

    hidden: int
    num_outputs: int
    form: str = "zero_output"  # One of NETWORKS.
    dtype: Any = jnp.float32  # Of the hidden layer's arithmetic; the output layer is float32 always.

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time model"], residual: Float[Array, "batch time model"], positions: Positions
    ) -> Float[Array, "batch time outputs"]:
        expect(self.form in NETWORKS, "network", f"one of {NETWORKS}", self.form)
        theirs = self.form == "paper"
        normal = nn.initializers.normal(0.02)
        h = by_rows(features, (0, 0, 0))(x, x if theirs else jax.lax.stop_gradient(residual), positions)
        h = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=normal if theirs else nn.initializers.lecun_normal(),
            name="hidden",
        )(h)
        return nn.Dense(
            self.num_outputs,
            dtype=jnp.float32,
            kernel_init=normal if theirs else nn.initializers.zeros_init(),
            name="output",
        )(nn.gelu(h, approximate=not theirs))


class Controller(nn.Module):
    """The network, and what `routing_of` makes of its outputs; what a controller has no use for, it ignores.

    A class says what it has: a prior, so that `prior.preference` matters; a Dirichlet posterior, so that
    `prior.strength` does, and all measures of uncertainty; a penalty, a term of the objective that beta weighs.
    """

    has_prior = has_posterior = has_penalty = False

    num_mechanisms: int  # K.
    hidden: int = 64  # Width of the network's hidden layer.
    network: str = "zero_output"  # Form of the network; see `ControllerMLP`.
    uncertainty: str = "entropy"  # Measure of u_t; one of the mean without a posterior.
    dtype: Any = jnp.float32  # Of the hidden layer's arithmetic; all statistics are float32.

    @property
    def num_outputs(self) -> int:
        """Of the network."""
        return self.num_mechanisms

    @nn.compact
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
        """Routing of every token of the layer's input x; at padding, all values are finite and mean nothing. With
        `keys`, typed and one per example, `weights` are those of training."""
        network = ControllerMLP(self.hidden, self.num_outputs, self.network, self.dtype, name="mlp")
        outputs = network(x, residual, positions)
        return by_rows(self.routing_of, (0, 0, 0, 0, None))(outputs, positions, segment_ids, keys, hypers)


class DirichletController(Controller):
    """Amortised Dirichlet posterior over the mechanisms (Meta-Attention, arXiv 2605.28384)."""

    has_prior = has_posterior = has_penalty = True

    prior: str = "cost_aware"  # One of `PRIORS`.
    posterior: str = "mean_strength"  # One of `POSTERIORS`.
    samples: bool = True  # Whether training mixes by a sample of pi_t; else by its mean.

    @property
    def num_outputs(self) -> int:
        return self.num_mechanisms + (self.posterior == "mean_strength")

    def routing_of(
        self,
        outputs: Float[Array, "batch time outputs"],
        positions: Positions,
        segment_ids: SegmentIds,
        keys: Optional[Key[Array, "batch"]],
        hypers: RoutingHypers,
    ) -> Routing:
        """What follows from the network's outputs."""
        expect(self.posterior in posterior.POSTERIORS, "posterior", f"one of {posterior.POSTERIORS}", self.posterior)
        if hypers.costs.shape != (self.num_mechanisms,):
            raise ValueError(
                f"costs: expected {self.num_mechanisms} numbers, one per mechanism, got shape {hypers.costs.shape}."
            )
        preferred = prior.make_prior(self.prior, hypers)
        if self.posterior == "additive":
            concentration = posterior.additive(preferred, outputs)
        else:
            concentration = posterior.mean_strength(preferred, outputs[..., :-1], outputs[..., -1])
        mean = posterior.Dirichlet(concentration).mean()
        weights = mean
        if keys is not None and self.samples:
            weights = sampling.sample_dirichlet(sampling.token_keys(keys, positions, segment_ids), concentration)
        kl = posterior.kl_divergence(concentration, preferred)
        return Routing(
            mean=mean,
            weights=weights,
            **measured(self.uncertainty, mean, concentration)._asdict(),
            kl=kl,
            penalty=kl,
            concentration=concentration,
        )
