"""The authors' system by name: their prior, network, entropy, threshold in nats; the price and the fallback."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from configs import paper, paper_recall, smoke
from meta_attention_jax import budgets, load_run
from meta_attention_jax.controller import uncertainty as measures
from meta_attention_jax.controller.posterior import mean_strength
from meta_attention_jax.controller.prior import make_prior
from meta_attention_jax.generation import Sampler, generate
from meta_attention_jax.routing.decide import decide
from meta_attention_jax.routing.gate import hard_tokens, threshold_of_nats
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.rules import final_threshold, validate
from meta_attention_jax.training.step import init_state, train_step
from meta_attention_jax.types import Router, Routing, RoutingHypers
from tests import making, oracles
from tests.close import assert_close

COSTS = (1.0, 0.15, 0.30)
THEIRS = Router(
    hidden=16, prior="paper", posterior="additive", network="paper", uncertainty="dirichlet_entropy"
)


def hypers(strength=1.0, preference=0.01, **more):
    return RoutingHypers(
        strength=jnp.float32(strength), preference=jnp.float32(preference),
        costs=jnp.asarray(COSTS), **{"threshold": jnp.float32(1.0), **more},
    )


def concentrations(num, rows=4000):
    rng = np.random.default_rng(num)
    return np.exp(rng.uniform(np.log(0.05), np.log(1000.0), (rows, num)))


@pytest.mark.parametrize("num", [2, 3, 5])
def test_the_entropy_is_that_of_scipy_and_keeps_its_digits_in_float32(num):
    alpha = np.float64(np.float32(concentrations(num)))  # The same numbers in both precisions.
    exact = np.array([stats.dirichlet.entropy(row) for row in alpha])
    entropy = jax.jit(measures.differential_entropy)
    single = np.float64(entropy(np.float32(alpha)))
    assert np.max(np.abs(single - exact) / (1.0 + np.abs(exact))) < 4e-6
    with jax.enable_x64(True):
        double = np.asarray(entropy(alpha))
    assert double.dtype == np.float64 and np.max(np.abs(double - exact)) < 1e-9


def test_its_gradient_is_finite_and_that_of_the_exact_formula():
    alpha = concentrations(3, 500)
    gradient = jax.jit(jax.grad(lambda a: measures.differential_entropy(a).sum()))(jnp.float32(alpha))
    total = alpha.sum(-1, keepdims=True)
    exact = (total - 3) * special.polygamma(1, total) - (alpha - 1) * special.polygamma(1, alpha)
    assert np.isfinite(gradient).all()
    assert_close(gradient, exact, 1e-4)


def test_the_gate_compares_entropies_where_u_has_underflowed():
    alpha = np.float32([[[0.01, 1000.0, 1000.0], [0.02, 1000.0, 1000.0], [1.0, 1.0, 1.0]]])

    @jax.jit
    def gated(alpha, *thetas):
        u, log_u = measures.measured("dirichlet_entropy", alpha, alpha)
        return u, log_u, [hard_tokens(u, theta, log_u) for theta in thetas]

    u, log_u, (some, none) = jax.device_get(
        gated(alpha, np.float32(threshold_of_nats(-80.0, 3)), np.float32(0.0))
    )
    assert u[0, 0] == 0 and log_u[0, 0] < -85 < log_u[0, 1] < log_u[0, 2] == 0
    assert some.tolist() == [[True, False, False]]
    assert not none.any()


@pytest.mark.parametrize(
    "nats, theta", [(1.0, 1.0), (-math.log(2.0), 1.0), (-1.5, 2 * math.exp(-1.5))]
)
def test_a_threshold_in_nats_is_one_of_u(nats, theta):
    assert threshold_of_nats(nats, 3) == pytest.approx(theta)


@pytest.mark.parametrize("nats", [float("nan"), float("inf"), -1e3])
def test_a_threshold_that_is_no_number_of_nats_is_one_sentence(nats):
    with pytest.raises(ValueError, match="^threshold: expected a finite number of nats >= "):
        threshold_of_nats(nats, 3)


def test_the_prior_is_theirs():
    prior = make_prior("paper", hypers(strength=1.5, preference=0.02))
    assert_close(prior.concentration, 1.5 * (1 - np.array(COSTS)) + 1.5 * 0.02, 1e-6)
    theirs = make_prior("paper", hypers())
    assert_close(theirs.concentration, np.array([0.01, 0.86, 0.71]), 1e-6)
    assert float(theirs.mean @ jnp.asarray(COSTS)) == pytest.approx(0.223, abs=5e-4)


def test_mean_strength_starts_at_it():

    @jax.jit
    def start():
        prior = make_prior("paper", hypers())
        return mean_strength(prior, jnp.zeros((1, 1, 3)), jnp.zeros((1, 1))), prior.concentration

    alpha, prior = start()
    assert_close(alpha[0, 0], prior, 1e-6)


def test_the_controller_is_their_equations():
    """alpha, mean, KL and u for shared weights, against float64 written from the equations."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, 9, 8)))
    layer = making.layer(
        num_heads=2, window=4, **{f.name: getattr(THEIRS, f.name) for f in dataclasses.fields(THEIRS)}
    )
    params = making.initial(layer, x)["params"]
    own = params["controller"]["mlp"]
    for name in ("hidden", "output"):
        assert 0.01 < np.std(own[name]["kernel"]) < 0.03 and not own[name]["bias"].any()
    # Weights that matter, and biases.
    params["controller"]["mlp"] = jax.tree.map(
        lambda p: p + jnp.float32(rng.normal(size=p.shape) * 0.5), own
    )
    routing = jax.jit(
        lambda params: layer.apply({"params": params}, x, hypers=hypers(), method="routed")[1]
    )(params)
    alpha, mean, kl, u = oracles.paper_controller(
        np.float64(x), params["controller"]["mlp"], costs=COSTS, beta0=1.0, epsilon=0.01
    )
    assert_close(routing.concentration, alpha, 1e-6)
    assert_close(routing.mean, mean, 1e-6)
    assert_close(routing.kl, kl, 1e-6)
    assert np.linalg.norm(np.float64(routing.uncertainty) - u) <= 1e-6 * np.linalg.norm(u)


def make_routing(seed=0):
    rng = np.random.default_rng(seed)
    mean = jnp.float32(rng.dirichlet(np.ones(3), (2, 9)))
    u = jnp.float32(rng.uniform(0.05, 1.0, (2, 9)))
    zeros = jnp.zeros((2, 9))
    return Routing(mean=mean, weights=mean, uncertainty=u, kl=zeros, penalty=zeros)


@pytest.mark.parametrize("mode", ["hard", "gated"])
@pytest.mark.parametrize("training", [False, True])
def test_the_price_moves_the_decision_and_none_is_a_price_of_0(mode, training):
    routing, costs = make_routing(), jnp.asarray(COSTS)

    def decided(prices):
        return decide(
            routing, mode=mode, threshold=jnp.float32(0.5), prices=prices, training=training
        )

    plain = decided(None)
    for given, expected in zip(decided(0.0 * costs), plain):
        np.testing.assert_array_equal(given, expected)
    spent = []
    for price in (-1.0, -0.3, 0.0, 0.3, 1.0, 7.0):
        found = decided(price * costs)
        expected = np.argmax(np.float32(routing.mean) - np.float32(price) * np.float32(COSTS), -1)
        np.testing.assert_array_equal(found.route, expected)
        np.testing.assert_array_equal(found.hard, plain.hard)
        spent.append(np.asarray(COSTS)[found.route].mean())
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1] == 0.15


def test_the_cautious_fallback_sends_uncertain_tokens_to_full_in_gated_evaluation_alone():
    routing = make_routing()

    def decided(mode, training=False, fallback=0):
        return decide(
            routing, mode=mode, threshold=jnp.float32(0.5), fallback=fallback, training=training
        )

    weights, route, hard = decided("gated")
    certain = np.asarray(routing.uncertainty) <= 0.5
    assert hard.all() and 0 < certain.mean() < 1
    np.testing.assert_array_equal(route, np.where(certain, np.argmax(routing.mean, -1), 0))
    np.testing.assert_array_equal(weights, np.eye(3)[np.asarray(route)])
    for mode, training in (("soft", False), ("hard", False), ("gated", True)):
        for given, expected in zip(decided(mode, training), decided(mode, training, None)):
            np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("config", [paper, paper_recall])
def test_the_config_is_their_system(config):
    config = config.get_config()
    validate(config)
    assert final_threshold(config) == 1.0 and config.objective.beta == 1.0
    router = build.build_model(config, 16).config.router
    assert dataclasses.replace(router, hidden=16) == THEIRS and router.hidden == 128


@pytest.mark.parametrize("change, message", [
    ({"gate.price": float("nan")}, "gate.price: expected "),
    ({"gate.price": float("inf")}, "gate.price: expected "),
    ({"gate.threshold": 1.5}, "gate.threshold: expected theta in "),
    ({"gate.unit": "nats"}, "gate.unit: expected 'theta' for controller.uncertainty = 'entropy'"),
    ({"gate.unit": "nats", "controller.uncertainty": "dirichlet_entropy", "gate.threshold": -1e3},
     "gate.threshold: expected a finite number of nats"),
    ({"controller.name": "softmax", "controller.uncertainty": "dirichlet_entropy"},
     "controller.uncertainty: expected one of "),
    ({"gate.fallback": "full", "model.mechanisms": ("linear", "local"), "controller.fixed": ("local",)},
     "gate.fallback: expected 'soft' without full attention"),
])
def test_what_cannot_be_is_one_sentence(change, message):
    config = smoke.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match="^" + message):
        validate(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run that routes: saved as it starts, and its controller moved so that routes and their
    certainty vary. Nothing here hinges on steps, and they are most of what a run compiles."""
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "model.num_layers": 1, "train.steps": 2, "train.eval_every": 2, "train.checkpoint_every": 2,
        "train.eval_batches": 1, "gate.kind": "none",
    })
    path = tmp_path_factory.mktemp("trained") / "run"
    job = prepare(config, path)
    state = job.parallel.make(
        lambda: init_state(job.spec, jax.random.key(0), job.dataset.train_batch(0), job.hypers)
    )
    checkpoints = Checkpoints(path / "checkpoints")
    checkpoints.save(2, state, config={}, nll=math.inf)
    checkpoints.close()
    run = load_run(path)
    mlp = run.params["layer_0"]["attention"]["controller"]["mlp"]
    noise = np.random.default_rng(0).normal(size=mlp["output"]["kernel"].shape)
    mlp["output"]["kernel"] = jnp.float32(noise)
    return run


PRICES = (-2.0, -0.3, 0.0, 0.2, 0.5, 8.0)


def test_one_model_at_six_prices_spends_less_and_less(trained):
    found = [trained.at(price=price).evaluate(mode="hard", max_batches=1) for price in PRICES]
    spent = [one["cost"] for one in found]
    assert spent == sorted(spent, reverse=True) and spent[0] == 1.0 and spent[-1] == pytest.approx(0.15)
    assert len({round(one, 6) for one in spent}) >= 4
    text = "k3=v1 k1=v2 c0 ?k1 k1=v2"
    plain = trained.at(price=PRICES[2]).routes(text, mode="hard")
    np.testing.assert_array_equal(plain.route, plain.mean.argmax(-1))  # 0 is the plain argmax.
    model, ids = trained.model.clone(mode="soft"), trained.encode(text)[None]
    apply = jax.jit(lambda route: model.apply(
        {"params": trained.params}, ids, hypers=trained.hypers.routing, route=route
    ))
    forced = apply(plain.route[:, None])
    assert_close(trained.at(price=PRICES[2]).logits(text, mode="hard"), forced.logits[0])


def test_packed_dense_and_stepwise_agree_at_each_price(trained):
    tokens = np.random.default_rng(1).integers(trained.tokenizer.vocab_size, size=(2, 24))

    def program(form):
        model = trained.model.clone(mode="hard", dispatch=form)

        @jax.jit
        def run(tokens, routing):
            out = model.apply({"params": trained.params}, tokens, hypers=routing)
            return out.logits, out.routing.route

        return run

    dense, packed = program("dense"), program("packed")
    seen = set()
    for price in PRICES:
        routing = trained.at(price=price).hypers.routing
        (logits, route), (packed_logits, packed_route) = dense(tokens, routing), packed(tokens, routing)
        np.testing.assert_array_equal(route, packed_route)
        assert_close(packed_logits, logits)
        trace = generate(
            trained.model, trained.params, [tokens[0, :8]], steps=6, hypers=routing, mode="hard",
            sampler=Sampler(temperature=4.0), keys=jax.random.split(jax.random.key(0), 1),
        )
        # In the shape of the others, so that it is their program; what stands behind it is not seen.
        whole = tokens.copy()
        whole[0, 8:14] = trace.tokens[0]
        route = np.asarray(dense(whole, routing)[1])[:, 0, :14]
        stepwise = np.concatenate([trace.prompt_route[:, 0], trace.route[:, 0]], axis=-1)
        np.testing.assert_array_equal(stepwise, route)
        seen.add(tuple(np.bincount(route.ravel(), minlength=3)))
    assert len(seen) >= 4, "tokens go elsewhere at other prices"


@pytest.mark.slow
def test_a_budget_is_kept_on_validation_stored_and_used(trained):
    plain = trained.evaluate(mode="hard")
    for budget, max_batches in (({"cost": 0.5 * (plain["cost"] + 0.15)}, None), ({"share": 0.3}, 4)):
        [(kind, value)] = budget.items()
        plain = trained.evaluate(mode="hard", max_batches=max_batches)
        with pytest.raises(ValueError, match=f"^{kind}: expected a budget found for the run"):
            trained.at_budget(**budget)
        fitted = trained.fit_budget(**budget, max_batches=max_batches)
        again = load_run(trained.path).at_budget(**budget)
        assert again.hypers.routing.price == fitted.hypers.routing.price
        assert trained.mode == "soft" and again.mode == fitted.mode == "hard", "what was promised is what is run"
        assert load_run(trained.path).at_budget(**{kind: np.float32(value)}).mode == "hard"
        with pytest.raises(ValueError, match=f"^{kind}: expected a budget found for the run .*, length 16; found"):
            load_run(trained.path, sequence_length=16).at_budget(**budget)
        found = fitted.evaluate(mode="hard", max_batches=max_batches)
        metric = found[budgets.KINDS[kind]]
        assert 0.8 * value < metric <= value
        assert (fitted.hypers.routing.price > 0) == (value < plain[budgets.KINDS[kind]])
    assert len(budgets.read_budgets(trained.path)) == 2
    trained.fit_budget(**budget, max_batches=max_batches)
    assert len(budgets.read_budgets(trained.path)) == 2, "found again, it is not stored twice"


@pytest.mark.parametrize("given, message", [
    ({"cost": 0.1}, r"cost: expected a budget in \[0.15 \(the cheapest mechanism's\), 1\], got 0.1"),
    ({"cost": 1.1}, "cost: expected a budget in "),
    ({"share": -0.1}, "share: expected a budget in "),
    ({"cost": float("nan")}, "cost: expected a budget in "),
    ({}, "budget: expected a cost or a share, got none"),
    ({"cost": 0.3, "share": 0.3}, "budget: expected a cost or a share, got "),
])
def test_a_budget_that_cannot_be_is_one_sentence(trained, given, message):
    with pytest.raises(ValueError, match="^" + message):
        trained.fit_budget(**given)


@pytest.mark.parametrize("price", [float("nan"), float("inf"), 1e39, "much"])
def test_a_price_that_is_no_number_is_one_sentence(trained, price):
    with pytest.raises(ValueError, match="^price: expected a"):
        trained.at(price=price)


def test_a_damaged_file_of_budgets_is_one_sentence(tmp_path):
    (tmp_path / budgets.FILE).write_text('{"budgets": [{"kind": "cost"}]}')
    with pytest.raises(ValueError, match="^workdir: expected budgets in "):
        budgets.read_budgets(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_the_price_is_found_of_any_falling_curve(seed):
    rng = np.random.default_rng(seed)
    mean = rng.dirichlet(np.ones(3), 500)
    costs = np.array(COSTS)

    def spent(price):
        return costs[np.argmax(mean - price * costs, -1)].mean()

    budget = rng.uniform(0.15, 1.0)
    price = budgets.find_price(spent, budget, costs)
    assert spent(price) <= budget and (price < -1 or spent(price - 1e-3) > budget - 0.01)


def test_a_budget_of_the_cheapest_mechanism_can_be_kept_and_one_of_share_needs_full_to_cost_most():
    costs = jnp.float32(COSTS)  # 0.15 is a little more there.
    assert budgets.check_budget(0.15, None, costs, ("full", "linear", "local")) == ("cost", 0.15)
    with pytest.raises(ValueError, match="^share: expected full attention to cost most, got 0.3"):
        budgets.check_budget(None, 0.2, costs, ("linear", "local", "full"))
    with pytest.raises(ValueError, match="^share: expected full attention among the mechanisms"):
        budgets.check_budget(None, 0.2, costs[:2], ("linear", "local"))


def test_another_price_compiles_nothing(trained):
    prompt, compiled = np.arange(8), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def ask(price):
        run = trained.at(price=price)
        run.evaluate(mode="hard", max_batches=1)
        run.logits(prompt, mode="hard")
        run.generate(prompt, steps=6, mode="hard")

    trained.evaluate(mode="hard", max_batches=1)
    ask(0.1)
    assert compiled, "the first one is heard"
    compiled.clear()
    ask(0.7)
    assert not compiled


@functools.cache
def gated_with_fallback():
    """(theta -> (dense, routing, packed), one program for any theta)."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, 40, 8)))
    fields = dict(num_heads=2, window=4, mode="gated", fallback="full")
    layers = {form: making.layer(dispatch=form, **fields) for form in ("dense", "packed")}
    params = making.initial(layers["dense"], x)["params"]
    kernel = params["controller"]["mlp"]["output"]["kernel"]
    params["controller"]["mlp"]["output"]["kernel"] = jnp.float32(rng.normal(size=kernel.shape))

    @jax.jit
    def run(theta):
        at = hypers(strength=2.0, preference=0.1, threshold=theta)
        (dense, routing, _), (packed, _, _) = (
            layer.apply({"params": params}, x, hypers=at, method="routed") for layer in layers.values()
        )
        return dense, routing, packed

    return lambda theta: run(np.float32(theta))


@pytest.mark.parametrize("theta", [0.0, 0.9])
def test_gated_with_the_fallback_packs_and_is_dense(theta):
    dense, routing, packed = gated_with_fallback()(theta)
    assert_close(packed, dense)
    certain = np.asarray(routing.uncertainty) <= theta
    np.testing.assert_array_equal(routing.route, np.where(certain, np.argmax(routing.mean, -1), 0))
    assert np.all(routing.hard) and (0 < certain.mean() < 1 if theta else not certain.any())


def test_a_fixed_layer_has_no_decision_that_a_price_or_a_fallback_could_change():
    x = jnp.float32(np.random.default_rng(0).normal(size=(1, 6, 8)))
    layer = making.layer(num_heads=2, window=4, mode="gated", fallback="full", controller="fixed",
                         fixed=("local",))

    @jax.jit
    def route(key):
        at = hypers(threshold=jnp.float32(0.0), price=jnp.float32(9.0))
        return layer.init_with_output(key, x, hypers=at, method="routed")[0][1].route

    assert np.all(np.asarray(route(jax.random.key(0))) == 2)


def test_settled_waits_for_their_entropy():
    """What the gate averages is the mean of H[Dir(alpha)] + log Gamma(K), in nats."""
    config = smoke.get_config()
    config.update_from_flattened_dict({
        "model.num_layers": 1, "gate.kind": "settled", "controller.uncertainty": "dirichlet_entropy",
    })
    dataset = build.build_dataset(config)
    spec, at, batch = build.build_spec(config, dataset), build.build_hypers(config), dataset.train_batch(0)

    @jax.jit
    def measured(key):
        """What is asked of a step alone: no gradient is compiled."""
        state, metrics = train_step(spec, init_state(spec, key, batch, at), batch, at)
        return state.gate.average, metrics["sums"].uncertainty.mean() / metrics["sums"].tokens

    average, uncertainty = measured(jax.random.key(0))
    prior = make_prior("cost_aware", at.routing).concentration
    expected = stats.dirichlet.entropy(np.float64(prior)) + special.gammaln(3)  # q = p at the start.
    assert float(average) == pytest.approx(expected, abs=1e-4) and expected < -1
    assert float(uncertainty) == pytest.approx(np.exp(expected), rel=1e-3)
