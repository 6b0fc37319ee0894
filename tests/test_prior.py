"""The Dirichlet prior: its formula, what each hyper-parameter moves, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.controller import prior
from meta_attention_jax.types import RoutingHypers
from tests.close import assert_close

COSTS = (1.0, 0.15, 0.30)


def hypers(strength=2.0, preference=0.1, costs=COSTS):
    return RoutingHypers(
        strength=jnp.float32(strength),
        preference=jnp.float32(preference),
        costs=jnp.asarray(costs, jnp.float32),
        threshold=jnp.float32(0.0),
    )


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(4))
def test_cost_aware_prior_is_its_formula(seed):
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.05, 1.0, 3)
    costs /= costs.max()
    strength, preference = rng.uniform(0.5, 50.0), rng.uniform(0.01, 1.0)
    gain = (1.0 - costs) + preference
    expected = strength * gain / gain.sum()
    got = prior.make_prior("cost_aware", hypers(strength, preference, costs)).concentration
    assert got.dtype == jnp.float32
    assert_close((got, np.sum(got)), (expected, strength), 2e-6)


def test_strength_scales_counts_and_leaves_the_mean_alone():
    weak, strong = (prior.make_prior("cost_aware", hypers(k)).concentration for k in (1.0, 64.0))
    assert_close(strong, 64.0 * weak, 1e-6)


def test_preference_keeps_the_costliest_possible_and_flattens():
    means = [
        np.asarray(prior.cost_aware(hypers(preference=eta)).mean)
        for eta in (1e-3, 0.1, 1e4)
    ]
    assert means[0][0] < means[1][0] < means[2][0]
    assert all((mean > 0).all() and mean[0] < mean[2] < mean[1] for mean in means)
    assert_close(means[2], np.full(3, 1 / 3), 1e-4)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_uniform_prior_ignores_costs(num):
    costs = np.linspace(0.2, 1.0, num)
    got = prior.make_prior("uniform", hypers(6.0, 0.1, costs)).concentration
    assert_close(got, np.full(num, 6.0 / num), 1e-6)


def test_a_sweep_is_one_program():
    sweep = jax.vmap(lambda k: prior.make_prior("cost_aware", hypers(k)).concentration)
    strengths = jnp.asarray([0.5, 2.0, 30.0])
    assert_close(jnp.sum(sweep(strengths), axis=-1), strengths, 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 0.0}, "strength: expected a finite number > 0, got 0.0"),
        ({"strength": float("nan")}, "strength: .* got nan"),
        ({"preference": -0.1}, "preference: expected a finite number > 0, got -0.1"),
        ({"preference": float("inf")}, "preference: .* got inf"),
        ({"costs": (1.0, 0.0)}, "costs: .* got"),
        ({"costs": (0.5, 0.25)}, "largest being 1, got"),
        ({"costs": (1.0,)}, "costs: expected two or more"),
    ],
)
def test_bad_hyper_parameters_are_one_sentence(change, message):
    good = {"strength": 2.0, "preference": 0.1, "costs": COSTS}
    prior.validate_prior(**good)
    with pytest.raises(ValueError, match=message):
        prior.validate_prior(**(good | change))


def test_costs_are_checked_only_where_known():
    prior.validate_prior(strength=1.0, preference=0.1)


def test_unknown_family_names_the_known():
    with pytest.raises(ValueError, match="cost_aware.*uniform.*got 'flat'"):
        prior.make_prior("flat", hypers())
