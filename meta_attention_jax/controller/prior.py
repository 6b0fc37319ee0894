"""Dirichlet priors over the attention mechanisms (Meta-Attention, arXiv 2605.28384).

    p(pi) = Dir(alpha0),   alpha0 = kappa m,   sum_k m_k = 1

``strength`` kappa counts the prior's pseudo-observations in all; ``preference`` eta is the floor
that keeps the costliest mechanism (c = 1) possible at all. Keeping the two apart makes a sweep over
kappa readable: it moves the prior's confidence and leaves its mean alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meta_attention_jax.fields import expect
from meta_attention_jax.types import RoutingHypers, Scalar


@flax.struct.dataclass
class Prior:
    """p(pi) = Dir(kappa m), as a value."""

    mean: Float[Array, "mechanism"]  # m, on the simplex.
    strength: Scalar  # kappa > 0, pseudo-counts in all.

    @property
    def concentration(self) -> Float[Array, "mechanism"]:
        """alpha0 = kappa m, pseudo-counts."""
        return self.strength * self.mean


def cost_aware(hypers: RoutingHypers) -> Prior:
    """m_k = ((1 - c_k) + eta) / sum_j ((1 - c_j) + eta): cheap mechanisms are preferred."""
    gain = 1.0 - hypers.costs + hypers.preference
    return Prior(gain / jnp.sum(gain), hypers.strength)


def uniform(hypers: RoutingHypers) -> Prior:
    """m_k = 1 / K: uninformed."""
    num = hypers.costs.shape[0]
    return Prior(jnp.full((num,), 1.0 / num, jnp.float32), hypers.strength)


def paper(hypers: RoutingHypers) -> Prior:
    """The authors' own, not normalised: alpha0_k = beta0 ((1 - c_k) + eta), beta0 = `strength`.

    They write epsilon for beta0 eta. With beta0 = 1, eta = 0.01 and the nominal costs it is (0.01, 0.86, 0.71): kappa =
    1.58, and 22.3 % expected cost under the prior's mean.
    """
    gain = 1.0 - hypers.costs + hypers.preference
    total = jnp.sum(gain)
    return Prior(gain / total, hypers.strength * total)


PRIORS: dict[str, Callable[[RoutingHypers], Prior]] = {
    "cost_aware": cost_aware,
    "uniform": uniform,
    "paper": paper,
}
"""Priors by the name that a config uses."""


def make_prior(family: str, hypers: RoutingHypers) -> Prior:
    """The named prior at the given (possibly traced) hyper-parameters."""
    expect(family in PRIORS, "prior", f"one of {tuple(PRIORS)}", family)
    return PRIORS[family](hypers)


def validate_prior(*, strength: float, preference: float, costs: Optional[Sequence[float] | np.ndarray] = None) -> None:
    """Checks concrete hyper-parameters, and costs where given, before any work starts."""
    if not 0.0 < strength < float("inf"):
        raise ValueError(f"strength: expected a finite number > 0, got {strength}.")
    if not 0.0 < preference < float("inf"):
        raise ValueError(f"preference: expected a finite number > 0, got {preference}.")
    if costs is None:
        return
    costs = [float(cost) for cost in costs]
    if len(costs) < 2 or not all(0.0 < cost <= 1.0 for cost in costs) or max(costs) != 1.0:
        raise ValueError(f"costs: expected two or more numbers in (0, 1], the largest being 1, got {costs}.")
