"""The comparison of arms: what is chosen, what is tabled, and that a run again says the same."""

from __future__ import annotations

import json
import math

import pytest

from configs import smoke
from experiments.studies import arms, comparison
from meta_attention_jax import analysis
from meta_attention_jax.controller.baselines import CONTROLLERS
from meta_attention_jax.training import build
from tests.test_commands import SMOKE, check_mistake, check_success, command  # noqa: F401


@pytest.mark.parametrize("arm", arms.DEFAULT)
def test_every_arm_is_a_config_that_builds(arm):
    config = arms.configured(smoke.get_config(), arm, **{"prior.strength": 3.0})
    build.check(config)
    model = build.build_model(config, 10).config.router
    if arm.endswith("@soft"):
        assert config.gate.kind == "none" and model.controller in CONTROLLERS
    elif arm in arms.NAMED:
        assert arms.NAMED[arm]["controller.name"] == model.controller
    else:
        assert model.controller == "fixed" and model.fixed == tuple(arm.split("+"))
    assert config.prior.strength == 3.0 and smoke.get_config().prior.strength == 2.0


def test_arms_cover_all_controllers_and_refuse_others():
    named = {own["controller.name"] for own in arms.NAMED.values()}
    assert named == set(CONTROLLERS)
    with pytest.raises(ValueError, match="arms: expected some of .* got 'local\\+fast'"):
        arms.overrides("local+fast")


def test_the_cheapest_of_those_as_good_as_the_best_is_chosen():
    def chosen(*tried):
        tried = [{"settings": i, "nll": nll, "cost": cost} for i, (nll, cost) in enumerate(tried)]
        return comparison.choose(tried)

    assert chosen((1.500, 0.5), (1.504, 0.3), (1.506, 0.1)) == 1
    assert chosen((1.501, 0.3), (1.500, 0.3)) == 1


def fake_row(arm, seed, nll, view="tokens", **more):
    return {"view": view, "arm": arm, "seed": seed, "nll_hard": nll, "nll_soft": nll, "cost": 0.3,
            "routing_entropy": 0.5, "usage_entropy": 0.5, **more}


def test_the_table_pairs_by_seed_and_keeps_the_order():
    rows = [fake_row("full-only", s, 2.0 + s, cost=1.0) for s in range(3)]
    truth = [{"auroc": 0.5, "precision": 0.1, "recall": 0.2},
             {"auroc": 0.9, "precision": 0.7, "recall": 0.8}]
    known = dict(information=[0.0, 0.4], truth=truth, truth_layer=1)
    rows += [fake_row("bayesian", s, 2.1 + s, **known) for s in range(3)]
    rows += [fake_row("full-only", 0, 1.9, view="flops", cost=1.0)]
    first, second, third = comparison.table(rows, ["bayesian", "full-only"])
    assert [first["arm"], second["arm"], third["view"]] == ["bayesian", "full-only", "flops"]
    assert first["nll_hard"] == pytest.approx(3.1) and first["nll_hard_pm"] > 1.0
    assert first["nll_hard_vs_full-only"] == pytest.approx(0.1)
    assert first["nll_hard_vs_full-only_pm"] == pytest.approx(0.0, abs=1e-9)
    assert first["cost_vs_full-only"] == pytest.approx(-0.7)
    assert first["information"] == pytest.approx(0.4)
    assert [first[name] for name in ("auroc", "precision", "recall")] == pytest.approx([0.9, 0.7, 0.8])
    assert "nll_hard_vs_full-only" not in second and math.isnan(third["nll_hard_pm"])


def test_views_are_not_mixed():
    """An arm without a run at equal FLOPs is not compared with its run at equal tokens."""
    rows = [fake_row("full-only", 0, 2.0), fake_row("local", 0, 2.5, view="flops")]
    assert "nll_hard_vs_full-only" not in comparison.table(rows, [])[1]
    half = analysis.with_interval({"x": 0.1, "x_pm": 0.02}, "x", "+.2f")
    assert half == "+0.10 ± 0.02"


def test_patterns_must_go_into_the_layers_and_soft_arms_have_no_gate():
    with pytest.raises(ValueError, match="arms: expected a pattern whose length divides the 2 layers"):
        arms.configured(smoke.get_config(), "local+local+full")
    config = arms.configured(smoke.get_config(), "bayesian@soft")
    assert config.gate.kind == "none" and config.controller.name == "bayesian"
    with pytest.raises(ValueError, match="arms: expected some of"):
        arms.overrides("full-only@soft")


@pytest.mark.parametrize("text", ["2/2", "²/3", "x", "1", "-1/2", "0/0"])
def test_shards_are_checked(text):
    assert comparison.parse_shard("1/3") == (1, 3)
    with pytest.raises(ValueError, match="shard: expected i/n"):
        comparison.parse_shard(text)


@pytest.mark.slow
def test_a_comparison_runs_resumes_and_repeats(command, tmp_path):  # noqa: F811
    """Two arms with different FLOPs, from the first command to the table; then the same again."""
    flags = (*SMOKE, "--arms=bayesian,linear", "--seeds=1", "--notune", "--test_batches=1",
             "--config.train.steps=8", "--config.train.eval_every=8",
             "--config.train.checkpoint_every=8")
    tables = []
    for folder in ("a", "b"):
        root = tmp_path / folder
        shown = check_success(command("ablation", f"--workdir={root}", *flags))
        tables.append((root / "rows.json").read_text())
        assert "bayesian" in shown and "linear" in shown
    assert tables[0] == tables[1], "the same numbers"
    rows = json.loads(tables[0])
    assert [(r["view"], r["arm"]) for r in rows] == [
        ("tokens", "bayesian"), ("tokens", "linear"), ("flops", "linear"), ("flops", "bayesian")
    ]
    assert rows[2]["steps"] > rows[1]["steps"] == rows[3]["steps"] == 8
    assert rows[0]["split"] == "test" and len(rows[0]["truth"]) == 1
    assert set(rows[0]["accuracy"]) == {"other", "recall"}
    assert rows[0]["elbo"] >= rows[0]["predictive_16"] > 0
    (tmp_path / "a" / "table.md").unlink()
    again = check_success(command("ablation", f"--workdir={tmp_path}/a", *flags))
    assert "finished at step" in again and (tmp_path / "a" / "table.md").exists()
    for more, sentence in (
        (["--arms=bayesian,fast"], "arms: expected some of"),
        (["--views=time"], "views: expected tokens or flops"),
        (["--shard=3/2"], "shard: expected i/n"),
        (["--arms="], "arms: expected distinct names, at least one, got []."),
        (["--arms=bayesian,bayesian"], "arms: expected distinct names"),
        (["--config.prior.costs=measured"], "prior.costs: expected costs that are the same"),
    ):
        check_mistake(command("ablation", f"--workdir={tmp_path}/c", *flags, *more), sentence)
    assert not (tmp_path / "c").exists()
    tuned = [flag for flag in flags if flag not in ("--notune", "--arms=bayesian,linear")]
    shown = check_success(command("ablation", f"--workdir={tmp_path}/d", *tuned, "--arms=linear"))
    choice = json.loads((tmp_path / "d" / "tune" / "linear" / "chosen.json").read_text())
    rate = smoke.get_config().optimizer.learning_rate
    tried = {r["settings"]["optimizer.learning_rate"]: r["nll"] for r in choice["tried"]}
    assert sorted(tried) == [rate / 2, rate, 2 * rate] and len(set(tried.values())) == 3
    best = choice["chosen"]["optimizer.learning_rate"]
    assert tried[best] == min(tried.values()), "of equal cost the better one"
    trained = json.loads((tmp_path / "d" / "runs" / "linear" / "seed0" / "config.json").read_text())
    assert trained["optimizer"]["learning_rate"] == best and trained["seed"] == 0
    check_mistake(
        command("ablation", f"--workdir={tmp_path}/a", *flags, "--config.prior.strength=9"),
        "config.prior.strength: expected 2.0, as in ",
    )
