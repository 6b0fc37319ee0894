"""Dirichlet posteriors: both parametrisations, and closed forms against SciPy and Monte Carlo."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from meta_attention_jax.controller import posterior
from meta_attention_jax.controller.prior import Prior
from tests.close import assert_close

PRIOR = np.array([0.1, 0.95, 0.8])


def prior_of(concentration):
    counts = np.float32(concentration)
    return Prior(jnp.asarray(counts / counts.sum()), jnp.asarray(counts.sum()))


additive, mean_strength = jax.jit(posterior.additive), jax.jit(posterior.mean_strength)
kl_divergence = jax.jit(posterior.kl_divergence)


def kl_reference(alpha, beta):
    """KL(Dir(alpha) || Dir(beta)) in nats, float64."""
    total = alpha.sum(-1, keepdims=True)
    log_norm = special.gammaln(total[..., 0]) - special.gammaln(alpha).sum(-1)
    log_norm -= special.gammaln(beta.sum(-1)) - special.gammaln(beta).sum(-1)
    expected_log = special.digamma(alpha) - special.digamma(total)
    return log_norm + ((alpha - beta) * expected_log).sum(-1)


def concentrations(seed, num=64, low=0.05, high=1e3):
    return np.exp(np.random.default_rng(seed).uniform(np.log(low), np.log(high), (num, 3)))


def test_additive_is_pseudo_counts_on_the_prior():
    f = np.random.default_rng(0).normal(0.0, 3.0, (2, 5, 3))
    got = additive(prior_of(PRIOR), np.float32(f))
    assert_close(got, PRIOR + np.log1p(np.exp(f)), 2e-6)
    assert (np.asarray(got) >= 0.999999 * np.float32(PRIOR)).all()


@pytest.mark.smoke
@pytest.mark.parametrize("strength", [0.5, 1.85, 30.0])
def test_mean_strength_starts_at_the_prior(strength):
    prior = Prior(np.float32([0.2, 0.5, 0.3]), np.float32(strength))
    zeros = np.zeros((2, 5, 3), np.float32)
    alpha = mean_strength(prior, zeros, zeros[..., 0])
    assert_close(alpha, np.broadcast_to(strength * prior.mean, alpha.shape), 1e-6)
    kl = np.asarray(kl_divergence(alpha, prior))
    assert np.abs(kl).max() < 5e-6 * max(strength, 1.0)


def test_mean_strength_moves_mean_and_confidence_apart():
    rng = np.random.default_rng(1)
    mean = PRIOR / PRIOR.sum()
    f, g = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5))
    prior = Prior(np.float32(mean), np.float32(40.0))
    alpha = np.asarray(mean_strength(prior, np.float32(f), np.float32(g)), np.float64)
    counts = 40.0 * np.log1p(np.exp(g)) / np.log(2.0)
    assert_close(alpha.sum(-1), counts)
    assert_close(alpha / alpha.sum(-1, keepdims=True), special.softmax(np.log(mean) + f, -1))
    assert (alpha < 40.0 * mean).any(), "counts can be taken away from a mechanism"


def test_concentration_is_float32_and_clamped():
    f = jnp.asarray([[[60.0, -60.0, 0.0], [1e4, 1e4, 1e4]]], jnp.bfloat16)
    g = jnp.asarray([[60.0, 1e4]], jnp.bfloat16)
    low, high = prior_of(np.full(3, 1e-3)), Prior(np.full(3, np.float32(1 / 3)), np.float32(900.0))
    for least, alpha in (
        (low.concentration[0], additive(low, f)),  # A low prior itself is met.
        (np.float32(0.05), mean_strength(high, f, g)),
    ):
        assert alpha.dtype == jnp.float32
        assert np.min(alpha) == least and np.max(alpha) == np.float32(1e3)


def test_kl_matches_the_closed_form_in_float64():
    alpha, beta = concentrations(2), np.array([0.3, 4.0, 1.5])
    got = np.asarray(kl_divergence(np.float32(alpha), prior_of(beta)))
    expected = kl_reference(np.float64(np.float32(alpha)), np.float64(np.float32(beta)))
    assert (np.abs(got - expected) <= 1e-5 * alpha.max(-1) + 2e-6 * expected + 1e-5).all()


@pytest.mark.parametrize("seed", range(3))
def test_kl_matches_monte_carlo(seed):
    alpha = concentrations(seed, 1, 0.5, 20.0)[0]
    draws = np.random.default_rng(seed).dirichlet(alpha, 100_000)
    difference = stats.dirichlet.logpdf(draws.T, alpha) - stats.dirichlet.logpdf(draws.T, PRIOR)
    got = float(kl_divergence(np.float32(alpha), prior_of(PRIOR)))
    error = difference.std() / np.sqrt(len(difference))
    assert abs(got - difference.mean()) < 5 * error


def test_kl_gradient_matches_finite_differences():
    alpha = concentrations(3, 16, 0.1, 50.0)
    slope_of = jax.jit(jax.grad(lambda a: posterior.kl_divergence(a, prior_of(PRIOR)).sum()))
    got = np.asarray(slope_of(np.float32(alpha)))
    for k in range(3):
        step = 1e-5 * alpha[:, k]
        up, down = alpha.copy(), alpha.copy()
        up[:, k] += step
        down[:, k] -= step
        slope = (kl_reference(up, PRIOR) - kl_reference(down, PRIOR)) / (2.0 * step)
        assert_close(got[:, k], slope)


def test_entropy_and_mean_match_scipy():
    alpha = concentrations(4, 16, 0.1, 100.0)

    @jax.jit
    def told(alpha):
        dist = posterior.Dirichlet(alpha)
        return dist.mean(), dist.entropy()

    mean, entropy = told(np.float32(alpha))
    assert_close(mean, alpha / alpha.sum(-1, keepdims=True))
    assert_close(entropy, np.array([stats.dirichlet.entropy(a) for a in alpha]), 1e-4)


def test_only_the_sampler_of_distrax_is_replaced():
    alpha, beta = (jnp.float32(concentrations(seed, 7, 0.5, 50.0)) for seed in (5, 6))
    ours, theirs = posterior.Dirichlet(alpha), distrax.Dirichlet(alpha)
    draws = np.asarray(jax.jit(lambda key: ours.sample(seed=key, sample_shape=(2, 3)))(jax.random.key(0)))
    assert draws.shape == (2, 3, 7, 3)
    np.testing.assert_allclose(draws.sum(-1), 1.0, rtol=1e-5)

    @jax.jit
    def closed_forms(dist):
        with jax.numpy_rank_promotion("allow"):
            kl = dist.kl_divergence(distrax.Dirichlet(beta))
            return dist.entropy(), dist.log_prob(draws), kl, dist.mean(), dist.covariance()

    assert_close(closed_forms(ours), closed_forms(theirs))
