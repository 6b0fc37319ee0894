"""Measures of a token's routing uncertainty u_t in [0, 1], and the entropies behind them.

    entropy              H[E pi] / log K                 total
    mutual_information   (H[E pi] - E H[pi]) / log K     epistemic: what more evidence would remove
    vacuity              K / (K + sum_k alpha_k)         lack of evidence

All of them are functions of the posterior of one token: never of the batch, never of later tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure of uncertainty.

    Attributes:
      function: of the concentration, or of the mean where it is not `of_posterior`; in [0, 1].
      typical: what u_t rarely exceeds in practice, under a prior of a few pseudo-counts: a schedule of
        the threshold spreads hardening over that range.
      of_posterior: whether it needs a Dirichlet posterior.
    """

    function: Callable[[Any], Float[Array, "*batch"]]
    typical: float
    of_posterior: bool = True


MEASURES: dict[str, Measure] = {
    "entropy": Measure(entropy, 1.0, of_posterior=False),
    "mutual_information": Measure(mutual_information, 0.3),
    "vacuity": Measure(vacuity, 0.6),
}
"""Measures by the name that a config uses."""


def uncertainty(
    measure: str,
    mean: Float[Array, "*batch mechanism"],
    concentration: Optional[Float[Array, "*batch mechanism"]],
) -> Float[Array, "*batch"]:
    """The named measure of one posterior.

    Raises:
      ValueError: `measure` is unknown, or needs a concentration that the controller does not have.
    """
    if measure not in MEASURES:
        raise ValueError(f"uncertainty: expected one of {tuple(MEASURES)}, got {measure!r}.")
    found = MEASURES[measure]
    if not found.of_posterior:
        return found.function(mean)
    if concentration is None:
        raise ValueError(
            "uncertainty: expected a measure of the mean, such as 'entropy', for a controller without "
            f"a Dirichlet posterior, got {measure!r}."
        )
    return found.function(concentration)
