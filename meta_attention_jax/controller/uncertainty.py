"""Measures of a token's routing uncertainty u_t in [0, 1], and the entropies behind them.

    entropy              H[E pi] / log K                 total
    mutual_information   (H[E pi] - E H[pi]) / log K     epistemic: what more evidence would remove
    vacuity              K / (K + sum_k alpha_k)         lack of evidence
    dirichlet_entropy    exp(H[Dir(alpha)] + log Gamma(K))   the authors' own, on its scale in nats

All of them are functions of the posterior of one token: never of the batch, never of later tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.fields import expect


def _unit(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.clip(x, 0.0, 1.0)


def categorical_entropy(weights: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """H[w] = -sum_k w_k log w_k in nats, with 0 log 0 = 0 and finite gradients at w_k = 0."""
    positive = weights > 0.0
    log_weights = jnp.log(jnp.where(positive, weights, 1.0))
    return -jnp.sum(weights * log_weights, axis=-1)


def expected_entropy(concentration: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """E H[pi] = psi(A + 1) - sum_k (alpha_k / A) psi(alpha_k + 1) in nats, A = sum_k alpha_k."""
    total = jnp.sum(concentration, axis=-1, keepdims=True)
    terms = concentration / total * jax.lax.digamma(concentration + 1.0)
    return jax.lax.digamma(total[..., 0] + 1.0) - jnp.sum(terms, axis=-1)


def entropy(mean: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """H[E pi] / log K."""
    return _unit(categorical_entropy(mean) / math.log(mean.shape[-1]))


def mutual_information(concentration: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """(H[E pi] - E H[pi]) / log K; rarely above 0.3 for posteriors with a few pseudo-counts."""
    mean = concentration / jnp.sum(concentration, axis=-1, keepdims=True)
    information = categorical_entropy(mean) - expected_entropy(concentration)
    return _unit(information / math.log(concentration.shape[-1]))


def vacuity(concentration: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """K / (K + sum_k alpha_k)."""
    num = concentration.shape[-1]
    return num / (num + jnp.sum(concentration, axis=-1))


def differential_entropy(concentration: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """H[Dir(alpha)] in nats: at most -log Gamma(K), of the uniform density; no lower bound.

        H = sum_k h(alpha_k) - h(A) - (K - 1) psi(A),   A = sum_k alpha_k

    with h(a) = a + log Gamma(a) + (1 - a) psi(a), the entropy of Gamma(a, 1), which grows as log(a) / 2. The usual form
    adds terms of the size of A log A, and loses 2e-3 of a few nats in float32.
    """
    num = concentration.shape[-1]
    total = jnp.sum(concentration, axis=-1)
    own = jnp.sum(_gamma_entropy(concentration), axis=-1)
    return own - _gamma_entropy(total) - (num - 1) * jax.lax.digamma(total)


def _gamma_entropy(a: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """h(a): as it stands below 8, by Stirling's series above, where its terms cancel."""
    large = a >= 8.0
    small = jnp.where(large, 1.0, a)
    direct = small + jax.lax.lgamma(small) + (1.0 - small) * jax.lax.digamma(small)
    a = jnp.where(large, a, 8.0)
    x = 1.0 / (a * a)
    # log Gamma(a) = (a - 1/2) log a - a + log(2 pi) / 2 + r,   psi(a) = log a - 1 / (2 a) - s
    r = (1 / 12 - x * (1 / 360 - x * (1 / 1260 - x * (1 / 1680 - x / 1188)))) / a
    s = x * (1 / 12 - x * (1 / 120 - x * (1 / 252 - x * (1 / 240 - x * (1 / 132 - x * 691 / 32760)))))
    series = 0.5 * jnp.log(2.0 * math.pi * a) + 0.5 - 0.5 / a + r + (a - 1.0) * s
    return jnp.where(large, series, direct)


def log_dirichlet_entropy(concentration: Float[Array, "*batch mechanism"]) -> Float[Array, "*batch"]:
    """log u = H[Dir(alpha)] + log Gamma(K) <= 0; a threshold of eta nats is log theta = eta + log Gamma(K)."""
    entropy = differential_entropy(concentration)
    return jnp.minimum(entropy + math.lgamma(concentration.shape[-1]), 0.0)


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure of uncertainty."""

    # Of the concentration, or of the mean where it is not `of_posterior`; in [0, 1].
    function: Callable[[Any], Float[Array, "*batch"]]
    # What u_t rarely exceeds in practice, under a prior of a few pseudo-counts: a schedule of the threshold spreads
    # hardening over that range.
    typical: float
    of_posterior: bool = True  # Whether it needs a Dirichlet posterior.
    log: bool = False  # Whether the function gives log u, since u itself underflows; what is compared is then log u.


MEASURES: dict[str, Measure] = {
    "entropy": Measure(entropy, 1.0, of_posterior=False),
    "mutual_information": Measure(mutual_information, 0.3),
    "vacuity": Measure(vacuity, 0.6),
    "dirichlet_entropy": Measure(log_dirichlet_entropy, 1.0, log=True),
}
"""Measures by the name that a config uses."""


class Uncertainty(NamedTuple):
    """u_t, and log u_t of a measure whose u underflows; None of the others."""

    uncertainty: Float[Array, "*batch"]
    log_uncertainty: Optional[Float[Array, "*batch"]] = None


def measured(
    measure: str, mean: Float[Array, "*batch mechanism"], concentration: Optional[Float[Array, "*batch mechanism"]]
) -> Uncertainty:
    """The named measure of one posterior."""
    expect(measure in MEASURES, "uncertainty", f"one of {tuple(MEASURES)}", measure)
    found = MEASURES[measure]
    if not found.of_posterior:
        return Uncertainty(found.function(mean))
    expected = "a measure of the mean, such as 'entropy', for a controller without a Dirichlet posterior"
    expect(concentration is not None, "uncertainty", expected, measure)
    value = found.function(concentration)
    return Uncertainty(jnp.exp(value), value) if found.log else Uncertainty(value)
