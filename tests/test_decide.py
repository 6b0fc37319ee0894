"""Mixtures: one-hot soft is hard, the gate's limits, straight-through gradients, forced routes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.routing import decide as room
from meta_attention_jax.types import Routing
from tests.close import assert_close

B, T, K, H, D = 2, 7, 3, 2, 4


def make_routing(seed=0):
    rng = np.random.default_rng(seed)
    mean, weights = (jnp.float32(rng.dirichlet(np.ones(K), (B, T))) for _ in range(2))
    uncertainty = jnp.float32(rng.uniform(0.05, 1.0, (B, T)))
    return Routing(mean=mean, weights=weights, uncertainty=uncertainty, kl=jnp.zeros((B, T)),
                   penalty=jnp.zeros((B, T)))


def make_outputs(seed=1, dtype=jnp.float32):
    return list(jnp.asarray(np.random.default_rng(seed).normal(size=(K, B, T, H, D)), dtype))


def decided(routing, mode, threshold=0.5, training=False, route=None):
    return room.decide(
        routing, mode=mode, threshold=jnp.float32(threshold), training=training, route=route
    )


def one_hot(route):
    return np.eye(K, dtype=np.float32)[np.asarray(route)]


def test_soft_is_the_weighted_sum():
    outputs, weights = make_outputs(), make_routing().weights
    expected = np.einsum("kbthd,btk->bthd", np.float64(jnp.stack(outputs)), np.float64(weights))
    assert_close(room.mix(outputs, weights), expected, 1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_one_hot_soft_is_hard_exactly(dtype, training):
    outputs = make_outputs(dtype=dtype)
    weights, route, hard = decided(make_routing(), "hard", training=training)
    mixed = room.mix(outputs, weights)
    picked = np.take_along_axis(
        np.asarray(jnp.stack(outputs, -1)), np.asarray(route)[..., None, None, None], -1
    )[..., 0]
    assert mixed.dtype == dtype and hard.all()
    np.testing.assert_array_equal(mixed, picked)


@pytest.mark.parametrize("training", [False, True])
def test_hard_takes_the_argmax_of_the_mean_not_of_the_sample(training):
    routing = make_routing()
    weights, route, _ = decided(routing, "hard", training=training)
    np.testing.assert_array_equal(route, np.argmax(routing.mean, -1))
    assert (np.argmax(routing.weights, -1) != np.asarray(route)).any()
    np.testing.assert_array_equal(weights, one_hot(route))


@pytest.mark.smoke
@pytest.mark.parametrize("mode, training", [("gated", False), ("gated", True), ("soft", True)])
def test_limits_and_middle_of_the_gate(mode, training):
    routing = make_routing()
    closed, _, hard = decided(routing, mode, 0.0, training)
    assert not hard.any()
    np.testing.assert_array_equal(closed, routing.weights)

    opened, route, hard = decided(routing, mode, 1.0, training)
    assert hard.all()
    np.testing.assert_array_equal(opened, one_hot(route))

    middle, route, hard = decided(routing, mode, 0.5, training)
    np.testing.assert_array_equal(hard, np.asarray(routing.uncertainty) <= 0.5)
    expected = np.where(np.asarray(hard)[..., None], one_hot(route), routing.weights)
    np.testing.assert_array_equal(middle, expected)


def test_soft_evaluation_ignores_the_gate():
    routing = make_routing()
    weights, route, hard = decided(routing, "soft", 1.0)
    assert not hard.any()
    np.testing.assert_array_equal(weights, routing.weights)
    np.testing.assert_array_equal(route, np.argmax(routing.mean, -1))


@pytest.mark.parametrize("mode", ["hard", "gated"])
def test_hard_tokens_pass_the_gradient_of_the_mean(mode):
    """d/d mean of <g, weights> is g at hard tokens in training, as if the token were soft."""
    routing = make_routing()
    g = jnp.float32(np.random.default_rng(2).normal(size=(B, T, K)))

    def through(mean, weights, training):
        changed = routing.replace(mean=mean, weights=weights)
        return jnp.sum(g * decided(changed, mode, 0.5, training)[0])

    slopes = jax.jit(jax.grad(through, argnums=(0, 1)), static_argnums=2)
    to_mean, to_weights = slopes(routing.mean, routing.weights, True)
    hard = np.asarray(decided(routing, mode, 0.5, True)[2])[..., None]
    np.testing.assert_array_equal(to_mean, np.where(hard, g, 0.0))
    np.testing.assert_array_equal(to_weights, np.where(hard, 0.0, g))
    to_mean, _ = slopes(routing.mean, routing.weights, False)
    assert not np.any(to_mean), "evaluation has no straight-through gradient"


@pytest.mark.parametrize("mode", room.MODES)
@pytest.mark.parametrize("training", [False, True])
def test_forced_route_is_plain_one_hot(mode, training):
    routing = make_routing()
    forced = jnp.asarray(np.random.default_rng(3).integers(0, K, (B, T)), jnp.int32)

    @jax.jit
    def value(mean, route):
        weights, route, hard = decided(
            routing.replace(mean=mean), mode, 0.5, training, route=route
        )
        return jnp.sum(weights**2), (weights, route, hard)

    slope, (weights, route, hard) = jax.grad(value, has_aux=True)(routing.mean, forced)
    np.testing.assert_array_equal(weights, one_hot(forced))
    np.testing.assert_array_equal(route, forced)
    assert hard.all() and not np.any(slope)


@pytest.mark.parametrize(
    "route, message",
    [
        (np.zeros((B, T + 1), np.int32), r"route: expected integers of shape \(2, 7\)"),
        (np.zeros((B, T), np.float32), "route: expected integers .* got float32"),
        (np.full((B, T), K, np.int32), r"route: expected indices in \[0, 3\), got 0 to 3"),
        (np.full((B, T), -1, np.int32), r"route: expected indices in \[0, 3\), got -1"),
    ],
)
def test_bad_forced_routes_are_one_sentence(route, message):
    with pytest.raises(ValueError, match=message):
        decided(make_routing(), "soft", route=route)


def test_bad_mode_and_number_of_outputs():
    with pytest.raises(ValueError, match="mode: expected one of .* got 'firm'"):
        decided(make_routing(), "firm")
    with pytest.raises(ValueError, match="outputs: expected 3 arrays, one per weight, got 2"):
        room.mix(make_outputs()[:2], make_routing().weights)
