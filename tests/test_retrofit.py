"""A published model under a run's routers: frozen, the same one, and the same text where every token is full."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import base
from experiments.retrofit import stage_of
from experiments.studies import routed
from experiments.studies.reports import report
from meta_attention_jax import LanguageModel, RoutingHypers, analysis, load_run, pretrained
from meta_attention_jax.data.tasks import KINDS
from meta_attention_jax.objective import forward
from meta_attention_jax.sweeps.together import train_together
from meta_attention_jax.training import build
from meta_attention_jax.training.backbone import merge, trained
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.step import gradient_sums, init_state, train_step
from tests import making
from tests.close import assert_close, distance
from tests.making import published

UNROUTED = RoutingHypers(
    strength=np.float32(2), preference=np.float32(0.1), costs=np.ones(1, np.float32), threshold=np.float32(0)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published model, and text for it."""
    folder = tmp_path_factory.mktemp("published")
    published(folder / "model")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(60)]
    for split in ("train", "validation", "test"):
        text = ". ".join(" ".join(rng.choice(words, 9)) for _ in range(60))
        (folder / "text" / split).mkdir(parents=True)
        (folder / "text" / split / "a.txt").write_text(text)
    return folder


def config(place, **changes):
    values = base.get_config()
    values.update_from_flattened_dict({
        "retrofit.backbone": str(place / "model"), "retrofit.local_steps": 6, "data.corpus": f"path:{place / 'text'}",
        "data.tokenizer": "model", "data.tasks": ("prose", "repeat"), "data.shares": (0.5, 0.5),
        "data.sequence_length": 32, "data.batch_size": 2, "model.mechanisms": ("full", "local"), "model.window": 4,
        "model.sinks": 1, "model.scan_layers": True, "controller.hidden": 8, "prior.costs": "1,0.15",
        "optimizer.learning_rate": 3e-2, "retrofit.local_learning_rate": 3e-2, "gate.start": 0.3, "gate.end": 0.6,
        "parallel.devices": 1, "train.steps": 8, "train.eval_every": 8, "train.eval_batches": 1,
        "train.checkpoint_every": 4, "train.log_every": 2,
    })
    values.update_from_flattened_dict(changes)
    return values


@pytest.fixture(scope="module")
def root(place, tmp_path_factory):
    """Both stages, trained."""
    root = tmp_path_factory.mktemp("runs")
    for stage in ("local", "end_to_end"):
        train(prepare(stage_of(config(place), stage, root), root / stage), progress=False)
    return root


def state_of(place, **changes):
    """(spec, state, batch, hypers, published parameters) of a config."""
    values = config(place, **changes)
    build.check(values)
    dataset = build.build_dataset(values)
    spec, hypers, batch = build.build_spec(values, dataset), build.build_hypers(values), dataset.train_batch(0)
    frozen = pretrained.load(place / "model", scan_layers=values.model.scan_layers)[1]
    state = init_state(spec, jax.random.key(0), batch, hypers)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)  # noqa: E731
    return spec, state.replace(params=jax.tree.map(noise, state.params)), batch, hypers, frozen


def sums_of(spec, state, batch, hypers, frozen=None):
    return jax.jit(functools.partial(gradient_sums, spec))(state, batch, hypers, frozen)


def test_the_run_holds_its_controllers_alone_and_changes_them(root):
    run = load_run(root / "end_to_end")
    before = load_run(root / "local")
    published_ones = flatten_dict(pretrained.load(run.config.retrofit.backbone)[1])
    for path, leaf in flatten_dict(run.params).items():
        if path in published_ones:
            np.testing.assert_array_equal(leaf, published_ones[path])
        else:
            assert "controller" in path
            assert np.linalg.norm(leaf - flatten_dict(before.params)[path]) > 0
    bytes_kept = sum(f.stat().st_size for f in (root / "end_to_end" / "checkpoints").rglob("*") if f.is_file())
    assert bytes_kept < (root.parent / run.config.retrofit.backbone / "model.safetensors").stat().st_size
    sizes = {name: run.config.model[name] for name in ("model_dim", "num_layers", "num_heads", "num_kv_heads")}
    assert sizes == {"model_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def test_with_every_token_full_it_is_the_published_model(root):
    run = load_run(root / "end_to_end")
    text = "a stretch of text that is longer than the window"
    plain, params, _ = pretrained.load(run.config.retrofit.backbone)
    ids = run.encode(text)
    apply = jax.jit(lambda params: LanguageModel(plain).apply({"params": params}, ids[None], hypers=UNROUTED).logits)
    logits = apply(params)[0]
    full = run.at(price=-10.0)
    assert (full.routes(text, mode="hard").route == 0).all()
    found = full.logits(text, mode="hard")
    assert distance(found, logits) <= 1e-6  # By norm; a single entry may be off by more on some CPUs.
    assert_close(found, logits, 1e-5)
    assert np.linalg.norm(run.at(price=10.0).logits(text, mode="hard") - logits) > 0.01 * np.linalg.norm(logits)


@pytest.mark.slow
def test_with_its_layers_apart_a_run_says_the_same(root, tmp_path):
    run = load_run(root / "end_to_end")
    apart, text = run.unstacked(), "a stretch of text that is longer than the window"
    assert run.model.config.scan_layers and not apart.model.config.scan_layers
    assert_close(apart.logits(text, mode="hard"), run.logits(text, mode="hard"), 1e-5)
    np.testing.assert_array_equal(apart.routes(text, mode="hard").route, run.routes(text, mode="hard").route)
    assert apart.generate(text, steps=4, mode="hard").text == run.generate(text, steps=4, mode="hard").text
    with pytest.raises(ValueError, match="run: expected .* as they were trained, got .*unstacked"):
        apart.export(tmp_path / "routers")
    assert not (tmp_path / "routers").exists()


@pytest.mark.slow
def test_a_text_may_be_as_long_as_the_context(root):
    run, text = load_run(root / "end_to_end"), "a text of some words, and then of others"
    length = len(run.encode(text))
    for context in (length, length + 3):
        config = dataclasses.replace(run.model.config, context=context)
        short = dataclasses.replace(run, model=run.model.clone(config=config))
        assert_close(short.logits(text, mode="hard"), run.logits(text, mode="hard"), 1e-5)
    config = dataclasses.replace(run.model.config, context=length - 1)
    with pytest.raises(ValueError, match=f"^tokens: expected at most the model's context of {length - 1}, got {length}"):
        dataclasses.replace(run, model=run.model.clone(config=config)).logits(text)


def test_the_token_that_begins_a_text_stands_before_those_that_are_asked(root):
    run = load_run(root / "end_to_end")
    run.tokenizer.start, run.tokenizer.begins = 5, True
    plain = run.tokenizer.encode(b"a text")
    assert run.encode("a text").tolist() == [5, *plain] and run.encode(plain).tolist() == plain.tolist()
    assert len(run.routes("a text").pieces) == len(plain) + 1


@pytest.mark.parametrize("stage", ["end_to_end", *making.slow("local")])
def test_gradients_are_those_of_the_whole_model(place, stage):
    """Of what is trained; frozen or not, theta open or not."""
    spec, state, batch, hypers, frozen = state_of(place, **{"retrofit.stage": stage})
    state = state.replace(step=jnp.int32(4))
    own, sums = sums_of(spec, state, batch, hypers, frozen)
    whole = dataclasses.replace(spec, frozen=False)
    every, same = sums_of(whole, state.replace(params=merge(frozen, state.params)), batch, hypers)
    assert_close(own, trained(every), 1e-5)
    assert_close(sums, same, 1e-5)
    assert np.linalg.norm(jax.tree.leaves(own)[-1]) > 0


def test_the_local_stage_asks_every_layer_for_its_own_output(place):
    """Its objective is a sum over layers, none of whose terms depends on another layer's controller, and `harm` is what
    its definition says."""
    spec, state, batch, hypers, frozen = state_of(place, **{"retrofit.stage": "local", "model.scan_layers": False})
    closed = hypers.routing.replace(threshold=jnp.float32(0.0))

    def harms(params):
        harm = forward(spec.model, merge(frozen, params), batch, closed).routing.harm
        return jnp.sum(harm, axis=(1, 2))

    jacobian = flatten_dict(jax.jit(jax.jacrev(harms))(state.params))
    for (layer, *_), leaf in jacobian.items():
        own = int(layer.removeprefix("layer_"))
        assert np.linalg.norm(leaf[own]) > 0 and not np.any(leaf[1 - own]), layer

    # Layer 0 by hand: its output with and without the routes.
    mask = np.asarray(batch.loss_mask)
    params = merge(frozen, state.params)

    def stream(model, **given):
        def pick(module, _):
            return module.name in ("attention", "layer_0")

        return jax.jit(lambda params: model.apply(
            {"params": params}, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, hypers=closed,
            capture_intermediates=pick, mutable=["intermediates"], **given,
        )[1])(params)

    x = LanguageModel(spec.model.config).apply({"params": params}, batch.tokens, method="embed")
    attended = stream(spec.model.clone(by_layer=False))["intermediates"]["layer_0"]["__call__"][0][0][0]
    full = stream(spec.model.clone(by_layer=False, mode="hard"), route=np.zeros_like(batch.tokens))
    full = full["intermediates"]["layer_0"]["__call__"][0][0][0]
    # The MLP comes after: with the same stream it would be the same, so only tokens without a difference are told.
    harm = jax.jit(functools.partial(forward, spec.model))(params, batch, closed).routing.harm[0]
    same = np.asarray(harm < 1e-9)
    assert same[mask].any() and not same[mask].all()
    difference = np.linalg.norm(attended - full, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_array_equal(difference[mask] < 1e-4, same[mask])


@pytest.mark.slow
def test_a_page_of_the_run_is_made_like_any_other(root):
    kind, page = report(root / "end_to_end")
    assert kind == "run" and "<h2>Layers</h2>" in page()


@pytest.mark.slow
def test_kl_to_the_unrouted_model_is_zero_where_all_is_full_and_positive_elsewhere(place):
    spec, state, batch, hypers, frozen = state_of(place, **{"retrofit.loss": "kl"})
    measure = jax.jit(functools.partial(gradient_sums, spec))
    _, sums = measure(state.replace(step=jnp.int32(8)), batch, hypers, frozen)
    full = hypers.replace(routing=hypers.routing.replace(price=jnp.float32(-10.0)))
    _, none = measure(state.replace(step=jnp.int32(8)), batch, full, frozen)
    assert float(sums.fit) > 1e-3 * float(sums.nll)
    assert abs(float(none.fit)) < 1e-5 * float(sums.nll)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(place, root, tmp_path):
    values = stage_of(config(place), "end_to_end", root)
    train(prepare(values, tmp_path / "run"), stop_after=4, progress=False)
    train(prepare(values, tmp_path / "run"), progress=False)
    jax.tree.map(
        np.testing.assert_array_equal, load_run(tmp_path / "run").params, load_run(root / "end_to_end").params
    )


@pytest.mark.slow
def test_points_of_a_sweep_share_the_published_model(place, root, tmp_path):
    values = [stage_of(config(place, **{"objective.beta": beta}), "end_to_end", root) for beta in (0.01, 0.3)]
    jobs = [prepare(one, tmp_path / str(i)) for i, one in enumerate(values)]
    assert jobs[0].frozen is jobs[1].frozen
    assert train_together(jobs, label="both", names=["a", "b"], progress=False) == [None, None]
    assert_close(load_run(tmp_path / "0").params, load_run(root / "end_to_end").params, 1e-3)
    assert load_run(tmp_path / "1").evaluate("test")["nll"] > 0


@pytest.mark.slow
def test_adapters_begin_as_nothing_and_learn(place, root, tmp_path):
    plain = state_of(place)
    spec, state, batch, hypers, frozen = state_of(place, **{"retrofit.lora_rank": 2})
    fresh = init_state(spec, jax.random.key(0), batch, hypers).params
    assert any("adapter" in path for path in flatten_dict(fresh))
    without = {path: leaf for path, leaf in flatten_dict(fresh).items() if "adapter" not in path}
    own = init_state(plain[0], jax.random.key(0), batch, hypers).params
    assert {path: leaf.shape for path, leaf in without.items()} == {
        path: leaf.shape for path, leaf in flatten_dict(own).items()
    }
    route = jnp.zeros_like(batch.tokens)
    logits = jax.jit(lambda params: spec.model.apply(
        {"params": params}, batch.tokens, hypers=hypers.routing, route=route
    ).logits)(merge(frozen, fresh))
    unrouted = jax.jit(lambda params: LanguageModel(pretrained.load(place / "model")[0]).apply(
        {"params": params}, batch.tokens, hypers=UNROUTED
    ).logits)(frozen)
    assert_close(logits, unrouted, 1e-6)
    values = stage_of(config(place, **{"retrofit.lora_rank": 2}), "end_to_end", root)
    train(prepare(values, tmp_path / "run"), progress=False)
    learned = flatten_dict(load_run(tmp_path / "run").params)
    assert all(np.linalg.norm(leaf) > 0 for path, leaf in learned.items() if "adapter" in path)


@pytest.mark.slow
def test_a_moved_model_is_found_and_another_one_refused(place, root, tmp_path):
    shutil.copytree(place / "model", tmp_path / "elsewhere")
    run = load_run(root / "end_to_end", backbone=str(tmp_path / "elsewhere"))
    assert_close(run.params, load_run(root / "end_to_end").params, 0)
    assert run.generate("some text", steps=3, mode="hard").text.startswith("some text")
    published(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="^retrofit.backbone: expected the model of sha256 .* got '"):
        load_run(root / "end_to_end", backbone=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="^retrofit.backbone: expected a folder of safetensors, a GGUF file or pack"):
        load_run(root / "end_to_end", backbone=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="^retrofit.backbone: expected the model of sha256 "):
        other = config(place, **{"retrofit.backbone": str(tmp_path / "other"), "train.init_from": str(root / "local")})
        prepare(other, root / "end_to_end")


def test_what_is_trained_stays_float32_in_bfloat16(place):
    """Of every stage and adapter; the state that a step gives is one that it takes."""
    spec, state, batch, hypers, _ = state_of(
        place, **{"model.dtype": "bfloat16", "retrofit.lora_rank": 2, "model.num_layers": 2}
    )
    frozen = pretrained.load(place / "model", dtype=jnp.bfloat16)[1]
    new, _ = jax.eval_shape(functools.partial(train_step, spec), state, batch, hypers, frozen)
    jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail(f"{a.dtype} became {b.dtype}"), state, new)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("changes, field", [
    ({"data.tokenizer": "bytes"}, "data.tokenizer"),
    ({"retrofit.lora_rank": 33}, "retrofit.lora_rank"),
    ({"retrofit.backbone": ""}, "data.tokenizer"),
    ({"retrofit.backbone": "package:no_such_package"}, "retrofit.backbone"),
    ({"retrofit.stage": "local", "model.mechanisms": ("linear", "local"), "controller.fixed": ("local",)},
     "model.mechanisms"),
    ({"retrofit.loss": "kl", "train.packed": True, "gate.end": 0.5, "train.packed_dense_rows": 0.5}, "train.packed"),
    ({"train.packed": True, "gate.end": 0.5}, "train.packed_dense_rows"),
    ({"retrofit.stage": "local", "retrofit.lora_rank": 2}, "retrofit.lora_rank"),
    ({"data.sequence_length": 257}, "data.sequence_length"),
])
def test_bad_fields_are_one_sentence(place, changes, field, tmp_path):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got .*") as caught:
        prepare(config(place, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", [False, *making.slow(True)])
def test_an_export_opens_like_the_run(root, tmp_path, model):
    run = load_run(root / "end_to_end")
    run.export(tmp_path / "out", model=model, command="by a test")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"routing.json", "routing.safetensors", "data_manifest.json"} | (
        {"config.json", "model.safetensors", "tokenizer.json"} if model else set()
    )
    again = load_run(tmp_path / "out")
    assert (again.step, again.steps, again.mode) == (run.step, (run.step,), run.mode)
    assert_close(again.params, run.params, 0)
    assert_close(again.logits("to be read", mode="hard"), run.logits("to be read", mode="hard"), 0)
    assert again.generate("to be", steps=3).text == run.generate("to be", steps=3).text
    assert again.evaluate("test", max_batches=1) == run.evaluate("test", max_batches=1)
    said = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert said["format"] == 1 and said["note"] == {"command": "by a test"}
    if model:  # Others open the folder as what it was before.
        config, params, _ = pretrained.load(tmp_path / "out")
        published = flatten_dict(pretrained.load(run.config.retrofit.backbone, scan_layers=True)[1])
        for name, leaf in flatten_dict(params).items():
            np.testing.assert_array_equal(leaf, published[name])
    asked = run.at(price=0.25, threshold=0.5, mode="gated")
    asked.export(tmp_path / "asked")
    opened = load_run(tmp_path / "asked")
    assert opened.mode == "gated" and opened.hypers.routing.price == np.float32(0.25)
    assert opened.hypers.routing.threshold == np.float32(0.5)
    with pytest.raises(ValueError, match="^path: expected a folder that is not there, got '"):
        run.export(tmp_path / "out")
    with pytest.raises(ValueError, match="^step: expected 8, the one that was exported, got 3."):
        load_run(tmp_path / "out", step=3)


def test_a_damaged_export_is_one_sentence(root, tmp_path):
    run = load_run(root / "end_to_end")
    run.export(tmp_path / "out")
    weights, said = tmp_path / "out" / "routing.safetensors", tmp_path / "out" / "routing.json"
    whole, content = weights.read_bytes(), json.loads(said.read_text())
    for damaged in (whole[:-10], whole[:-1] + b"x"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="^workdir: expected routing.safetensors of sha256 .*, got '"):
            load_run(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match="^workdir: expected routing.safetensors in .*, got 'none'."):
        load_run(tmp_path / "out")
    weights.write_bytes(whole)
    said.write_text(json.dumps({name: value for name, value in content.items() if name != "step"}))
    with pytest.raises(ValueError, match="^workdir: expected backbone, config, .* got 'none of step'."):
        load_run(tmp_path / "out")
    said.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="^format: expected 1 in .*, got 2."):
        load_run(tmp_path / "out")
    said.write_text(json.dumps({**content, "backbone": {**content["backbone"], "sha256": "0"}}))
    with pytest.raises(ValueError, match="^retrofit.backbone: expected the model of sha256 0 "):
        load_run(tmp_path / "out")


def test_arms_are_compared_on_the_same_windows(root, tmp_path):
    """Full is full attention, a price of -10 is full everywhere and one of 10 the window, and disorder keeps rates."""
    run = load_run(root / "end_to_end")
    kept = []
    order = dict.fromkeys(run.config.data.tasks, [1, 0])
    rows = routed.compare(run, "test", 4, [-10.0, 10.0, 0.0], order, [], lambda rows: kept.append(len(rows)))
    arms = ["full", "local", "routed -10", "layers -10", "routed 10", "layers 10", "routed 0", "layers 0", "shuffled",
            "random"]
    assert [row["arm"] for row in rows] == arms * 4 and kept == [10, 20, 30, 40]
    by = {(row["window"], row["arm"]): row for row in rows}
    for window in range(4):
        full, local = by[window, "full"], by[window, "local"]
        assert (full["share"], local["share"]) == (1.0, 0.0) and full["task"] == KINDS[window % 2]
        for arm in ("routed -10", "layers -10", "shuffled"):
            assert by[window, arm]["nll"] == pytest.approx(full["nll"], rel=1e-5) and by[window, arm]["share"] == 1.0
        for arm in ("routed 10", "layers 10"):
            assert by[window, arm]["nll"] == pytest.approx(local["nll"], rel=1e-5)
        assert abs(full["nll"] - local["nll"]) > 1e-3
    again = routed.compare(run, "test", 4, [-10.0, 10.0, 0.0], order, rows[:20], lambda rows: None)
    assert sorted(again, key=lambda r: r["window"]) == rows
    lines = routed.summary(rows)
    assert {line["task"] for line in lines} == {"prose", "repeat"}
    assert all(line["above"] == 0 for line in lines if line["arm"] == "full")
    page = routed.page(rows, routed.setting(run, "test", [-10.0, 10.0, 0.0]))
    assert page.count("\n| ") >= len(lines)
    analysis.save(analysis.share_figure(lines, title="a test"), tmp_path / "share.png")
    order = routed.rank(run, 1)
    assert set(order) == {"prose", "repeat"} and all(sorted(one) == [0, 1] for one in order.values())
    other = dataclasses.replace(run, params=jax.tree.map(lambda leaf: leaf + 1e-3, run.params))
    kept = tmp_path / "rows.json"
    kept.write_text(json.dumps({"setting": routed.setting(run, "test", [0.0]), "rows": rows}))
    assert routed.stored(kept, routed.setting(run, "test", [0.0])) == rows
    with pytest.raises(ValueError, match="^out: expected rows of "):
        routed.stored(kept, routed.setting(other, "test", [0.0]))
