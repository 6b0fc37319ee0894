"""The comparison on a published model: its readings are the model's, its training the package's, its windows what they
say."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.pretrained import (
    arms,
    doubt,
    end_to_end,
    local,
    patterns,
    plan,
    report,
    routers,
    scarce,
    study,
)
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import KINDS, Material, Window
from meta_attention_jax import LanguageModel, Router, pretrained
from meta_attention_jax.data.tokenizer import ByteTokenizer
from meta_attention_jax.objective import forward, layers_fit
from tests import making
from tests.close import assert_close
from tests.test_pretrained import FOLDER

WINDOW, SINKS, TIME = 4, 2, 14
COSTS = (1.0, 0.15)


def published(name, scan=False):
    config, params, _ = pretrained.load(FOLDER / name, scan_layers=scan)
    attention = dataclasses.replace(config.attention, window=WINDOW, sinks=SINKS)
    config = dataclasses.replace(config, attention=attention, router=Router(mechanisms=("full", "local"), hidden=8))
    return config, params


def window(config, seed=0):
    ids = np.random.default_rng(seed).integers(config.vocab_size, size=TIME + 1)
    return Window("prose", seed, 0, ids[:-1], ids[1:], np.arange(TIME) >= WINDOW)


# Of the families that there are, those that between them have everything that a layer can have.
@pytest.mark.parametrize("name", ["gemma3", "qwen2", *making.slow("qwen3", "gemma2")])
def test_a_reading_by_hand_is_the_model_s(name):
    config, params = published(name)
    one = window(config)
    reader = arms.Reader(LanguageModel(config), params, COSTS)
    full = np.random.default_rng(1).random((reader.layers, TIME)) < 0.5
    expected = reader.forced(one, full)
    heads = jnp.asarray(np.broadcast_to(full[:, None], (reader.layers, config.num_heads, TIME)))
    nll, guess, _ = arms._masked(config, params, one.tokens, one.targets, heads)
    assert_close(nll, expected.nll, 1e-5)
    other = reader.forced(one, ~full)
    assert np.linalg.norm(other.nll - expected.nll) > 1e-3 * np.linalg.norm(expected.nll)


@pytest.fixture(scope="module")
def smol():
    config, params = published("smollm2", scan=True)
    return arms.Reader(LanguageModel(config), params, COSTS)


def test_heads_of_all_queries_are_layers(smol):
    one = window(smol.model.config)
    heads = np.zeros((smol.layers, smol.model.config.num_heads), bool)
    heads[1] = True
    got, expected = smol.heads(one, heads), smol.forced(one, arms.layer_mask(smol.layers, [1], TIME))
    assert_close(got.nll, expected.nll, 1e-5)
    assert got.full.mean() == expected.full.mean() == 0.5


def test_the_oracle_s_reading_is_that_of_its_routes_and_all_or_nothing_at_the_ends(smol):
    one = window(smol.model.config)
    found = smol.oracle(one, float(np.median(smol.oracle(one, -1.0).z)))
    assert_close(found.nll, smol.forced(one, found.full).nll, 1e-5)
    assert 0.1 < found.full.mean() < 0.9
    assert smol.oracle(one, -1.0).full.all() and not smol.oracle(one, np.inf).full.any()
    # Up to the window and the sinks nothing can change.
    assert np.all(found.z[:, :WINDOW] < 1e-8)


def controllers(smol, controller, seed=0):
    point = Point("arm", controller, seed=seed)
    pool = local.collect(smol.model.config, smol.params, [window(smol.model.config)], say=lambda words: None)
    made = small(controller)
    params = local.fresh(made, seed, smol.layers, local.taken(pool, np.arange(1)), point.hypers(COSTS))
    rng = np.random.default_rng(seed)  # Such as have learned something.
    params = jax.tree.map(lambda leaf: leaf + jnp.float32(0.3 * rng.standard_normal(leaf.shape)), params)
    return point, pool, made, params


def small(controller):
    return local.make_controller(Router(mechanisms=("full", "local"), controller=controller, hidden=8))


@pytest.mark.parametrize("controller", ["cost_penalty", *making.slow("bayesian_mean")])
def test_the_local_loss_is_the_package_s(smol, controller):
    """The stage `local` of `experiments.retrofit`, in full attention's stream, without a sample."""
    point, pool, made, params = controllers(smol, controller)
    model = smol.model.routed_by(controller=controller).clone(by_layer=True, dispatch="dense")
    batch, hypers = window(smol.model.config).batch(), point.hypers(COSTS)
    tokens = local.taken(pool, np.arange(TIME))  # Full attention's stream comes first.

    @jax.jit
    def both(params):
        merged = local_merge(smol.params, params)
        output = forward(model, merged, batch, hypers, keys=jax.random.split(jax.random.key(0), 1))
        fit = layers_fit(output.routing, batch.loss_mask, local.TOLERANCE)
        mine = local.loss(made, params, tokens, hypers, 0.3, jax.random.key(1))
        return (fit + 0.3 * output.routing.penalty.sum()) / TIME, mine

    expected, got = both(params)
    assert_close(got, expected, 2e-3)  # h is kept in half precision.


def local_merge(params, own):
    attention = {**params["layers"]["attention"], "controller": own}
    return {**params, "layers": {**params["layers"], "attention": attention}}


@pytest.mark.parametrize("name, scan", [("smollm2", True), ("gemma3", False)])
def test_a_score_above_the_price_is_the_hard_decision(name, scan):
    config, published_params = published(name, scan=scan)
    smol = arms.Reader(LanguageModel(config), published_params, COSTS)
    point, pool, made, params = controllers(smol, "bayesian")
    one = window(smol.model.config)
    assert_close(arms.gathered(config, arms.placed(config, params)), params, 0.0)
    for price in (-0.2, 0.0, 0.3):
        read = smol.routed(one, "bayesian", params, point.hypers(COSTS, price=price))
        clear = np.abs(read.z - price) > 1e-5
        np.testing.assert_array_equal((read.z > price)[clear], read.full[clear])
        assert_close(read.nll, smol.forced(one, read.full).nll, 1e-5)
    z, mean = local.scores(made, params, local.chunks(pool.of([0])), point, COSTS)
    assert z.shape == mean.shape == (smol.layers, 2 * TIME)  # Two streams.
    read = smol.routed(one, "bayesian", params, point.hypers(COSTS, price=-9.0))  # Full attention's stream.
    assert_close(mean[:, :TIME], read.mean[..., 0], 1e-3)


@pytest.mark.parametrize("controller", ["bayesian", *making.slow("softmax")])
def test_training_points_together_is_training_each_and_leaves_less_harm(smol, controller):
    pool = local.collect(
        smol.model.config, smol.params, [window(smol.model.config, i) for i in range(3)], say=lambda words: None
    )
    points = [Point("a", controller, seed=0, beta=0.01, learning_rate=3e-3),
              Point("a", controller, seed=1, beta=0.1, learning_rate=1e-3)]
    quiet = dict(costs=COSTS, steps=30, hidden=8, say=lambda words: None)
    pools = {"mixture": pool}
    together = local.train(points, pools, **quiet)
    assert_close(local.train(points[1:], pools, **quiet)[0], together[1], 1e-3)
    z, _ = local.scores(small(controller), together[0], local.chunks(pool, 8), points[0], COSTS)
    rng = np.random.default_rng(0)
    assert local.left(z, pool.harm, 0.3) < local.left(rng.random(z.shape), pool.harm, 0.3)
    assert local.left(pool.harm, pool.harm, 0.3) < local.left(z, pool.harm, 0.3) < 1


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        (folder / split).mkdir()
        for number in range(4):
            words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(400)]
            (folder / split / f"{number}.txt").write_text(f"{split} {number}. " + " ".join(words))
    own = {"sotu": f"path:{folder}", "stdlib": f"path:{folder}"}
    return Material(ByteTokenizer(), length=512, window=16, corpora=own)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lookup16"])
def test_windows_are_what_they_say(material, kind):
    first, *rest = material.windows(kind, "test", 9)
    again = material.windows(kind, "test", 1, skip=3)[0]
    np.testing.assert_array_equal(rest[2].tokens, again.tokens)
    assert {w.document for w in (first, *rest)} == {0, 1, 2, 3}  # Documents take turns.
    for one in (first, *rest):
        np.testing.assert_array_equal(one.tokens[1:], one.targets[:-1])
        counted = np.flatnonzero(one.counted)
        text = bytes(one.targets.astype(np.uint8))
        if kind == "repeat":
            period = next(p for p in range(32, 257) if (one.tokens[p:] == one.tokens[:-p]).all())
            assert (one.targets[counted] == one.tokens[counted + 1 - period]).all()
        elif kind.startswith("lookup"):
            asked = text[: counted[0]].rsplit(b"code word of ", 1)[1]
            assert b"code word of " + asked + text[counted[0] :] in text[: counted[0] - 16]
        else:
            assert counted[0] == 16 and len(counted) == 496
    with pytest.raises(ValueError, match="^kind: expected one of prose, .*, got 'poem'"):
        material.windows("poem", "test", 1)


def test_a_mixture_has_the_shares_it_should(material):
    with pytest.raises(ValueError, match="^sequence_length: expected at least"):  # 16 needles in 512 bytes.
        material.mixture("train", 15)
    kinds = [one.kind for one in material.mixture("train", 10)]
    assert [kinds.count(k) for k in ("prose", "repeat", "lookup1", "lookup4")] == [4, 4, 1, 1]


def test_a_threshold_keeps_the_share_over_kinds_in_equal_parts():
    rng = np.random.default_rng(0)
    kinds = ["prose"] * 3 + ["repeat"]
    z = [rng.random((5, 200)) + 0.3 * (kind == "repeat") for kind in kinds]
    windows = [Window(kind, i, 0, *[np.zeros(200, int)] * 2, np.ones(200, bool)) for i, kind in enumerate(kinds)]
    read = lambda w, at: arms.Read(None, None, z[w.number] > at, z[w.number])  # noqa: E731
    found, _ = arms.threshold_at(0.3, windows, read, 0.0)
    shares = [(z[i] > found).mean() for i in range(4)]
    assert abs((np.mean(shares[:3]) + shares[3]) / 2 - 0.3) < 2e-3 and shares[3] > max(shares[:3])


def test_disorder_keeps_what_it_should():
    rng = np.random.default_rng(0)
    full = rng.random((4, 1000)) < np.array([0.0, 0.1, 0.5, 1.0])[:, None]
    full[1, :50] = True
    shuffled, drawn = (arms.disordered(full, rng, how, 50) for how in ("shuffled", "random"))
    assert (shuffled[:, :50] == full[:, :50]).all() and (drawn[:, :50] == full[:, :50]).all()
    np.testing.assert_array_equal(shuffled.sum(1), full.sum(1))
    assert np.abs(drawn.mean(1) - full.mean(1)).max() < 0.05 and (drawn != full).any()
    assert arms.spread(30, 0.2) == [2, 7, 12, 17, 22, 27] and arms.spread(30, 0.5)[:3] == [1, 3, 5]


def test_tables_are_means_over_training_text():
    tokens = np.array([3, 1, 3, 0])
    pool = local.Pool(None, None, np.array([[1.0, 2.0, 3.0, 6.0]]), np.array([0, 1, 0, 1]), None)
    np.testing.assert_allclose(arms.token_table(pool, tokens, 5), [[18 / 5, 14 / 5, 3, 16 / 6, 3]])  # 3, four times.
    np.testing.assert_allclose(arms.place_table(pool), [[2, 4]])


def test_every_arm_is_tuned_by_as_many_settings():
    settings = {}
    for point in plan.grid():
        settings.setdefault(point.arm, set()).add(json.dumps(plan.setting(point)))
    assert set(settings) == set(plan.ARMS) and {len(own) for own in settings.values()} == {4}
    assert len(plan.grid()) == 60


def test_seeds_that_take_turns_meet_every_document(material):
    seen = {}
    for one in material.windows("prose", "test", 12):
        seen.setdefault(one.document, set()).add(one.turn(3))
    assert len(seen) == 4 and all(turns == {0, 1, 2} for turns in seen.values())


@pytest.mark.slow
def test_the_whole_study_of_a_small_model_goes_on_and_reads_nothing_twice(tmp_path, monkeypatch):
    folder, rng = tmp_path / "text", np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        for number in range(3):
            words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(200)]
            (folder / split / f"{number}.txt").write_text(f"{split} {number}. " + " ".join(words))
    making.published(tmp_path / "model", context=768)
    for name, value in {
        "LOCAL_STEPS": 6, "TRAINING_WINDOWS": 5, "VALIDATION_WINDOWS": 5, "ARMS": ("bayesian",),
        "END_TO_END": {"bayesian": (0.003,)},
        "END_TO_END_STEPS": 4, "EVERY": 4, "CHOOSING_WINDOWS": 1, "SEEDS": (0, 1),
    }.items():
        monkeypatch.setattr(plan, name, value)
    for name, value in {"SIZES": (1, 5), "STRENGTHS": (2.0,), "READ_WINDOWS": 1, "READ": ("bayesian",)}.items():
        monkeypatch.setattr(scarce, name, value)
    whole = plan.grid
    monkeypatch.setattr(plan, "grid", lambda: [p for p in whole() if p.strength == 2 and p.beta == 0.1])
    config = plan.config(str(tmp_path / "model"))
    config.data.corpus, config.data.tasks, config.data.shares = f"path:{folder}", ("prose", "repeat"), (0.5, 0.5)
    config.data.sequence_length, config.controller.hidden = 768, 8
    config.model.window, config.model.sinks = 8, 2
    config.parallel.devices = 1

    def begun(minutes):
        own = {"sotu": f"path:{folder}", "stdlib": f"path:{folder}"}
        return study.Study(config, tmp_path / "out", tmp_path / "runs", minutes, own)

    parts = [routers.read_bounds, *(part.read_all for part in (routers, patterns, end_to_end, doubt, scarce))]
    with pytest.raises(study.OutOfTime):
        end_to_end.read_all(begun(0.0), 2)
    for part in parts:
        part(begun(60.0), 2)
    rows = study.read_rows(tmp_path / "out" / "rows.jsonl")
    by = {study.key_of(row): row for row in rows}
    assert len(by) == len(rows)
    for kind, number in (("prose", 0), ("repeat", 1)):
        assert by[kind, number, "full", -1]["share"] == 1 and by[kind, number, "local", -1]["share"] == 0
        for seed in plan.SEEDS:
            assert abs(by[kind, number, "bayesian@0.3", seed]["share"] - 0.3) < 0.2
        routes, disorder = (by[kind, number, f"bayesian{how}@0.3", number] for how in ("", " shuffled"))
        assert routes["share"] == disorder["share"] and routes["nll"] != disorder["nll"]
        assert routes["layers"] == disorder["layers"] and routes["keys"] != disorder["keys"]
    assert {"full", "best layers@0.3", "bayesian@0.3"} <= {row["arm"] for row in rows if row["kind"] == "lookup4"}
    assert not any(row["kind"] == "lookup4" and row["arm"] == "position@0.3" for row in rows)
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert {"doubt local bayesian", "doubt bayesian", "calibration", "scarce 5 1", "scarce prose 0"} <= found.keys()
    report.write(tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert all(f"## {title}" in page for title in ("Arms", "Uncertainty", "Calibration", "Scarce data", "Steps"))
    assert len(list((tmp_path / "out" / "routers").iterdir())) == len(plan.SEEDS)
    runs = tmp_path / "runs" / "end_to_end"
    shutil.rmtree(runs)
    for part in parts:  # Nothing is read, nor trained, nor chosen again; runs of hours not even where they are gone.
        part(begun(1.0), 2)
    assert study.read_rows(tmp_path / "out" / "rows.jsonl") == rows and not runs.exists()
    before = routers.routers(begun(1.0))["bayesian", 1, 0.3]
    routers.file_of(tmp_path / "runs", before.point).unlink()
    again = routers.routers(begun(1.0))["bayesian", 1, 0.3]
    assert again.point == before.point
    assert_close(again.tree, before.tree, 1e-4)


def test_what_finds_the_harm_gains_and_what_knows_nothing_does_not():
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(12):
        harm = np.maximum(rng.normal(size=300), 0)
        parts.append(({"knows": harm, "guesses": rng.random(300)}, {"full": harm}))
    found = {row["measure"]: row for row in doubt.gains(parts, [i % 4 for i in range(12)], draws=50)}
    assert found["knows"]["gain"] == pytest.approx(1.0) and found["knows"]["low"] > 0.99
    assert found["guesses"]["low"] < 0.05 and abs(found["guesses"]["gain"]) < 0.1


@pytest.mark.parametrize("measure", ["vacuity", "mutual_information"])
def test_caution_leaves_what_the_price_has_sent_and_ranks_the_rest_by_doubt(measure):
    rng = np.random.default_rng(0)
    alpha = rng.gamma(2.0, size=(3, 50, 2)) + 0.1
    mean = alpha / alpha.sum(-1, keepdims=True)
    read = arms.Read(None, None, None, rng.random((3, 50)), mean, alpha)
    found = doubt.caution(read, measure, 0.8)
    assert (np.isinf(found.z) == (read.z > 0.8)).all()
    np.testing.assert_array_equal(found.z[read.z <= 0.8], doubt.measures(read)[measure][read.z <= 0.8])


def test_of_few_windows_there_are_few_and_every_seed_has_its_own(monkeypatch):
    few = {seed: scarce.windows_of(f"5 {seed}") for seed in plan.SEEDS}
    assert all(len(set(own)) == 5 for own in few.values()) and len({tuple(own) for own in few.values()}) == 3
    assert len(scarce.windows_of("100 0")) == 100 and len(scarce.windows_of("prose 0")) == 40
    setting = lambda record, arm, share: plan.setting(local.Point(arm, "bayesian", beta=0.2))  # noqa: E731
    monkeypatch.setattr(routers, "chosen", setting)
    points = [point for data in ("1 0", "100 2", "prose 1") for point in scarce.points(None, data)]
    assert len(points) == 2 * (5 + 8) + 2 and len(set(points)) == len(points)
    assert {(point.data, point.seed) for point in points} == {("1 0", 0), ("100 2", 2), ("prose 1", 1)}
