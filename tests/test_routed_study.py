"""Exports of a routed published model, and what is said of one."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments.studies import routed
from meta_attention_jax import analysis, load_run, pretrained
from meta_attention_jax.analysis.statistics import bootstrap
from meta_attention_jax.data.tasks import KINDS
from tests import making
from tests.close import assert_close
from tests.test_retrofit import place, root  # noqa: F401


@pytest.mark.parametrize("model", [False, *making.slow(True)])
def test_an_export_opens_like_the_run(root, tmp_path, model):  # noqa: F811
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


def test_a_damaged_export_is_one_sentence(root, tmp_path):  # noqa: F811
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


def test_arms_are_compared_on_the_same_windows(root, tmp_path):  # noqa: F811
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


def test_a_bootstrap_covers_the_mean_of_its_values():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        middle, low, high = bootstrap(rng.normal(1.0, 1.0, 60), np.ones(60), draws=400)
        assert low < middle < high
        inside += low < 1.0 < high
    assert 180 <= inside <= 198
    assert bootstrap(np.array([1.0, 3.0]), np.array([3.0, 1.0]))[0] == 1.5
    with pytest.raises(ValueError, match="^values: expected at least one"):
        bootstrap(np.zeros(0), np.zeros(0))
