"""The loop-free sampler: its error, pathwise gradients, keys per token, no collectives."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from meta_attention_jax.controller import sampling
from tests.close import assert_close

ALPHAS = np.array([0.05, 0.1, 0.25, 0.4, 0.7, 1.0, 1.85, 3.0, 10.0, 100.0, 1000.0])
NUM = 100_000
DIRICHLET = np.array([0.1, 0.95, 0.8])

draw_gammas = jax.jit(lambda key, alpha: sampling.log_gamma(key, alpha))


@pytest.fixture(scope="module")
def log_gammas():
    """NUM draws of log X for each of ALPHAS, float64."""
    alpha = jnp.broadcast_to(jnp.float32(ALPHAS)[:, None], (len(ALPHAS), NUM))
    return np.asarray(draw_gammas(jax.random.key(0), alpha), np.float64)


@pytest.fixture(scope="module")
def dirichlets():
    """NUM draws of pi ~ Dir(DIRICHLET) and their Jacobians d pi_k / d alpha_j."""

    def one(key, alpha):
        return jax.jacrev(lambda a: (sampling.sample_dirichlet(key, a),) * 2, has_aux=True)(alpha)

    keys = jax.random.split(jax.random.key(1), NUM)
    jacobian, draws = jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, jnp.float32(DIRICHLET))
    return np.asarray(draws, np.float64), np.asarray(jacobian, np.float64)


def test_distribution_error_by_quadrature():
    """sup_x |P(draw <= x) - F_alpha(x)| <= 1e-4, integrating over the noise instead of drawing it.

    Given z, log X <= t iff E_0 / alpha + E_1 / (alpha + 1) >= L(z) - t, whose probability is
    (alpha + 1) e^{-alpha x} - alpha e^{-(alpha + 1) x} at x = max(L(z) - t, 0).
    """
    z = np.linspace(-8.0, 8.0, 4001)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    p = np.concatenate([[1e-6, 1e-4], np.linspace(0.005, 0.995, 120), [1 - 1e-4, 1 - 1e-6]])
    quantile = jax.jit(sampling.log_gamma_quantile)
    for alpha in np.concatenate([ALPHAS, [0.3, 0.5, 0.6, 1.4]]):
        a = jnp.full(z.shape, alpha + 2.0, jnp.float32)
        log_x = np.asarray(quantile(jnp.float32(z), a), np.float64)
        t = np.log(np.maximum(special.gammaincinv(alpha, p), 1e-300))
        x = np.maximum(log_x[None, :] - t[:, None], 0.0)
        cdf = ((alpha + 1) * np.exp(-alpha * x) - alpha * np.exp(-(alpha + 1) * x)) @ weight
        assert np.abs(cdf - p).max() < 1e-4, alpha


@pytest.mark.parametrize("index", range(len(ALPHAS)))
def test_draws_follow_the_gamma_distribution(log_gammas, index):
    # In log space: at alpha = 0.05 the draws underflow float64's exp only below p = 1e-16.
    p = special.gammainc(ALPHAS[index], np.exp(log_gammas[index]))
    assert stats.kstest(p, "uniform").statistic < 2.3 / np.sqrt(NUM)  # chance 5e-5


def test_moments_of_log_gamma(log_gammas):
    error = np.sqrt(special.polygamma(1, ALPHAS) / NUM)
    assert (np.abs(log_gammas.mean(-1) - special.digamma(ALPHAS)) < 5 * error).all()
    np.testing.assert_allclose(log_gammas.var(-1), special.polygamma(1, ALPHAS), rtol=0.05)


def test_quantile_is_increasing_in_its_noise():
    z = np.linspace(-6.0, 6.0, 2001, dtype=np.float32)
    quantile = jax.jit(sampling.log_gamma_quantile)
    for a in (2.0, 2.05, 3.0, 12.0, 1002.0):
        log_x = np.asarray(quantile(z, np.full(z.shape, a, np.float32)))
        assert np.diff(log_x).min() > 0.0, a


def test_pathwise_gradient_of_the_quantile_is_the_implicit_one():
    """At the same draw, d log X / d a = random_gamma_grad(a, X) / X up to the expansion's error."""
    z = np.linspace(-3.0, 3.0, 201)
    weight = stats.norm.pdf(z)
    slope = jax.jit(jax.vmap(jax.grad(lambda a, z: sampling.log_gamma_quantile(z, a))))
    gamma_slope = jax.jit(jax.lax.random_gamma_grad)
    for a, tolerance in ((2.05, 1e-2), (3.0, 3e-3), (12.0, 3e-4), (100.0, 3e-4)):
        x = special.gammaincinv(a, stats.norm.cdf(z))
        at = np.full(z.shape, a, np.float32)
        implicit = np.asarray(gamma_slope(at, np.float32(x))) / x
        got = np.asarray(slope(at, np.float32(z)))
        rms = np.sqrt((weight * (got - implicit) ** 2).sum() / (weight * implicit**2).sum())
        assert rms < tolerance, a


@pytest.mark.smoke
def test_dirichlet_marginals_are_beta(dirichlets):
    draws, _ = dirichlets
    for k, alpha in enumerate(DIRICHLET):
        marginal = stats.beta(alpha, DIRICHLET.sum() - alpha)
        assert stats.kstest(draws[:, k], marginal.cdf).statistic < 2.3 / np.sqrt(NUM)


def test_pathwise_gradient_of_dirichlet_moments(dirichlets):
    """d E[pi_k] / d alpha_j = (delta_kj - m_k) / A and d E[pi_k^2] / d alpha_j in closed form."""
    draws, jacobian = dirichlets
    total = DIRICHLET.sum()
    mean = DIRICHLET / total
    first = (np.eye(3) - mean[:, None]) / total
    second_moment = DIRICHLET * (DIRICHLET + 1) / (total * (total + 1))
    by_total = 1 / total + 1 / (total + 1)
    second = np.diag((2 * DIRICHLET + 1) / (total * (total + 1)))
    second -= (second_moment * by_total)[:, None]
    for per_draw, expected in ((jacobian, first), (2 * draws[:, :, None] * jacobian, second)):
        error = per_draw.std(0) / np.sqrt(NUM)
        assert (np.abs(per_draw.mean(0) - expected) < 5 * error + 2e-4).all()


def test_draws_stay_finite_with_finite_gradients_at_the_clamps():
    rows = jnp.asarray([[0.05, 0.05, 0.05], [1e3, 1e3, 1e3], [0.05, 1e3, 1.0]], jnp.float32)
    alpha = jnp.broadcast_to(rows, (2000, 3, 3))
    keys = jax.random.split(jax.random.key(2), (2000, 3))

    @jax.jit
    def logs_and_slopes(alpha):
        logs, pull = jax.vjp(lambda a: sampling.sample_log_dirichlet(keys, a), alpha)
        return logs, pull(jnp.exp(logs) * jnp.arange(3, dtype=jnp.float32)[None, None])[0]

    logs, slopes = logs_and_slopes(alpha)
    assert np.isfinite(logs).all() and np.isfinite(slopes).all()
    assert (np.asarray(logs) < -90.0).any(), "some weights are below the smallest float32"


def test_samples_are_float32_for_any_concentration():
    keys = jax.random.split(jax.random.key(0), 2)
    out = jax.eval_shape(sampling.sample_dirichlet, keys, jnp.ones((2, 3), jnp.bfloat16))
    assert out.dtype == jnp.float32


def loops(jaxpr):
    """Names of the loop primitives in a jaxpr and everything it calls."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("while", "scan"):
            found.add(eqn.primitive.name)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= loops(inner)
    return found


def test_no_loop_in_value_or_gradient():
    keys = jax.random.split(jax.random.key(0), 2)
    ids = jnp.ones((2, 4), jnp.int32)

    def value(sampler, alpha):
        return jnp.sum(sampler(sampling.token_keys(keys, ids, ids), alpha) ** 2)

    def builtin(keys, alpha):
        return jax.vmap(jax.vmap(jax.random.dirichlet))(keys, alpha)

    alpha = jnp.ones((2, 4, 3))
    program = jax.make_jaxpr(jax.value_and_grad(value, argnums=1), static_argnums=0)
    assert loops(program(builtin, alpha).jaxpr), "the walk must see a rejection sampler's loops"
    assert not loops(program(sampling.sample_dirichlet, alpha).jaxpr)


@jax.jit
def _weights(keys, positions, segment_ids, alpha):
    made = sampling.token_keys(keys, positions, segment_ids)
    return jax.random.key_data(made), sampling.sample_dirichlet(made, alpha)


def noise(keys, positions, segment_ids, alpha=None):
    """Key data and weights of every token."""
    alpha = np.ones((*np.shape(positions), 3)) if alpha is None else alpha
    out = _weights(keys, np.int32(positions), np.int32(segment_ids), np.float32(alpha))
    return tuple(map(np.asarray, out))


@pytest.mark.smoke
def test_noise_of_a_token_ignores_cutting_padding_and_batching():
    keys = jax.random.split(jax.random.key(3), 2)
    positions = np.tile(np.arange(6), (2, 1))
    ones = np.ones_like(positions)
    alpha = np.random.default_rng(0).uniform(0.1, 5.0, (2, 6, 3))
    full = noise(keys, positions, ones, alpha)

    cut_alone = noise(keys[1:], positions[1:, :4], ones[1:, :4], alpha[1:, :4])

    def padded(left, right):
        pad = ((0, 0), (left, right))
        wide = np.pad(alpha, (*pad, (0, 0)), constant_values=1.0)
        return noise(keys, np.pad(positions, pad), np.pad(ones, pad), wide)

    on_the_left, on_the_right = padded(3, 0), padded(0, 3)
    # The keys exactly; the weights but for rounding: a loop's remainder may round its own way.
    for i, same in enumerate((np.testing.assert_array_equal, assert_close)):
        expected = full[i]
        same(cut_alone[i], expected[1:, :4])
        same(on_the_left[i][:, 3:], expected)
        same(on_the_right[i][:, :6], expected)



def test_noise_of_a_segment_ignores_its_neighbours_in_the_row():
    keys = jax.random.split(jax.random.key(4), 1)[jnp.zeros((2,), jnp.int32)]
    packed, alone = noise(
        keys,
        [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2]],
        [[1, 1, 2, 2, 2, 0], [0, 0, 0, 2, 2, 2]],
    )[0]
    np.testing.assert_array_equal(packed[2:5], alone[3:])


def test_tokens_segments_and_examples_have_different_noise():
    keys = jax.random.split(jax.random.key(5), 3)
    positions = np.tile(np.r_[np.arange(50), np.arange(50)], (3, 1))
    segment_ids = np.tile(np.repeat([1, 2], 50), (3, 1))
    made, _ = noise(keys, positions, segment_ids)
    assert len(np.unique(made.reshape(300, -1), axis=0)) == 300


def test_sharded_batch_needs_no_collective_and_gives_the_same_samples():
    program = """
        import re, jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from meta_attention_jax.controller import sampling
        from tests.close import assert_close

        def value(alpha, keys, ids):
            return sampling.sample_dirichlet(sampling.token_keys(keys, ids, ids), alpha)

        def program(alpha, keys, ids):
            out, pull = jax.vjp(lambda a: value(a, keys, ids), alpha)
            return out, pull(jnp.cos(out))[0]

        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        arguments = (
            jnp.linspace(0.05, 5.0, 8 * 6 * 3).reshape(8, 6, 3),
            jax.random.split(jax.random.key(0), 8),
            jnp.tile(jnp.arange(6, dtype=jnp.int32)[None], (8, 1)),
        )
        one = jax.jit(program)(*arguments)
        sharded = jax.jit(program, in_shardings=rows, out_shardings=rows)
        compiled = sharded.lower(*arguments).compile()
        many = compiled(*jax.device_put(arguments, rows))
        assert len(many[0].sharding.device_set) == 4
        assert_close(many, one)
        text = compiled.as_text()
        assert not re.search("all-reduce|all-gather|all-to-all|collective|reduce-scatter", text)
        print("no collective")
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "no collective", done.stderr


@pytest.mark.parametrize(
    "keys",
    [jax.random.key(0), jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 2), jnp.uint32)],
    ids=["one", "three", "raw"],
)
def test_keys_must_be_typed_and_one_per_example(keys):
    ids = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"keys: expected typed PRNG keys of shape \(2,\)"):
        sampling.token_keys(keys, ids, ids)
