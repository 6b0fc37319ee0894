"""Controllers: uncertainty measures, causality, invariance, initial state, and the factory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from meta_attention_jax.controller import uncertainty
from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.controller.controller import features
from meta_attention_jax.controller.prior import PRIORS, make_prior
from meta_attention_jax.controller.uncertainty import MEASURES, measured
from meta_attention_jax.types import Router, RoutingHypers
from tests.close import assert_close

B, T, D, K = 2, 6, 8, 3
ARMS = {
    "additive": ("bayesian", {"posterior": "additive"}),
    "mean_strength": ("bayesian", {"posterior": "mean_strength"}),
    "softmax": ("softmax", {}),
    "fixed": ("fixed", {"fixed": "local"}),
}
LEARNED = ("additive", "mean_strength", "softmax")


def hypers(strength=1.85, costs=(1.0, 0.15, 0.30)):
    return RoutingHypers(
        strength=jnp.float32(strength),
        preference=jnp.float32(0.1),
        costs=jnp.asarray(np.float32(costs)),
        threshold=jnp.float32(0.0),
    )


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    x, residual = (np.float32(rng.normal(size=(B, T, D))) for _ in range(2))
    positions = np.tile(np.arange(T, dtype=np.int32)[None], (B, 1))
    arrays = {
        "x": x,
        "residual": np.float32(3.0) * residual,
        "positions": positions,
        "segment_ids": np.ones((B, T), np.int32),
    }
    return jax.tree.map(jnp.asarray, arrays) | {"keys": jax.random.split(jax.random.key(seed), B)}


def controller(arm, *, dtype=jnp.float32, **fields):
    name, own = ARMS[arm]
    return make_controller(Router(controller=name, hidden=16, **own, **fields), dtype=dtype)


@functools.cache
def parameters(arm):
    """The same for every dtype; the zero-initialised output layer is moved."""

    @jax.jit
    def moved(key):
        variables = controller(arm).init(key, hypers=hypers(), **inputs() | {"keys": None})
        return jax.tree.map(
            lambda leaf: leaf + 0.5 * jax.random.normal(jax.random.key(8), leaf.shape), variables
        )

    return moved(jax.random.key(7))


@functools.cache
def build(arm, **fields):
    """(jitted apply, params) of an arm."""
    module = controller(arm, **fields)

    @jax.jit
    def apply(params, x, **kwargs):
        return module.apply(params, x, **{"hypers": hypers(), **kwargs})

    return apply, parameters(arm)


@pytest.fixture(scope="module", params=LEARNED)
def learned(request):
    return build(request.param)



# Uncertainty ------------------------------------------------------------------------------------


def alphas(seed=0, num=200):
    return np.exp(np.random.default_rng(seed).uniform(np.log(0.05), np.log(1e3), (num, K)))


def with_slope(function, x):
    """f(x) and d sum f / d x, on the host."""

    @jax.jit
    def run(x):
        value, pull = jax.vjp(function, x)
        return value, pull(jnp.ones_like(value))[0]

    return jax.device_get(run(x))


def test_uncertainties_are_their_definitions_by_monte_carlo():
    @functools.partial(jax.jit, static_argnames="measure")
    def uncertainty(measure, alpha):
        return measured(measure, alpha / alpha.sum(), alpha).uncertainty

    for alpha in ([0.1, 0.95, 0.8], [2.0, 5.0, 3.0], [0.3, 0.3, 0.3]):
        draws = np.random.default_rng(0).dirichlet(alpha, 200_000)
        entropies = stats.entropy(draws, axis=-1)
        total = stats.entropy(np.mean(draws, 0)) / np.log(K)
        error = 5 * entropies.std() / np.sqrt(len(draws)) / np.log(K)
        alpha = np.float32(alpha)
        entropy, epistemic, vacuity = (
            float(uncertainty(measure, alpha)) for measure in ("entropy", "mutual_information", "vacuity")
        )
        assert abs(entropy - total) < 5e-3
        assert abs(epistemic - (entropy - entropies.mean() / np.log(K))) < error
        assert np.isclose(vacuity, K / (K + alpha.sum()))


@pytest.mark.parametrize("measure", MEASURES)
def test_uncertainty_is_in_the_unit_interval_with_finite_gradients(measure):
    alpha = np.float32(np.concatenate([alphas(), np.full((1, K), 1e3), np.full((1, K), 0.05)]))

    def of(alpha):
        return measured(measure, alpha / jnp.sum(alpha, axis=-1, keepdims=True), alpha).uncertainty

    u, slope = with_slope(of, alpha)
    assert (u >= 0.0).all() and (u <= 1.0).all()
    assert np.isfinite(slope).all()


def test_entropy_at_the_corners_of_the_simplex():
    mean = np.float32([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]])
    u, slope = with_slope(uncertainty.entropy, mean)
    assert_close(u, np.array([0.0, 1.0, np.log(2) / np.log(3)]), 1e-6)
    assert np.isfinite(slope).all()
    nats = jax.jit(uncertainty.categorical_entropy)(mean)
    assert_close(nats, np.array([0.0, np.log(3), np.log(2)]), 1e-6)


def test_evidence_lowers_epistemic_uncertainty_and_not_the_total():
    mean = jnp.asarray([0.2, 0.5, 0.3])
    for measure in ("mutual_information", "vacuity"):
        of = jax.jit(jax.vmap(lambda s, measure=measure: measured(measure, mean, s * mean).uncertainty))
        values = np.asarray(of(np.float32([1.0, 10.0, 100.0])))
        assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("measure", ["mutual_information", "vacuity"])
def test_prior_free_controllers_have_total_uncertainty_only(measure):
    module = make_controller(Router(controller="softmax", uncertainty=measure))
    with pytest.raises(ValueError, match=f"expected a measure of the mean, .* got '{measure}'"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), hypers=hypers(), **inputs()))


def test_unknown_measure_names_the_known():
    with pytest.raises(ValueError, match="uncertainty: expected one of .*vacuity.* got 'doubt'"):
        measured("doubt", jnp.ones(3) / 3, None)


# What every controller promises -------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("sampled", [False, True])
def test_routing_is_well_formed(arm, sampled):
    apply, params = build(arm)
    given = inputs()
    given["keys"] = given["keys"] if sampled else None
    out = jax.device_get(apply(params, **given))
    for array in (out.mean, out.weights):
        assert array.shape == (B, T, K) and array.dtype == np.float32
        np.testing.assert_allclose(array.sum(-1), 1.0, rtol=1e-5)
    assert out.uncertainty.shape == out.kl.shape == (B, T)
    assert ((out.uncertainty >= 0.0) & (out.uncertainty <= 1.0)).all()
    assert (out.concentration is not None) == (ARMS[arm][0] == "bayesian")
    if sampled and out.concentration is not None:
        assert np.abs(out.weights - out.mean).max() > 0.1
        assert (out.kl > 0.0).all()
    else:
        np.testing.assert_array_equal(out.weights, out.mean)


@pytest.mark.smoke
def test_routing_at_t_ignores_what_follows(learned):
    apply, params = learned
    given, other = inputs(), inputs(9)

    @jax.jit
    @jax.grad
    def slopes(x, residual, past):
        out = apply(params, **{**given, "x": x, "residual": residual})
        flat = jnp.concatenate([leaf.reshape(B, T, -1) for leaf in jax.tree.leaves(out)], axis=-1)
        return jnp.sum(jnp.where(past, jnp.sin(flat), 0.0))

    full = jax.device_get(apply(params, **given))
    for t in (0, 3):
        past = np.arange(T)[None, :, None] <= t
        names = ("x", "residual")
        replaced = {name: np.where(past, given[name], other[name]) for name in names}
        out = jax.device_get(apply(params, **{**given, **replaced}))
        # Bit for bit: one program, whose tokens never meet.
        for u, v in zip(jax.tree.leaves(out), jax.tree.leaves(full), strict=True):
            np.testing.assert_array_equal(u[:, : t + 1], v[:, : t + 1])
        slope = np.asarray(slopes(given["x"], given["residual"], past))
        assert np.any(slope[:, : t + 1]) and not np.any(slope[:, t + 1 :])


@pytest.mark.smoke
def test_routing_ignores_cutting_padding_and_batching(learned):
    apply, params = learned
    given = inputs()
    full = jax.device_get(apply(params, **given))
    per_token = ("x", "residual", "positions", "segment_ids")
    cut = {name: np.asarray(given[name])[1:, :4] for name in per_token} | {"keys": given["keys"][1:]}
    expected = jax.tree.map(lambda leaf: leaf[1:, :4], full)
    assert_close(apply(params, **cut), expected)

    padded = {
        name: np.pad(given[name], ((0, 0), (3, 0)) + ((0, 0),) * (given[name].ndim - 2))
        for name in per_token
    }
    out = jax.device_get(apply(params, **padded, keys=given["keys"]))
    assert_close(jax.tree.map(lambda leaf: leaf[:, 3:], out), full)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), "finite at padding"


def test_residual_norm_is_a_feature_without_gradient(learned):
    apply, params = learned
    given = inputs()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def total(residual):
        out = apply(params, **{**given, "residual": residual})
        return jnp.sum(jnp.sin(3.0 * out.mean)), out.mean

    slope, mean = total(given["residual"])
    assert not np.any(slope)
    scaled = apply(params, **{**given, "residual": np.float32(4.0) * np.asarray(given["residual"])}).mean
    assert np.abs(np.asarray(mean) - np.asarray(scaled)).max() > 1e-3


def test_features_are_their_formula():
    given = inputs()
    got = np.asarray(jax.jit(features)(given["x"], given["residual"], given["positions"]))
    norm = np.linalg.norm(given["residual"], axis=-1) / np.sqrt(D)
    np.testing.assert_array_equal(got[..., :D], given["x"])
    assert_close(got[..., D], norm)
    assert_close(got[..., D + 1], np.log1p(given["positions"]) / 10.0)


# Each controller ----------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("prior", PRIORS)
def test_initial_controllers_know_what_they_know_without_evidence(prior):
    """mean_strength: q = p. additive: p plus softplus(0) each. softmax: uniform."""

    @jax.jit
    def started(key):
        given = inputs() | {"keys": None, "hypers": hypers()}
        arms = [controller(arm, prior=prior) for arm in ("mean_strength", "additive")] + [controller("softmax")]
        out = [arm.init_with_output(key, **given)[0] for arm in arms]
        return make_prior(prior, hypers()).concentration, *out

    alpha, mean_strength, additive, softmax = jax.device_get(started(jax.random.key(7)))
    assert_close(mean_strength.concentration, np.broadcast_to(alpha, (B, T, K)))
    assert np.abs(mean_strength.kl).max() < 1e-5
    assert_close(additive.concentration, np.broadcast_to(alpha + np.log(2.0), (B, T, K)))
    assert_close(softmax.mean, np.full((B, T, K), 1 / K))


def test_learned_controllers_share_their_network():
    shapes = {arm: jax.tree.map(jnp.shape, build(arm)[1]) for arm in LEARNED}
    assert shapes["additive"] == shapes["softmax"]
    hidden = {arm: shape["params"]["mlp"]["hidden"] for arm, shape in shapes.items()}
    assert hidden["mean_strength"] == hidden["softmax"]


def test_strength_is_an_input_and_can_be_swept():
    apply, params = build("mean_strength")
    sweep = jax.jit(jax.vmap(lambda k: apply(params, **inputs(), hypers=hypers(k)).concentration))
    small, large = sweep(jnp.asarray([10.0, 20.0], jnp.float32))
    within = (small > 0.05) & (large < 1000.0)  # Between floor and ceiling.
    assert jnp.mean(within.astype(jnp.float32)) > 0.5
    np.testing.assert_allclose(large[within], 2.0 * small[within], rtol=1e-4)


def test_fixed_routing_is_certain_and_has_no_parameters():
    apply, params = build("fixed")
    out = apply(params, **inputs())
    assert not jax.tree.leaves(params)
    np.testing.assert_array_equal(out.mean, np.broadcast_to([0.0, 0.0, 1.0], (B, T, K)))
    assert not np.any(out.uncertainty) and not np.any(out.kl)


@pytest.mark.parametrize("arm", LEARNED)
def test_bfloat16_leaves_the_statistics_in_float32(arm):
    apply, params = build(arm, dtype=jnp.bfloat16)
    given = inputs() | {"keys": None}
    low = given | {name: given[name].astype(jnp.bfloat16) for name in ("x", "residual")}
    out = apply(params, **low)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    plain, _ = build(arm)
    assert_close(out.mean, plain(params, **given).mean, 0.03)  # A few roundings of 2^-9.


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("oracle", {}, "controller: expected one of .*'bayesian'.*'fixed'.* got 'oracle'"),
        ("softmax", {"mechanisms": None}, "mechanisms: expected names of mechanisms, got None"),
        ("fixed", {"fixed": ()}, r"fixed: expected names of mechanisms, got \(\)"),
        ("bayesian", {"hidden": 0}, "hidden: expected at least 1, got 0"),
        (["bayesian"], {}, r"controller: expected a name, got \['bayesian'\]"),
        ("softmax", {"mechanisms": ("full",)}, "mechanisms: expected 2 or more distinct names"),
        ("fixed", {"fixed": "lokal"}, "fixed: expected one of the mechanisms .* got 'lokal'"),
        ("bayesian", {"posterior": "exact"}, "posterior: expected one of .* got 'exact'"),
        ("bayesian", {"prior": "flat"}, "prior: expected one of .* got 'flat'"),
        (
            "bayesian", {"mechanisms": ("full", "linear", "local", "x")},
            r"costs: expected 4 numbers, .* got shape \(3,\)",
        ),
    ],
)
def test_bad_fields_are_one_sentence(name, fields, message):
    with pytest.raises(ValueError, match=message):
        module = make_controller(Router(controller=name, **fields))
        jax.eval_shape(lambda: module.init(jax.random.key(0), hypers=hypers(), **inputs()))
