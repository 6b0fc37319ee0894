"""Controllers to compare with, each against its own equation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import smoke
from meta_attention_jax.controller.baselines import CONTROLLERS, make_controller
from meta_attention_jax.controller.prior import cost_aware
from meta_attention_jax.objective import apply_sums, objective
from meta_attention_jax.training import build
from meta_attention_jax.training.evaluation import Evaluator, token_arrays
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.step import in_controller, init_state, routing_hypers
from meta_attention_jax.types import Router, RoutingHypers
from tests import making
from tests.close import assert_close

B, T, D, K = 3, 8, 6, 3
COSTS = np.array([1.0, 0.15, 0.3])
LEARNED = tuple(name for name in CONTROLLERS if name != "fixed")
HYPERS = RoutingHypers(
    strength=jnp.float32(2.0),
    preference=jnp.float32(0.3),
    costs=jnp.float32(COSTS),
    threshold=jnp.float32(0.0),
    entropy_bonus=jnp.float32(0.2),
    temperature=jnp.float32(0.7),
)
SEGMENTS = jnp.asarray(np.arange(T)[None] < np.array([[8], [5], [3]]), jnp.int32)


X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def arguments(x):
    return dict(residual=x, positions=jnp.asarray(np.tile(np.arange(T, dtype=np.int32), (B, 1))), segment_ids=SEGMENTS)


@functools.cache
def controller(name):
    """(params, x, keys, hypers) -> routing without keys, with them, and d (mean, weights of the token
    [0, 4]) / d x, as one program for all tests; random parameters."""
    module = make_controller(Router(controller=name, hidden=8, posterior="additive"))
    shapes = jax.eval_shape(lambda key: module.init(key, X, hypers=HYPERS, **arguments(X)), jax.random.key(0))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)

    @jax.jit
    def run(params, x, keys, hypers):
        def routed(x, keys):
            return module.apply(params, x, keys=keys, hypers=hypers, **arguments(x))

        def of_token(x):
            routing = routed(x, keys)
            return jnp.stack([routing.mean, routing.weights])[:, 0, 4]

        return routed(x, None), routed(x, keys), jax.jacobian(of_token)(x)

    return run, params


def call(name, params=None, sampled=False, hypers=HYPERS):
    """(routing, parameters); random parameters unless given."""
    run, own = controller(name)
    params = own if params is None else params
    plain, drawn, _ = run(params, X, jax.random.split(jax.random.key(3), B), hypers)
    return jax.device_get(drawn if sampled else plain), params


@pytest.mark.parametrize("name", [*LEARNED[:3], *making.slow(*LEARNED[3:])])
def test_routing_is_on_the_simplex_and_depends_on_its_own_token_alone(name):
    run, params = controller(name)
    *routings, jacobian = jax.device_get(run(params, X, jax.random.split(jax.random.key(3), B), HYPERS))
    for routing in routings:
        for weights in (routing.mean, routing.weights):
            np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
            assert np.all(weights >= -1e-6)
    others = np.ones((B, T), bool)
    others[0, 4] = False
    assert np.all(jacobian[..., others, :] == 0.0) and np.any(jacobian[..., 0, 4, :] != 0.0)


@pytest.mark.parametrize("name", LEARNED)
def test_starts_from_what_it_knows(name):
    """W_2 = 0: the prior mean where there is a prior, else all alike."""
    module = make_controller(Router(controller=name, hidden=8))
    given = arguments(X) | {"positions": jnp.zeros((B, T), jnp.int32), "hypers": HYPERS}
    routing, _ = jax.jit(lambda key: module.init_with_output(key, X, **given))(jax.random.key(0))
    prior = cost_aware(HYPERS).mean
    expected = prior if name in ("bayesian", "bayesian_mean", "softmax_kl") else np.full(K, 1 / K)
    assert_close(routing.mean, np.broadcast_to(expected, (B, T, K)))
    assert np.max(np.abs(routing.kl)) < 1e-5


def test_softmax_kl_is_the_categorical_kl_to_the_prior_mean():
    routing, _ = call("softmax_kl")
    mean = np.float64(routing.mean)
    prior = np.float64(cost_aware(HYPERS).mean)
    expected = stats.entropy(mean, np.broadcast_to(prior, mean.shape), axis=-1)
    assert_close(routing.kl, expected)
    assert routing.concentration is None
    np.testing.assert_array_equal(routing.penalty, routing.kl)
    stronger = call("softmax_kl", hypers=HYPERS.replace(strength=jnp.float32(50.0)))[0]
    assert_close(stronger.mean, routing.mean)


def test_bayesian_mean_is_the_posterior_without_its_sample():
    sampled, params = call("bayesian", sampled=True)
    mean, _ = call("bayesian_mean", params=params, sampled=True)
    np.testing.assert_array_equal(mean.weights, mean.mean)
    for field in ("mean", "kl", "concentration", "uncertainty"):
        assert_close(getattr(mean, field), getattr(sampled, field))
    assert np.max(np.abs(sampled.weights - mean.weights)) > 0.05


def test_cost_penalty_is_expected_cost_less_the_bonus():
    routing, _ = call("cost_penalty")
    mean = np.float64(routing.mean)
    expected = mean @ COSTS - 0.2 * stats.entropy(mean, axis=-1)
    assert_close(routing.penalty, expected)
    assert not np.any(routing.kl)


def test_switch_is_the_load_balance_of_every_sequence():
    routing, _ = call("switch")
    mean, real = np.float64(routing.mean), np.asarray(SEGMENTS) != 0
    for row in range(B):
        p = mean[row][real[row]]
        share = np.bincount(p.argmax(-1), minlength=K) / len(p)
        balance = len(p) * K * np.sum(share * p.mean(0))
        assert np.isclose(np.sum(routing.penalty[row][real[row]]), balance, rtol=1e-5)


def test_switch_moves_weight_from_the_busy_mechanism_to_the_idle_ones():
    """Descent on the penalty lowers the largest share; at equal use the penalty is 1 a token."""
    _, params = call("switch")
    module = make_controller(Router(controller="switch", hidden=8))

    @jax.jit
    @jax.value_and_grad
    def total(params):
        routing = module.apply(params, X, hypers=HYPERS, **arguments(X))
        return jnp.sum(routing.penalty * (SEGMENTS != 0))

    output = params["params"]["mlp"]["output"]

    def at(**changes):
        changed = {"mlp": params["params"]["mlp"] | {"output": output | changes}}
        return total({"params": changed})

    busy, slopes = at(bias=np.float32([0.0, 2.0, 0.0]))
    gradient = slopes["params"]["mlp"]["output"]["bias"]
    assert gradient[1] > 0 and gradient[0] < 0 and gradient[2] < 0
    even, _ = at(bias=np.zeros(K, np.float32), kernel=0.0 * output["kernel"])
    tokens = np.asarray(SEGMENTS).sum()
    assert float(busy) / tokens > 1.2
    assert float(even) / tokens == pytest.approx(1.0), "1 a token where all weights are equal"


def test_gumbel_trains_with_hard_samples_of_the_softmax():
    """One-hot exactly, with the frequencies of softmax(f) at every temperature."""
    draws = 4000
    module = make_controller(Router(controller="gumbel", hidden=8))
    logits = np.float32(np.tile(np.log([0.5, 0.3, 0.2]), (1, draws, 1)))

    @jax.jit
    def sampled(key, temperature):
        keys = jax.random.split(key, (1, draws))
        return module.training_weights(logits, HYPERS.replace(temperature=temperature), keys)[0]

    for temperature in (0.2, 3.0):
        weights = np.asarray(sampled(jax.random.key(0), np.float32(temperature)))
        assert set(np.unique(weights)) == {0.0, 1.0}
        error = 4 * 0.5 / np.sqrt(draws)
        np.testing.assert_allclose(np.mean(weights, 0), [0.5, 0.3, 0.2], atol=error)


def test_gumbel_gradient_is_that_of_the_relaxed_sample():
    module = make_controller(Router(controller="gumbel", hidden=8))
    logits, target = np.float32(np.random.default_rng(1).normal(size=(2, 1, 5, K)))
    keys = jax.random.split(jax.random.key(2), (1, 5))

    def straight_through(logits):
        return jnp.sum(module.training_weights(logits, HYPERS, keys) * target)

    def relaxed(logits):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (K,), jnp.float32))(keys[0])[None]
        return jnp.sum(jax.nn.softmax((logits + noise) / 0.7, axis=-1) * target)

    assert_close(*jax.jit(lambda logits: (jax.grad(straight_through)(logits), jax.grad(relaxed)(logits)))(logits))
    routing, _ = call("gumbel")
    np.testing.assert_array_equal(routing.weights, routing.mean)


def tiny(name):
    config = smoke.get_config()
    config.controller.name = name
    config.model.num_layers = 1
    return config


@functools.cache
def setting(name):
    config = tiny(name)
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    batch = jax.tree.map(jnp.asarray, dataset.train_batch(0))
    return spec, hypers, batch, initial_state()


@functools.cache
def initial_state():
    """Of softmax, whose parameters and gate all the others here have."""
    config = tiny("softmax")
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    return jax.jit(lambda key: init_state(spec, key, dataset.train_batch(0), hypers))(jax.random.key(0))


def moved(params):
    """Controllers away from where they start, so that no penalty is 0 by luck."""

    def leaf(path, x):
        noise = np.float32(np.random.default_rng(x.size).normal(size=x.shape))
        return x + 0.5 * noise if in_controller(path) else x

    return jax.tree_util.tree_map_with_path(leaf, jax.device_get(params))


@pytest.mark.parametrize("name", ["softmax", "cost_penalty", "softmax_kl", "switch"])
def test_the_objective_adds_the_penalty_times_beta(name):
    spec, hypers, batch, state = setting(name)
    params = moved(state.params)
    routing = hypers.routing

    @jax.jit
    def both(params):
        out = spec.model.apply({"params": params}, batch.tokens, segment_ids=batch.segment_ids,
                               positions=batch.positions, hypers=routing)
        return out.routing.mean[0], apply_sums(spec.model, params, batch, routing, num_kinds=2)

    mean, sums = both(params)
    extra = float(objective(sums, jnp.float32(2.0)) - sums.nll)
    mean, mask = np.float64(mean), np.asarray(batch.loss_mask)
    if name == "softmax":
        expected = 0.0 * mask
    elif name == "softmax_kl":
        prior = np.float64(cost_aware(routing).mean)
        expected = stats.entropy(mean, np.broadcast_to(prior, mean.shape), axis=-1)
    elif name == "cost_penalty":
        expected = mean @ COSTS - 0.1 * stats.entropy(mean, axis=-1)
    else:
        share = np.eye(K)[mean.argmax(-1)].mean(axis=1)
        expected = K * np.einsum("btk,bk->bt", mean, share)
    total = 2.0 * np.sum(expected * mask)
    np.testing.assert_allclose(extra, total, rtol=1e-3, atol=1e-2)
    assert (name == "softmax") == (abs(total) < 1.0)
    assert (name == "softmax_kl") == (float(sums.kl.sum()) > 1.0), "only a KL is called one"


def test_arrays_of_tokens_have_the_means_of_the_sums():
    spec, hypers, _, state = setting("softmax_kl")
    dataset = build.build_dataset(tiny("softmax_kl"))
    params, model = moved(state.params), spec.model.clone(mode="hard")
    arrays = token_arrays(model, dataset, params, hypers.routing, split="test", max_batches=2)
    evaluator = Evaluator(spec.model, dataset, Parallel("jit", jax.devices()[:1]))
    sums = evaluator.sums(params, hypers.routing, split="test", mode="hard", max_batches=2)
    assert len(arrays["nll"]) == sums.tokens
    assert_close((arrays["nll"].sum(), arrays["mean"].sum(1)), (sums.nll, sums.mean))
    for kind in range(2):
        routes = np.bincount(arrays["route"][0][arrays["kind"] == kind], minlength=K)
        np.testing.assert_array_equal(routes, sums.routes[0, kind])
        assert arrays["correct"][arrays["kind"] == kind].sum() == sums.kind_correct[kind]
    assert arrays["hard"].all()


def test_temperature_falls_to_the_end_of_the_gate():
    spec, hypers, _, state = setting("gumbel")
    end = spec.schedule.gate.end

    @jax.jit
    def temperature(step):
        return routing_hypers(spec, state.replace(step=step), hypers).temperature

    def at(step):
        return float(temperature(jnp.int32(step)))

    np.testing.assert_allclose([at(0), at(end), at(end + 5)], [2.0, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(at(end / 2), 1.0, rtol=0.3)
    assert at(1) > at(2)


def test_a_fixed_controller_refuses_an_index_that_is_none_and_keywords_that_it_does_not_have():
    module = CONTROLLERS["fixed"](num_mechanisms=K, fixed=K)
    with pytest.raises(ValueError, match=r"fixed: expected an index in \[0, 3\), got 3\."):
        module.apply({}, X, hypers=HYPERS, **arguments(X))
    with pytest.raises(TypeError, match="key"):
        module.apply({}, X, hypers=HYPERS, key=None, **arguments(X))
