"""Dirichlet priors over the attention mechanisms (Meta-Attention, arXiv 2605.28384).

    p(pi) = Dir(alpha0),   alpha0 = kappa m,   sum_k m_k = 1

``strength`` kappa counts the prior's pseudo-observations in all; ``preference`` eta is the floor
that keeps the costliest mechanism (c = 1) possible at all. Keeping the two apart makes a sweep over
kappa readable: it moves the prior's confidence and leaves its mean alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_attention_jax.types import Costs, RoutingHypers, Scalar

PRIORS = ("cost_aware", "uniform")

Concentration = Float[Array, "mechanism"]


def preference_mean(costs: Costs, preference: Scalar) -> Concentration:
    """Mean of the cost-aware prior, m_k = ((1 - c_k) + eta) / sum_j ((1 - c_j) + eta).

    Args:
      costs: c in (0, 1]^K, divided by the largest.
      preference: eta > 0.
    """
    gain = 1.0 - costs + preference
    return gain / jnp.sum(gain)


def cost_aware(strength: Scalar, preference: Scalar, costs: Costs) -> Concentration:
    """Cost-aware concentration alpha0 = kappa m, in pseudo-counts that sum to kappa."""
    return strength * preference_mean(costs, preference)


def uniform(strength: Scalar, num: int) -> Concentration:
    """Uninformed concentration alpha0_k = kappa / K, in pseudo-counts that sum to kappa."""
    return strength * jnp.full((num,), 1.0 / num, jnp.float32)


def prior_concentration(family: str, hypers: RoutingHypers) -> Concentration:
    """alpha0 of the named family at the given (possibly traced) hyper-parameters.

    Raises:
      ValueError: `family` is unknown.
    """
    if family == "cost_aware":
        return cost_aware(hypers.strength, hypers.preference, hypers.costs)
    if family == "uniform":
        return uniform(hypers.strength, hypers.costs.shape[0])
    raise ValueError(f"prior: expected one of {PRIORS}, got {family!r}.")


def validate_prior(
    *, strength: float, preference: float, costs: Optional[Sequence[float]] = None
) -> None:
    """Checks concrete hyper-parameters, and costs where given, before any work starts.

    Raises:
      ValueError: kappa or eta is not a finite positive number, or costs are not at least two
        numbers in (0, 1] of which the largest is 1.
    """
    if not 0.0 < strength < float("inf"):
        raise ValueError(f"strength: expected a finite number > 0, got {strength}.")
    if not 0.0 < preference < float("inf"):
        raise ValueError(f"preference: expected a finite number > 0, got {preference}.")
    if costs is None:
        return
    costs = [float(cost) for cost in costs]
    if len(costs) < 2 or not all(0.0 < cost <= 1.0 for cost in costs) or max(costs) != 1.0:
        raise ValueError(
            f"costs: expected two or more numbers in (0, 1], the largest being 1, got {costs}."
        )
