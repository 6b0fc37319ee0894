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


def call(name, params=None, x=None, keys=None, hypers=HYPERS):
    """(routing, parameters); random parameters unless given."""
    module = make_controller(Router(controller=name, hidden=8, posterior="additive"))
    x = jax.random.normal(jax.random.key(0), (B, T, D)) if x is None else x
    given = dict(
        residual=x, positions=jnp.tile(jnp.arange(T)[None], (B, 1)), segment_ids=SEGMENTS,
        hypers=hypers,
    )
    if params is None:
        params = making.initial(module, x, **given)
        params = jax.tree.map(
            lambda leaf: leaf + 0.5 * jax.random.normal(jax.random.key(2), leaf.shape), params
        )
    return module.apply(params, x, keys=keys, **given), params


@pytest.mark.parametrize("name", LEARNED)
def test_routing_is_on_the_simplex_and_depends_on_its_own_token_alone(name):
    keys = jax.random.split(jax.random.key(3), B)
    for given in (None, keys):
        routing, _ = call(name, keys=given)
        for weights in (routing.mean, routing.weights):
            np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
            assert np.all(np.asarray(weights) >= -1e-6)

    def of_token(x):
        routing, _ = call(name, x=x, keys=keys)
        return jnp.stack([routing.mean, routing.weights])[:, 0, 4]

    x = jax.random.normal(jax.random.key(0), (B, T, D))
    jacobian = np.asarray(jax.jacobian(of_token)(x))
    others = np.ones((B, T), bool)
    others[0, 4] = False
    assert np.all(jacobian[..., others, :] == 0.0) and np.any(jacobian[..., 0, 4, :] != 0.0)


@pytest.mark.parametrize("name", LEARNED)
def test_starts_from_what_it_knows(name):
    """W_2 = 0: the prior mean where there is a prior, else all alike."""
    module = make_controller(Router(controller=name, hidden=8))
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    given = dict(residual=x, positions=jnp.zeros((B, T), jnp.int32), segment_ids=SEGMENTS,
                 hypers=HYPERS)
    routing = module.apply(making.initial(module, x, **given), x, **given)
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
    keys = jax.random.split(jax.random.key(3), B)
    sampled, params = call("bayesian", keys=keys)
    mean, _ = call("bayesian_mean", params=params, keys=keys)
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
    params["params"]["mlp"]["output"]["bias"] = jnp.array([0.0, 2.0, 0.0])

    def total(params):
        return jnp.sum(call("switch", params=params)[0].penalty * (SEGMENTS != 0))

    gradient = jax.grad(total)(params)["params"]["mlp"]["output"]["bias"]
    assert gradient[1] > 0 and gradient[0] < 0 and gradient[2] < 0
    busy = float(total(params)) / np.asarray(SEGMENTS).sum()
    params["params"]["mlp"]["output"]["bias"] = jnp.zeros(K)
    params["params"]["mlp"]["output"]["kernel"] *= 0.0
    even = float(total(params)) / np.asarray(SEGMENTS).sum()
    assert busy > 1.2 and even == pytest.approx(1.0), "1 a token where all weights are equal"


def test_gumbel_trains_with_hard_samples_of_the_softmax():
    """One-hot exactly, with the frequencies of softmax(f) at every temperature."""
    draws = 4000
    module = make_controller(Router(controller="gumbel", hidden=8))
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), (1, draws))
    for temperature in (0.2, 3.0):
        hypers = HYPERS.replace(temperature=jnp.float32(temperature))
        weights = module.training_weights(jnp.tile(logits, (1, draws, 1)), hypers, keys)[0]
        assert set(np.unique(weights)) == {0.0, 1.0}
        error = 4 * 0.5 / np.sqrt(draws)
        np.testing.assert_allclose(np.mean(weights, 0), [0.5, 0.3, 0.2], atol=error)


def test_gumbel_gradient_is_that_of_the_relaxed_sample():
    module = make_controller(Router(controller="gumbel", hidden=8))
    logits = jax.random.normal(jax.random.key(1), (1, 5, K))
    keys = jax.random.split(jax.random.key(2), (1, 5))
    target = jax.random.normal(jax.random.key(3), (1, 5, K))

    def straight_through(logits):
        return jnp.sum(module.training_weights(logits, HYPERS, keys) * target)

    def relaxed(logits):
        noise = jnp.stack([jax.random.gumbel(key, (K,)) for key in keys[0]])[None]
        return jnp.sum(jax.nn.softmax((logits + noise) / 0.7, axis=-1) * target)

    assert_close(jax.grad(straight_through)(logits), jax.grad(relaxed)(logits))
    np.testing.assert_array_equal(call("gumbel")[0].weights, call("gumbel")[0].mean)


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
    return spec, hypers, batch, init_state(spec, jax.random.key(0), batch, hypers)


def moved(params):
    """Controllers away from where they start, so that no penalty is 0 by luck."""

    def leaf(path, x):
        noise = jax.random.normal(jax.random.key(x.size), x.shape)
        return x + 0.5 * noise if in_controller(path) else x

    return jax.tree_util.tree_map_with_path(leaf, params)


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

    def at(step):
        return float(routing_hypers(spec, state.replace(step=jnp.int32(step)), hypers).temperature)

    np.testing.assert_allclose([at(0), at(end), at(end + 5)], [2.0, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(at(end / 2), 1.0, rtol=0.3)
    assert at(1) > at(2)
