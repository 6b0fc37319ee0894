"""Costs: values, scale and refusals; FLOPs against the traced program and XLA's own count."""

from __future__ import annotations

import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax import AttentionSpec, RoutingHypers
from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.cost import analytic_costs, count_flops, nominal_costs, resolve_costs
from meta_attention_jax.mechanisms import full, registry
from meta_attention_jax.mechanisms.projections import Projections
from meta_attention_jax.training.build import build_flops
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import describe
from meta_attention_jax.types import Router
from tests import making, oracles

NAMES = ("full", "linear", "local")
SPEC = AttentionSpec(window=128)
SHAPE = dict(time=1024, dim=64, spec=SPEC)
REST = 0.03
"""XLA counts softmax, norms and activations too: at these sizes at most this share more."""


def dots(jaxpr):
    """2 per multiply-add of every dot_general in a traced program, loops refused."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name not in ("scan", "while"), "a loop's body is traced once"
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contracted], dtype=np.int64)
            total += 2 * inner * np.prod(eqn.outvars[0].aval.shape, dtype=np.int64)
        total += sum(dots(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
    return total


def hold(function, *args, expected):
    """`expected` FLOPs are the program's products exactly, and XLA's count but for the rest."""
    assert dots(jax.make_jaxpr(function)(*args).jaxpr) == expected
    counted = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert expected <= counted <= (1 + REST) * expected


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def hypers():
    return RoutingHypers(
        strength=jnp.float32(2.0),
        preference=jnp.float32(0.3),
        costs=jnp.array([1.0, 0.15, 0.3]),
        threshold=jnp.float32(0.0),
    )


def counted(**fields):
    sizes = dict(
        vocab_size=512, model_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=384,
        window=16, hidden=48,
    )
    call = dict(time=64, controller_outputs=4)
    call |= {name: fields.pop(name) for name in list(call) if name in fields}
    return count_flops(making.config(**{**sizes, **fields}), **call)


@pytest.mark.smoke
@pytest.mark.parametrize("names", list(itertools.permutations(NAMES)))
def test_nominal_costs_are_the_papers_on_the_given_axis(names):
    paper = {"full": 1.0, "linear": 0.15, "local": 0.30}
    np.testing.assert_allclose(nominal_costs(names), [paper[name] for name in names], rtol=1e-6)


def test_nominal_costs_without_full_are_scaled_to_the_dearest():
    np.testing.assert_allclose(nominal_costs(("linear", "local")), [0.5, 1.0], rtol=1e-6)


def test_analytic_costs_are_ratios_of_flops():
    full_, linear, local = 1024 * 1025 / 2, 1024 * 64 + 1024 / 2, 128 * 1024 - 128 * 127 / 2
    costs = analytic_costs(NAMES, **SHAPE)
    np.testing.assert_allclose(costs, np.array([full_, linear, local]) / full_, rtol=1e-6)
    both = analytic_costs(NAMES, time=1024, dim=64, spec=AttentionSpec(causal=False, window=128))
    np.testing.assert_allclose(both[1], (1024 * 64 + 512) / 1024**2, rtol=1e-6)
    assert both[1] < costs[1]


def test_analytic_costs_make_linear_the_dearest_of_a_short_sequence():
    costs = analytic_costs(("local", "full", "linear"), time=16, dim=64, spec=AttentionSpec(window=4))
    assert costs[2] == 1.0 and costs[0] < costs[1] < 1.0


@pytest.mark.smoke
@pytest.mark.parametrize("costs", ["nominal", "analytic", (2.0, 1.0, 8.0), [3, 3, 3]])
def test_the_largest_cost_is_one_exactly(costs):
    resolved = resolve_costs(costs, NAMES, **SHAPE)
    assert resolved.dtype == np.float32 and resolved.shape == (3,)
    assert resolved.max() == 1.0 and (resolved > 0).all()


def test_numbers_keep_their_ratios():
    np.testing.assert_array_equal(resolve_costs((2, 1, 8), NAMES, **SHAPE), [0.25, 0.125, 1.0])


@pytest.mark.parametrize(
    "costs, names, sentence",
    [
        ("cheap", NAMES, r"^costs: expected one of .*'nominal', 'analytic'.* got 'cheap'\.$"),
        ((1.0, 0.5), NAMES, r"^costs: expected 3 positive numbers, .* got \(1.0, 0.5\)\.$"),
        (1.0, NAMES, r"^costs: expected 3 positive numbers, .* got 1.0\.$"),
        ((1.0, 0.0, 0.5), NAMES, r"^costs: expected 3 positive numbers, .* got \(1.0, 0.0, 0.5\)"),
        ((1.0, -0.1, 0.5), NAMES, "^costs: expected 3 positive numbers"),
        ((1.0, float("nan"), 0.5), NAMES, "^costs: expected 3 positive numbers"),
        ((1.0, float("inf"), 0.5), NAMES, "^costs: expected 3 positive numbers"),
        ("nominal", ("full", "mine"), "^mechanism: expected one of .* got 'mine'"),
        ("analytic", ("full", "lokal"), r"got 'lokal'; did you mean 'local'\?$"),
    ],
)
def test_a_bad_cost_is_one_sentence(costs, names, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        resolve_costs(costs, names, **SHAPE)
    assert "\n" not in str(error.value)


def test_a_custom_mechanism_has_analytic_costs_and_numbers_but_no_nominal_one(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    flops = lambda time, dim, spec: 2.0 * time  # noqa: E731
    registry.register_mechanism("mine", registry.Mechanism(full.attend, flops))
    with pytest.raises(ValueError, match="costs: expected numbers"):
        resolve_costs("nominal", ("full", "mine"), **SHAPE)
    np.testing.assert_array_equal(resolve_costs((4, 1), ("full", "mine"), **SHAPE), [1.0, 0.25])
    costs = resolve_costs("analytic", ("full", "mine"), **SHAPE)
    np.testing.assert_allclose(costs, [1.0, 1.0 / (64 * 1025)], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 1, 4, 20])
@pytest.mark.parametrize("window", [1, 5, 11, 30])
def test_softmax_flops_count_the_allowed_pairs(window, sinks, causal):
    time, dim = 11, 6
    ids = np.ones((1, time), np.int32)
    for name, width, first in (("full", None, 0), ("local", window, sinks)):
        pairs = oracles.allowed_pairs(ids, causal=causal, window=width, sinks=first).sum()
        spec = AttentionSpec(causal=causal, window=window, sinks=sinks)
        flops = registry.get_mechanism(name).flops(time, dim, spec)
        assert flops == 4 * dim * pairs


def test_linear_flops_are_linear_in_time_and_blind_to_direction():
    of = registry.get_mechanism("linear").flops
    flops = lambda time, causal=True: of(time, 8, AttentionSpec(causal=causal))  # noqa: E731
    assert flops(300) == 3 * flops(100) == 3 * flops(100, False)
    assert flops(1) == 2 * 8 * 8 + 2 * 8 * 8 + 2 * 8


@pytest.mark.smoke
def test_projections_are_those_of_the_program():
    model, heads, kv_heads, dim, tokens = 128, 4, 2, 32, 2 * 64
    module = Projections(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, features=model)
    x = abstract(2, 64, model)
    params = jax.eval_shape(module.init, jax.random.key(0), x)

    def forward(params, x):
        q, k, v = module.apply(params, x, method="project")
        return q, k, v, module.apply(params, q, method="merge")

    hold(forward, params, x, expected=tokens * counted(num_layers=1).projections)


def test_full_attention_is_the_square_of_the_program():
    """Bidirectional: causal attention needs half of what the square computes."""
    batch, time, heads, dim = 2, 64, 3, 128
    q = abstract(batch, time, heads, dim)
    both = AttentionSpec(causal=False, implementation="xla")
    per_head = registry.get_mechanism("full").flops(time, dim, both)
    forward = lambda q, k, v: full.attend(q, k, v, spec=both)  # noqa: E731
    hold(forward, q, q, q, expected=batch * heads * per_head)
    causal = registry.get_mechanism("full").flops(time, dim, AttentionSpec())
    assert causal == per_head * (time + 1) / (2 * time)


@pytest.mark.parametrize("scale", [{}, dict(mlp_dim=96, vocab_size=64, num_layers=2)])
def test_a_whole_model_is_that_of_the_program(scale):
    """Full attention only, which is loop-free; the program computes all T x T pairs."""
    sizes = dict(vocab_size=512, model_dim=256, num_layers=1, num_heads=2, num_kv_heads=1,
                 mlp_dim=512) | scale
    batch, time = 2, 64
    model = making.model(**sizes, controller="fixed", implementation="xla", window=16)
    tokens = abstract(batch, time, dtype=jnp.int32)
    run = lambda params, tokens: model.apply(params, tokens, hypers=hypers()).logits  # noqa: E731
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, hypers=hypers()), tokens)
    flops = counted(**sizes, time=time, controller_outputs=0)
    assert flops.controller == 0.0
    square = flops.mechanisms["full"] * 2 * time / (time + 1)
    hold(run, params, tokens, expected=round(batch * time * (flops.trunk + square)))


@pytest.mark.parametrize(
    "changes", [{}, {"controller.posterior": "additive"}, {"controller.name": "softmax"}]
)
def test_the_controller_is_that_of_the_program(changes):
    config = smoke.get_config()
    config.update_from_flattened_dict({"model.model_dim": 512, "controller.hidden": 256} | changes)
    flops = build_flops(config, vocab_size=10)
    module = make_controller(Router(
        controller=config.controller.name, hidden=256, posterior=config.controller.posterior
    ))
    x, ids = abstract(2, 16, 512), jnp.ones((2, 16), jnp.int32)
    call = dict(positions=ids, segment_ids=ids, hypers=hypers())
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, residual=x, **call), x)

    def forward(params, x):
        return module.apply(params, x, residual=x, **call).mean

    hold(forward, params, x, expected=2 * 16 * flops.controller / config.model.num_layers)


@pytest.mark.smoke
def test_one_hot_routes_pay_for_one_mechanism_and_dense_for_all():
    flops = counted()
    parts = (flops.projections, flops.mlp, flops.logits, flops.controller)
    assert min(parts) > 0 and flops.trunk == sum(parts)
    for name in NAMES:
        one_hot = {other: float(other == name) for other in NAMES}
        assert flops.routed(one_hot) == flops.trunk + flops.mechanisms[name]
        assert flops.routed(one_hot) < flops.dense
    assert flops.dense == pytest.approx(flops.trunk + sum(flops.mechanisms[n] for n in NAMES))
    mixed = flops.routed({"full": 0.25, "linear": 0.5, "local": 0.25})
    ends = {name: flops.routed({name: 1.0}) for name in NAMES}
    assert mixed == pytest.approx(0.25 * ends["full"] + 0.5 * ends["linear"] + 0.25 * ends["local"])
    assert flops.controller_share == flops.controller / flops.dense


def test_layers_multiply_everything_but_the_logits():
    one, three = counted(num_layers=1), counted(num_layers=3)
    assert three.logits == one.logits
    assert three.dense - three.logits == pytest.approx(3 * (one.dense - one.logits))


def test_layers_that_are_windows_by_nature_are_local_and_no_route_saves_them():
    model = counted(windows=(None, 5, None), sinks=2)
    routed, plain = counted(num_layers=2, sinks=2), counted(sinks=2)
    assert model.mechanisms == routed.mechanisms and model.controller == routed.controller
    assert (model.projections, model.mlp) == (plain.projections, plain.mlp) and plain.windows == 0.0
    pairs = oracles.allowed_pairs(np.ones((1, 64), np.int32), causal=True, window=5).sum()
    assert model.windows == 4 * 4 * 32 * pairs / 64
    assert model.trunk == model.projections + model.mlp + model.logits + model.controller + model.windows


def test_a_windows_flops_per_token_stop_growing_and_full_attentions_do_not():
    short, long = counted(time=512).mechanisms, counted(time=4096).mechanisms
    assert long["linear"] == short["linear"]
    assert 1.0 < long["local"] / short["local"] < 1.02
    assert long["full"] / short["full"] == pytest.approx(4097 / 513)


@pytest.mark.parametrize("pattern", [("full",), ("local", "full"), ("local", "local", "full")])
def test_a_fixed_model_reports_the_flops_of_what_it_runs(tmp_path, pattern):
    config = smoke.get_config()
    config.update_from_flattened_dict(
        {"controller.name": "fixed", "controller.fixed": pattern, "model.num_layers": 3}
    )
    job = prepare(config, tmp_path / "run")
    flops = build_flops(config, job.dataset.vocab_size)
    layers = [flops.mechanisms[(pattern * 3)[i]] / 3 for i in range(3)]
    about = describe(job, {"x": np.zeros(1)})
    assert flops.controller == about["controller_flop_share"] == 0.0
    assert about["flops_per_token"] == pytest.approx(flops.trunk + sum(layers))
