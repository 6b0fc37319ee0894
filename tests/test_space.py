"""The algebra of sweeps, names of points, and what is concluded from them."""

import json

import pytest

from configs import smoke, sweep_concentration, sweep_concentration_sotu
from experiments.studies import outcome
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.space import chain, log_spaced, point, product, sweep, zipped
from meta_attention_jax.training import build


def test_product_zip_and_chain():
    a, b = sweep("x.a", (1, 2)), sweep("b", ("p", "q"))
    assert product(a, b) == [
        {"x.a": 1, "b": "p"}, {"x.a": 1, "b": "q"}, {"x.a": 2, "b": "p"}, {"x.a": 2, "b": "q"},
    ]
    assert zipped(a, b) == [{"x.a": 1, "b": "p"}, {"x.a": 2, "b": "q"}]
    assert chain(a, point(name="z")) == [{"x.a": 1}, {"x.a": 2}, {"name": "z"}]
    assert product(a) == a and product() == [{}]


def test_log_spaced_has_a_constant_ratio_and_both_ends():
    values = log_spaced(0.5, 32.0, 7)
    assert values == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: product(sweep("a", (1,)), sweep("a", (2,))), "distinct fields, got 'a' twice"),
        (lambda: zipped(sweep("a", (1, 2)), sweep("b", (1,))), "of one length, got lengths"),
        (lambda: log_spaced(0.0, 1.0, 3), "ends > 0"),
        (lambda: log_spaced(1.0, 2.0, 1), "at least 2"),
        (lambda: algebra.labels([]), "at least one point"),
        (lambda: algebra.labels(sweep("a", (1, 1))), "points that differ"),
        (lambda: algebra.configured(smoke.get_config(), {"prior.strenght": 1.0}), "prior.strenght"),
        (lambda: algebra.configured(smoke.get_config(), {"train.steps": 1.5}), "train.steps"),
        (lambda: algebra.configured(smoke.get_config(), {"gate.threshold": None}), "got None"),
    ],
)
def test_mistakes_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_labels_say_what_varies_within_a_name():
    points = chain(
        product(sweep("prior.strength", (0.5, 2.0)), sweep("seed", (0, 1))),
        product(point(name="fixed one", **{"controller.fixed": ("local", "full")}), sweep("seed", (0, 1))),
        point(name="alone", **{"controller.name": "softmax"}),
    )
    assert algebra.labels(points) == [
        "strength=0.5,seed=0", "strength=0.5,seed=1", "strength=2,seed=0", "strength=2,seed=1",
        "fixed_one,seed=0", "fixed_one,seed=1", "alone",
    ]
    assert outcome.settings(points) == [
        "strength=0.5", "strength=0.5", "strength=2", "strength=2", "fixed_one", "fixed_one", "alone",
    ]
    clash = product(sweep("prior.threshold", (1, 2)), sweep("gate.threshold", (1, 2)))
    assert algebra.labels(clash)[0] == "prior.threshold=1,gate.threshold=1"


@pytest.mark.parametrize("before, after, kept", [
    (sweep("seed", (0,)), sweep("seed", (0, 1, 2)), ["point", "seed=1", "seed=2"]),
    ([{}], sweep("seed", (0, 1)), ["point", "seed=1"]),  # Seed 0 is the config's own.
    (algebra.product(sweep("prior.strength", (1.0, 2.0)), sweep("seed", (0,))),
     algebra.product(sweep("prior.strength", (1.0, 2.0)), sweep("seed", (0, 1))),
     ["strength=1", "strength=1,seed=1", "strength=2", "strength=2,seed=1"]),
    (sweep("seed", (0, 1)), algebra.product(sweep("prior.strength", (2.0, 1.0)), sweep("seed", (0, 1))),
     ["seed=0", "seed=1", "strength=1,seed=0", "strength=1,seed=1"]),  # 2 is the config's own.
    (sweep("controller.fixed", (("full",),)), sweep("controller.fixed", (("full",), ("local",))),
     ["point", "fixed=local"]),
])
def test_a_grown_sweep_keeps_the_labels_that_it_has(before, after, kept):
    config = smoke.get_config()
    assert config.prior.strength == 2.0 and config.seed == 0
    stored = json.loads(json.dumps(dict(zip(algebra.labels(before), before))))
    assert algebra.kept_labels(after, stored, config) == kept
    assert algebra.kept_labels(after, {}, config) == algebra.labels(after)
    # And once more, from what is stored then.
    stored = json.loads(json.dumps(dict(zip(kept, after))))
    assert algebra.kept_labels(after, stored, config) == kept


def test_points_share_the_order_of_the_data_and_only_array_inputs_share_a_program():
    base = smoke.get_config()
    base.seed = 7
    same = [
        {"seed": 1}, {"prior.strength": 3.0}, {"prior.costs": "1,0.2,0.4"}, {"gate.start": 0.1},
        {"optimizer.learning_rate": 1e-4}, {"objective.beta": 0.5}, {"gate.threshold": 0.3},
        {"prior.preference": 0.3}, {"name": "another"},
    ]
    configs = [algebra.configured(base, one) for one in same]
    assert {build.data_seed(config) for config in configs} == {7}
    assert configs[0].seed == 1
    assert len({algebra.program(config) for config in configs}) == 1
    others = [{"model.window": 5}, {"controller.name": "softmax"}, {"train.steps": 31},
              {"gate.kind": "cosine"}, {"optimizer.weight_decay": 0.0}, {"data.seed": 3}]
    programs = {algebra.program(algebra.configured(base, one)) for one in [*others, {}]}
    assert len(programs) == len(others) + 1 and None not in programs
    alone = [{"prior.costs": "measured"}, {"parallel.mode": "pmap"}, {"train.profile_step": 3}]
    assert {algebra.program(algebra.configured(base, one)) for one in alone} == {None}


@pytest.mark.parametrize("module", (sweep_concentration, sweep_concentration_sotu))
def test_the_recorded_sweeps_are_valid(module):
    points = module.get_sweep()
    configs = [algebra.configured(module.get_config(), one) for one in points]
    for config in configs:
        build.check(config)
    strengths = {p["prior.strength"] for p in points if "prior.strength" in p}
    assert len(strengths) >= 6 and len({p["seed"] for p in points}) >= 3
    assert len({algebra.program(config) for config in configs}) == 7


def made(setting, nll, cost, name=None, diverged=0):
    point_ = {"prior.strength": float(len(setting))} | ({"name": name} if name else {})
    return {"setting": setting, "point": point_, "seeds": 3, "diverged": diverged,
            "nll_hard": nll, "cost": cost}


def test_front_and_choice():
    lines = [
        made("a", 1.50, 0.2), made("bb", 1.40, 0.3), made("ccc", 1.404, 0.25), made("d", 1.41, 0.4),
        made("free", 1.3, 0.5, "free"), made("full", 1.3, 1.0, "full"),
        made("lost", 1.2, 0.1, diverged=1),
    ]
    assert outcome.front(lines[:-1]) == ["a", "ccc", "bb", "free"]
    assert outcome.chosen(lines) == "ccc"  # Within 0.005 of bb and cheaper; baselines are not chosen.
    assert outcome.swept(lines) == "prior.strength"
    assert outcome.chosen([made("x", 1.0, 1.0, "x")]) == "x"
    assert outcome.chosen([]) is None


def test_lines_average_seeds_and_count_those_that_diverged():
    row = dict(setting="a", point={"prior.strength": 1.0, "seed": 0}, nll_soft=1.0, gap=0.0,
               routing_entropy=0.5, usage_entropy=0.5, full=0.1, kl=0.1)
    found = [{**row, "nll_hard": 1.0, "cost": 0.2}, {**row, "nll_hard": 2.0, "cost": 0.4},
             {"setting": "a", "point": {"prior.strength": 1.0, "seed": 2}, "diverged": "step 3: ..."}]
    (line,) = outcome.lines(found)
    assert line["seeds"] == 2 and line["diverged"] == 1
    assert line["nll_hard"] == 1.5 and line["nll_hard_pm"] == pytest.approx(12.706 * 0.5, rel=1e-3)
