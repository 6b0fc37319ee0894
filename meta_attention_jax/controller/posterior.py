"""Amortised Dirichlet posteriors q(pi_t | x_t) = Dir(alpha_t), and their closed forms by distrax.

Two ways from the controller's features f_t to the concentration (Meta-Attention, arXiv 2605.28384, uses the first).
Both are clamped to [min(0.05, alpha0_k), 1e3], where float32 digamma and the sampler are good; a prior below 0.05 is
met, or q = p would be out of reach.
"""

from __future__ import annotations

import distrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from meta_attention_jax.controller.prior import Prior
from meta_attention_jax.controller.sampling import log_gamma

POSTERIORS = ("additive", "mean_strength")
MIN_CONCENTRATION = 0.05
MAX_CONCENTRATION = 1e3


def additive(prior: Prior, features: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch mechanism"]:
    """alpha_t = alpha0 + softplus(f_t): evidence counted on top of the prior.

    It can add to a mechanism but never take the prior's counts away, so it needs a large KL (nats) to overrule a strong
    prior.
    """
    evidence = jax.nn.softplus(_float32(features))
    return _clamp(_expand(prior.concentration, features) + evidence, prior)


def mean_strength(
    prior: Prior, features: Float[Array, "*batch mechanism"], strength_features: Float[Array, "*batch"]
) -> Float[Array, "*batch mechanism"]:
    """alpha_t = s_t softmax(log m + f_t), s_t = kappa softplus(g_t) / softplus(0).

    Mean and confidence move apart from each other and in both directions. Zero features give the prior itself, q = p.
    """
    mean = jax.nn.softmax(_expand(jnp.log(prior.mean), features) + _float32(features), axis=-1)
    ratio = jax.nn.softplus(_float32(strength_features)) / jnp.log(jnp.float32(2.0))
    return _clamp(prior.strength * ratio[..., None] * mean, prior)


class Dirichlet(distrax.Dirichlet):
    """`distrax.Dirichlet` drawing by the loop-free reparameterised sampler; else the same."""

    def _sample_n(self, key: Key[Array, ""], n: int) -> Float[Array, "n *batch mechanism"]:
        shape = (n, *self.concentration.shape)
        draws = log_gamma(key, jnp.broadcast_to(self.concentration, shape))
        return jax.nn.softmax(draws, axis=-1)


def kl_divergence(concentration: Float[Array, "*batch mechanism"], prior: Prior) -> Float[Array, "*batch"]:
    """KL(Dir(alpha_t) || Dir(alpha0)) in nats, closed form, float32.

    Absolute rounding error is about 1e-6 times the largest concentration; near q = p the value can be that much below
    0.
    """
    posterior = Dirichlet(_float32(concentration))
    return posterior.kl_divergence(Dirichlet(_expand(prior.concentration, concentration)))


def _float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x.astype(jnp.float32)


def _expand(x: Float[Array, "mechanism"], like: Float[Array, "*batch mechanism"]) -> Float[Array, "*ones mechanism"]:
    """x with the leading axes of `like`, each of length 1."""
    return _float32(x).reshape((1,) * (like.ndim - 1) + x.shape)


def _clamp(concentration: Float[Array, "*batch mechanism"], prior: Prior) -> Float[Array, "*batch mechanism"]:
    least = jnp.minimum(_expand(prior.concentration, concentration), MIN_CONCENTRATION)
    return jnp.clip(concentration, least, MAX_CONCENTRATION)
