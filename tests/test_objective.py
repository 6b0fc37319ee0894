"""The objective and its metrics against token-by-token float64; masks, sums, and refusals."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax.model import Output
from meta_attention_jax.objective import (
    COLLAPSE,
    flatten_scalars,
    loss_sums,
    objective,
    predictive_nll,
    summarise,
    token_nll,
)
from meta_attention_jax.types import Batch, Routing
from tests.close import assert_close

LAYERS, BATCH, TIME, VOCAB, KINDS = 2, 4, 5, 7, 3
NAMES = ("full", "linear", "local")
K = len(NAMES)
COSTS = (1.0, 0.15, 0.3)


def made_up(seed=0):
    """An output and a batch of noise: everything differs from token to token."""
    rng = np.random.default_rng(seed)
    tokens = (LAYERS, BATCH, TIME)
    concentration = rng.gamma(2.0, size=(*tokens, K)) + 0.1
    mean = concentration / concentration.sum(-1, keepdims=True)
    routing = Routing(
        mean=np.float32(mean),
        weights=np.float32(rng.dirichlet(np.ones(K), tokens)),
        uncertainty=np.float32(rng.uniform(size=tokens)),
        kl=(kl := np.float32(rng.gamma(1.0, size=tokens))),
        penalty=kl,
        concentration=np.float32(concentration),
        route=rng.integers(0, K, tokens).astype(np.int32),
        hard=rng.uniform(size=tokens) < 0.4,
    )
    logits = rng.normal(size=(BATCH, TIME, VOCAB))
    targets = np.where(
        rng.uniform(size=(BATCH, TIME)) < 0.5,
        logits.argmax(-1),
        rng.integers(0, VOCAB, (BATCH, TIME)),
    )
    mask = rng.uniform(size=(BATCH, TIME)) < 0.7
    batch = Batch(
        tokens=rng.integers(0, VOCAB, (BATCH, TIME)),
        targets=targets,
        segment_ids=mask.astype(np.int32),
        positions=np.tile(np.arange(TIME), (BATCH, 1)),
        loss_mask=mask,
        kind=rng.integers(0, KINDS, (BATCH, TIME)),
        num_bytes=rng.integers(1, 5, (BATCH, TIME)),
        row=np.arange(BATCH),
    )
    return Output(logits=np.float32(logits), routing=routing), batch


sums = jax.jit(functools.partial(loss_sums, num_kinds=KINDS))


def metrics(output, batch, beta=0.0):
    return summarise(sums(output, batch), mechanisms=NAMES, costs=COSTS, beta=beta)


def naive_nll(logits, target):
    logits = np.float64(logits)
    return -np.log(np.exp(logits[target]) / np.exp(logits).sum())


def entropy(p):
    return -sum(x * math.log(x) for x in np.float64(p) if x > 0)


def loss_tokens(batch):
    return [(b, t) for b in range(BATCH) for t in range(TIME) if batch.loss_mask[b, t]]


def averages(values, places):
    """Mean over the loss tokens of [layer batch time ...], per layer."""
    return np.mean([np.float64(values)[:, b, t] for b, t in places], axis=0)



@pytest.mark.smoke
def test_nats_bits_and_accuracy_are_those_of_the_loss_tokens():
    output, batch = made_up()
    places, found = loss_tokens(batch), metrics(output, batch)
    nats = [naive_nll(output.logits[p], batch.targets[p]) for p in places]
    right = [np.argmax(output.logits[p]) == batch.targets[p] for p in places]
    num_bytes = sum(batch.num_bytes[p] for p in places)
    assert 0 < len(places) < BATCH * TIME and found["tokens"] == len(places)
    assert found["nll"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(np.sum(nats) / np.log(2) / num_bytes, rel=1e-5)
    assert found["accuracy"] == np.mean(right) and 0 < found["accuracy"] < 1


def test_kl_uncertainty_hardness_and_concentration_are_means_over_loss_tokens():
    output, batch = made_up(1)
    places, found, routing = loss_tokens(batch), metrics(output, batch), output.routing
    kl = averages(routing.kl, places)
    assert_close(np.array(found["layers"]["kl"]), kl)
    assert found["kl"] == pytest.approx(kl.sum(), rel=1e-5), "all layers together"
    assert found["elbo"] == pytest.approx(found["nll"] + kl.sum(), rel=1e-5)
    for name, values in (
        ("uncertainty", routing.uncertainty),
        ("hard_fraction", routing.hard),
        ("concentration", np.float64(routing.concentration).sum(-1)),
    ):
        layers = averages(values, places)
        assert_close(np.array(found["layers"][name]), layers)
        assert found[name] == pytest.approx(layers.mean(), rel=1e-5)


@pytest.mark.smoke
def test_entropies_tell_undecided_tokens_from_even_usage():
    output, batch = made_up(2)
    places, found = loss_tokens(batch), metrics(output, batch)
    for layer in range(LAYERS):
        undecided = np.mean([entropy(output.routing.mean[(layer, *p)]) for p in places])
        routes = [int(output.routing.route[(layer, *p)]) for p in places]
        usage = entropy(np.bincount(routes, minlength=K) / len(routes))
        layers = found["layers"]
        assert layers["routing_entropy"][layer] == pytest.approx(undecided / math.log(K), rel=1e-5)
        assert layers["usage_entropy"][layer] == pytest.approx(usage / math.log(K), rel=1e-5)
    for name in ("routing_entropy", "usage_entropy"):
        assert found[name] == pytest.approx(np.mean(found["layers"][name]), rel=1e-5)


def test_costs_are_of_the_routes_and_of_the_means():
    output, batch = made_up(3)
    places, found, routing = loss_tokens(batch), metrics(output, batch), output.routing
    chosen = np.array(COSTS)[np.asarray(routing.route)]
    assert found["cost"] == pytest.approx(averages(chosen, places).mean(), rel=1e-5)
    expected = np.float64(routing.mean) @ np.array(COSTS)
    assert found["expected_cost"] == pytest.approx(averages(expected, places).mean(), rel=1e-5)
    assert abs(found["cost"] - found["expected_cost"]) > 1e-3


def test_route_fractions_per_layer_and_in_all():
    output, batch = made_up(4)
    places, found = loss_tokens(batch), metrics(output, batch)
    fractions = averages(np.eye(K)[np.asarray(output.routing.route)], places)
    assert_close(np.array(found["layers"]["fractions"]), fractions)
    assert_close(np.array(found["layers"]["mean"]), averages(output.routing.mean, places))
    for index, name in enumerate(NAMES):
        assert found[f"fraction/{name}"] == pytest.approx(fractions[:, index].mean(), rel=1e-5)


def test_diversity_is_the_spread_of_the_mean_over_tokens():
    output, batch = made_up(5)
    places, found = loss_tokens(batch), metrics(output, batch)
    mean = np.array([np.float64(output.routing.mean)[:, b, t] for b, t in places])
    spread = np.sqrt(((mean - mean.mean(0)) ** 2).mean(0).sum(-1))
    assert_close(np.array(found["layers"]["diversity"]), spread)
    assert found["diversity"] == pytest.approx(spread.mean(), rel=1e-5)

    same = np.broadcast_to(np.float32([0.5, 0.3, 0.2]), output.routing.mean.shape)
    alike = metrics(output.replace(routing=output.routing.replace(mean=same)), batch)
    assert alike["diversity"] == pytest.approx(0.0, abs=1e-3)


def test_a_layer_has_collapsed_when_one_mechanism_takes_it():
    rows, time = 10, 20
    mean = np.full((LAYERS, rows, time, K), 1 / K, np.float32)
    route = np.ones((LAYERS, rows, time), np.int32)
    grid = np.zeros((LAYERS, rows, time), np.float32)
    batch = Batch(
        tokens=grid[0], targets=grid[0].astype(np.int32), segment_ids=grid[0], positions=grid[0],
        loss_mask=np.ones((rows, time), bool), kind=grid[0].astype(np.int32), num_bytes=grid[0],
        row=np.arange(rows),
    )

    def collapsed(others):
        """Layers collapsed when so many of 200 tokens in layer 1 take another mechanism."""
        changed = route.copy()
        changed[1].flat[:others] = 2
        routing = Routing(mean=mean, weights=mean, uncertainty=grid, kl=grid, penalty=grid, route=changed,
                          hard=grid > 0)
        logits = np.zeros((rows, time, VOCAB), np.float32)
        return metrics(Output(logits=logits, routing=routing), batch)["collapsed_layers"]

    assert COLLAPSE == 0.99
    assert [collapsed(n) for n in (0, 1, 2, 100)] == [2, 2, 1, 1]


@pytest.mark.smoke
def test_kinds_are_told_apart():
    output, batch = made_up(6)
    places, kinds = loss_tokens(batch), metrics(output, batch)["kinds"]
    for kind in range(KINDS):
        mine = [p for p in places if batch.kind[p] == kind]
        nats = [naive_nll(output.logits[p], batch.targets[p]) for p in mine]
        right = [np.argmax(output.logits[p]) == batch.targets[p] for p in mine]
        assert kinds["tokens"][kind] == len(mine) > 0
        assert kinds["nll"][kind] == pytest.approx(np.mean(nats), rel=1e-5)
        assert kinds["accuracy"][kind] == pytest.approx(np.mean(right), rel=1e-5)
        fractions = averages(np.eye(K)[np.asarray(output.routing.route)], mine)
        assert_close(np.array(kinds["fractions"])[:, kind], fractions)


def test_an_answer_is_exact_where_all_its_tokens_are_right():
    """By hand: of kind 1 a whole answer, one with a token wrong and one whose wrong token is masked; of kind 2 none."""
    output, batch = made_up()
    right = np.array([[1, 1, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    kind = np.array([[0, 1, 0, 0, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    mask = np.ones((BATCH, TIME), bool)
    mask[2, 1] = False
    best = output.logits.argmax(-1)
    targets = np.where(right, best, (best + 1) % VOCAB)
    kinds = metrics(output, batch.replace(targets=targets, kind=kind, loss_mask=mask))["kinds"]
    assert kinds["exact"] == [0.75, pytest.approx(2 / 3), 0.0]
    assert kinds["tokens"] == [12.0, 7.0, 0.0] and kinds["accuracy"][1] == pytest.approx(6 / 7)


def test_a_kind_without_tokens_is_zero_and_one_kind_is_not_told_apart():
    output, batch = made_up()
    absent = metrics(output, batch.replace(kind=np.zeros_like(batch.kind)))["kinds"]
    for name in ("tokens", "nll", "accuracy", "exact"):
        assert absent[name][1:] == [0.0, 0.0]
    one_kind = jax.jit(functools.partial(loss_sums, num_kinds=1))
    alone = one_kind(output, batch.replace(kind=np.zeros_like(batch.kind)))
    assert "kinds" not in summarise(alone, mechanisms=NAMES, costs=COSTS)


@pytest.mark.smoke
def test_masked_tokens_count_in_nothing():
    output, batch = made_up(7)
    other, garbage = made_up(8)
    masked = ~batch.loss_mask

    def spoilt(kept, noise, where):
        changed = np.array(kept)
        changed[where] = np.asarray(noise)[where]
        return changed

    routing = jax.tree.map(
        lambda kept, noise: spoilt(kept, noise, (slice(None), masked)),
        output.routing,
        other.routing,
    )
    changed = Output(logits=spoilt(output.logits, 1e30 * other.logits, masked), routing=routing)
    fields = ("tokens", "targets", "segment_ids", "positions", "kind", "num_bytes")
    garbage = {
        name: spoilt(getattr(batch, name), getattr(garbage, name), masked) for name in fields
    }
    assert np.any(changed.logits != output.logits) and np.any(garbage["kind"] != batch.kind)
    spoilt_sums = sums(changed, batch.replace(**garbage))  # One program: bit for bit.
    jax.tree.map(np.testing.assert_array_equal, spoilt_sums, sums(output, batch))


def test_sums_of_two_halves_are_those_of_the_whole():
    output, batch = made_up(9)

    def rows(part):
        routing = jax.tree.map(lambda leaf: leaf[:, part], output.routing)
        return sums(
            Output(logits=output.logits[part], routing=routing),
            jax.tree.map(lambda leaf: leaf[part], batch),
        )

    first, second = rows(slice(0, 2)), rows(slice(2, 4))
    assert first.tokens != second.tokens, "halves of unequal weight"
    added = jax.tree.map(np.add, first, second)
    assert_close(added, sums(output, batch))
    report = summarise(added, mechanisms=NAMES, costs=COSTS)
    whole = flatten_scalars(metrics(output, batch))
    assert_close(flatten_scalars(report), whole)


@pytest.mark.smoke
def test_the_objective_is_nats_plus_beta_times_kl():
    output, batch = made_up(10)
    found = sums(output, batch)
    kl = np.float64(output.routing.kl)[:, batch.loss_mask].sum()
    places = loss_tokens(batch)
    nats = sum(naive_nll(output.logits[p], batch.targets[p]) for p in places)
    for beta in (0.0, 0.25, 2.0):
        value = objective(found, jnp.float32(beta))
        assert_close(value, nats + beta * kl)
        loss = metrics(output, batch, beta=beta)["loss"]
        assert loss == pytest.approx(float(value) / len(places), rel=1e-5)


def test_the_gradient_of_the_objective_is_softmax_minus_target_at_loss_tokens_alone():
    output, batch = made_up(11)

    def loss(logits, kl):
        routing = output.routing.replace(penalty=kl)
        return objective(sums(Output(logits=logits, routing=routing), batch), jnp.float32(0.5))

    to_logits, to_kl = jax.grad(loss, argnums=(0, 1))(output.logits, output.routing.kl)
    p = np.exp(np.float64(output.logits))
    p /= p.sum(-1, keepdims=True)
    slope = (p - np.eye(VOCAB)[batch.targets]) * batch.loss_mask[..., None]
    assert_close(to_logits, slope)
    np.testing.assert_array_equal(to_kl, np.broadcast_to(0.5 * batch.loss_mask, to_kl.shape))


def test_nats_stand_logits_of_any_size():
    logits = jnp.array([[[1e3, 0.0, -1e3], [-1e3, -1e3, -1e3]]])
    nats = token_nll(logits, jnp.array([[1, 2]]))
    np.testing.assert_allclose(nats, [[1e3, math.log(3)]], rtol=1e-4)


@pytest.mark.smoke
def test_the_predictive_is_the_log_of_the_mean_likelihood():
    log_p = -np.random.default_rng(0).gamma(2.0, 2.0, size=(6, BATCH, TIME))
    found = predictive_nll(jnp.float32(log_p))
    assert_close(found, -np.log(np.exp(log_p).mean(0)))
    assert np.all(found < -log_p.mean(0)), "Jensen: below the mean of the samples' nats"


@pytest.mark.parametrize("samples", [1, 5])
def test_the_predictive_of_equal_samples_is_their_nats(samples):
    output, batch = made_up(12)
    nats = token_nll(output.logits, batch.targets)
    equal = np.broadcast_to(-nats, (samples, *nats.shape))
    assert_close(predictive_nll(equal), nats)


def test_no_loss_tokens_are_refused():
    output, batch = made_up()
    empty = batch.replace(loss_mask=np.zeros_like(batch.loss_mask))
    with pytest.raises(ValueError, match="^loss tokens: expected at least one, got none") as error:
        metrics(output, empty)
    assert "\n" not in str(error.value)


def test_without_bytes_there_are_no_bits_and_without_a_dirichlet_no_concentration():
    output, batch = made_up()
    silent = metrics(output, batch.replace(num_bytes=np.zeros_like(batch.num_bytes)))
    assert silent["bits_per_byte"] is None
    plain = output.replace(routing=output.routing.replace(concentration=None))
    assert metrics(plain, batch)["concentration"] == 0.0
    assert metrics(output, batch)["concentration"] > 0.0


def test_one_mechanism_has_no_entropy():
    output, batch = made_up()
    one = jax.tree.map(lambda leaf: leaf[..., :1] if leaf.ndim == 4 else leaf, output.routing)
    one = one.replace(mean=np.ones_like(one.mean), route=np.zeros_like(one.route))
    found = summarise(sums(output.replace(routing=one), batch), mechanisms=("full",), costs=(1.0,))
    assert found["routing_entropy"] == found["usage_entropy"] == found["diversity"] == 0.0
    assert found["cost"] == found["fraction/full"] == 1.0 and found["collapsed_layers"] == LAYERS


def test_scalars_are_named_by_their_path():
    nested = {
        "nll": 1.5,
        "tokens": 3,
        "fraction/full": 0.25,
        "bits_per_byte": None,
        "name": "text",
        "layers": {"kl": [0.5, 0.75], "fractions": ((1.0, 0.0), (0.5, 0.5))},
    }
    assert flatten_scalars(nested, prefix="eval/") == {
        "eval/nll": 1.5,
        "eval/tokens": 3.0,
        "eval/fraction/full": 0.25,
        "eval/layers/kl/0": 0.5,
        "eval/layers/kl/1": 0.75,
        "eval/layers/fractions/0/0": 1.0,
        "eval/layers/fractions/0/1": 0.0,
        "eval/layers/fractions/1/0": 0.5,
        "eval/layers/fractions/1/1": 0.5,
    }


def test_all_metrics_are_plain_numbers():
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, float) and math.isfinite(value)

    assert plain(metrics(*made_up()))
