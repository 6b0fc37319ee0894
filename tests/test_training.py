"""Training: resuming, refusing, diverging, and the same numbers on one device and on eight."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import MetricsLog, read_metrics
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.processes import Busy, hold
from meta_attention_jax.training.step import make_optimizer
from tests.close import assert_close


def config(**changes):
    """The smoke config with one layer: half the program to compile."""
    values = smoke.get_config()
    values.model.num_layers = 1
    values.parallel.devices = 1
    values.update_from_flattened_dict(
        {"train.steps": 30, "train.eval_every": 30, "train.checkpoint_every": 15,
         "train.log_every": 5, "train.eval_batches": 1}
    )
    values.update_from_flattened_dict(changes)
    return values


def final_params(path):
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    try:
        return checkpoints.restore_params(checkpoints.latest)
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(prepare(config(), path), progress=False)
    return path


@pytest.mark.smoke
def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "30")  # As if killed after step 15.
    train(prepare(config(), half), progress=False)
    jax.tree.map(np.testing.assert_array_equal, final_params(whole), final_params(half))
    steps = [r["step"] for r in read_metrics(half) if r["event"] == "train"]
    assert steps == [5, 10, 15, 20, 25, 30]
    assert [r["step"] for r in read_metrics(half) if r["event"] == "resume"] == [15]


def test_a_run_directory_opens_from_itself_alone(whole):
    before = sorted(p.name for p in whole.iterdir())
    run = load_run(whole)
    assert run.step == 30
    batch = run.dataset.train_batch(0)
    apply = jax.jit(run.model.apply)
    out = apply({"params": run.params}, batch.tokens, hypers=run.hypers.routing)
    assert out.logits.shape == (*batch.tokens.shape, run.dataset.vocab_size)
    assert sorted(p.name for p in whole.iterdir()) == before


def test_a_choice_that_serves_training_alone_gives_way_elsewhere():
    """cuDNN has no segment ids: a model that may be given any is not refused for it."""
    values = config(**{"model.implementation": "cudnn"})
    assert build.build_model(values, 10).config.attention.implementation == "auto"
    assert build.build_model(values, 10, "padded").config.attention.implementation == "cudnn"


@pytest.mark.slow
def test_a_run_answers_without_its_corpus(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text(f"{split}: the quick brown fox jumps. " * 60)
    path = tmp_path / "run"
    values = config(**{
        "data.corpus": f"path:{text}", "train.steps": 4,
        "train.log_every": 2, "train.eval_every": 2, "train.checkpoint_every": 2,
    })
    train(prepare(values, path), progress=False)
    shutil.rmtree(text)
    run = load_run(path)
    before = sorted(p.name for p in path.iterdir())
    assert (run.step, run.steps, run.mode) == (4, (2, 4), "hard")

    prompt = "the fox é"
    ids = run.encode(prompt)
    assert run.encode(prompt.encode()).tolist() == run.encode(ids.tolist()).tolist() == ids.tolist()
    for mode in ("soft", "hard"):
        apply = jax.jit(run.model.clone(mode=mode).apply)
        output = apply({"params": run.params}, ids[None], hypers=run.hypers.routing)
        assert_close(run.logits(prompt, mode=mode), output.logits[0])
    assert_close(run.logits(prompt), output.logits[0])
    routes = run.routes(prompt)
    assert b"".join(routes.pieces).decode() == prompt
    assert_close(routes.mean, output.routing.mean[:, 0])
    alpha = routes.concentration
    assert_close(routes.mean, alpha / alpha.sum(-1, keepdims=True))
    assert (routes.route == routes.mean.argmax(-1)).all() and routes.hard.all()
    frame = routes.frame()
    assert len(frame) == len(ids) and list(frame["mechanism"]) == [
        run.mechanisms[k] for k in routes.route[0]
    ]
    assert frame["alpha/full"].to_numpy() == pytest.approx(alpha[0, :, 0])
    gated = run.routes(prompt, mode="gated", threshold=0.0)
    assert not gated.hard.any()

    made = run.generate(prompt, steps=3)
    assert str(made).startswith(prompt) and made.prompt == len(ids) and len(made.ids) == len(ids) + 3
    assert made.ids[len(ids)] == run.logits(prompt)[-1].argmax()
    assert made.ids.tolist() == run.generate(ids, steps=3).ids.tolist()
    assert run.generate(prompt, steps=9, temperature=2.0, seed=1).text != run.generate(
        prompt, steps=9, temperature=2.0, seed=2).text

    # A token that the model draws soon, as the end of a text.
    end = int(made.ids[len(ids) + 1])
    run.tokenizer.ends = (end,)
    both = run.generate_batch([prompt, "a"], steps=3)
    short = both[0].ids[len(ids) :]
    assert short.tolist() == made.ids[len(ids) : len(ids) + len(short)].tolist() and short.tolist().index(end) < 2
    assert both[0].text == run.tokenizer.decode(both[0].ids[:-1]).decode(errors="replace")
    assert both[0].trace.route.shape[2] == len(short) == both[0].trace.lengths[0]
    assert both[0].trace.prompt_route.shape[2] == len(ids)
    for one, alone in zip(both, (prompt, "a"), strict=True):
        assert run.generate(alone, steps=3).ids.tolist() == one.ids.tolist()
    assert run.generate(prompt, steps=3, stop=False).ids.tolist() == made.ids.tolist()

    metrics = run.metrics
    assert list(metrics["event"]) == ["start", "train", "eval", "train", "eval"]
    records = [r for r in read_metrics(path) if r["event"] == "eval"]
    assert metrics["hard/nll"].iloc[-1] == records[-1]["hard"]["nll"]

    page = run.show("<b>fox", layer=0)._repr_html_()
    assert "&lt;" in page and "<b>" not in page and page.count("<h4>") == 1
    assert "layer 0" in page and "_repr_html_" in dir(run) and str(path) in run._repr_html_()
    for call, sentence in (
        (lambda: run.logits(""), "prompt: expected at least one token"),
        (lambda: run.logits([300]), "prompt: expected tokens in"),
        (lambda: run.routes("x", mode="medium"), "mode: expected one of"),
        (lambda: run.show("x", layer=1), "layer: expected one of"),
        (lambda: run.generate("x", top_k=0), "top_k: expected at least 1"),
        (lambda: run.generate_batch("x"), "prompts: expected a list of prompts, got 'x'"),
        (lambda: run.generate_batch([]), "prompts: expected at least one"),
        (lambda: load_run(path, step=3), "step: expected 'latest', 'best' or one of"),
        (lambda: run.dataset, "expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert load_run(path, step=2).step == 2 and load_run(path, step="best").step in (2, 4)
    assert sorted(p.name for p in path.iterdir()) == before


def test_a_run_is_asked_in_the_mode_it_ended_in(whole):
    run = load_run(whole)
    assert run.mode == "hard" and run.routes("k1=v2 ?k1").hard.all()
    for kind, theta, mode in (("none", 1.0, "soft"), ("linear", 0.4, "gated"), ("linear", 1.0, "hard")):
        values = config(**{"gate.kind": kind, "gate.threshold": theta})
        other = dataclasses.replace(run, config=values, hypers=build.build_hypers(values))
        assert other.mode == mode
        routes = other.routes("k1=v2 ?k1")
        wanted = {"soft": False, "hard": True, "gated": routes.uncertainty <= theta}[mode]
        assert (routes.hard == wanted).all()
        assert (other.routed_batch()[1].hard.mean() == 1) == (mode == "hard")
    assert not run.routes("k1=v2", mode="gated", threshold=0.0).hard.any()
    with pytest.raises(ValueError, match="threshold: expected theta in .* got 1.5"):
        run.routes("k1=v2", mode="gated", threshold=1.5)


def _cut(path):
    """The large files below, cut in half: what a full disk or a copy broken off leaves."""
    large = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    assert large
    for file in large:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda run: shutil.rmtree(run / "checkpoints/30/state"), "expected a complete checkpoint"),
        (lambda run: _cut(run / "checkpoints/30/state"), "expected a complete checkpoint"),
        (lambda run: (run / "checkpoints/30/state/_METADATA").write_text(""),
         "expected a complete checkpoint"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "expected checkpoints in"),
        (lambda run: (run / "config.json").write_text("[1]"), "expected a config in"),
        (lambda run: (run / "config.json").write_text("{}"), "expected a complete config"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["no state", "cut array", "empty metadata", "no checkpoints", "list", "empty", "no tokens"],
)
def test_a_damaged_run_is_one_sentence(whole, tmp_path, damage, sentence):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run)
    with pytest.raises(ValueError, match=sentence) as error:
        load_run(run)
    assert "\n" not in str(error.value)
    del error
    gc.collect()  # Orbax leaves its readers of a cut array unawaited; not for the tests that follow.


def test_a_log_that_is_none(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "data_manifest.json").unlink()
    log = run / "metrics.jsonl"
    records = len(read_metrics(run))
    log.write_text('[1, 2]\n"x"\n{"loss": 1}\n' + log.read_text() + "\xff\n")
    assert len(load_run(run).metrics) == records
    log.unlink()
    opened = load_run(run)
    with pytest.raises(ValueError, match="workdir: expected metrics.jsonl in"):
        opened.metrics
    opened.dataset  # Writes no manifest.
    assert not (run / "data_manifest.json").exists()


def test_one_process_at_a_time_trains_a_run(whole):
    stored = (whole / "metrics.jsonl").read_bytes()
    with hold(whole), pytest.raises(Busy, match="workdir: expected a run that no other process"):
        train(prepare(config(), whole), progress=False)
    assert (whole / "metrics.jsonl").read_bytes() == stored
    with hold(whole):
        pass


def test_initial_parameters_survive_a_kill_before_the_first_save(whole, tmp_path):
    values = config(**{"train.init_from": str(whole)})
    job = prepare(values, tmp_path / "run")
    (job.path / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir(parents=True)  # As such a kill leaves it.
    again = prepare(values, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.initial, final_params(whole))


def test_another_config_is_refused_and_changes_nothing(whole):
    stored = (whole / "config.json").read_text()
    with pytest.raises(ValueError, match=r"prior.strength: expected 2.0, .* got 3.0"):
        prepare(config(**{"prior.strength": 3.0}), whole)
    assert (whole / "config.json").read_text() == stored


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="workdir: expected a new or empty directory"):
        prepare(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="workdir: expected a run directory"):
        load_run(tmp_path)


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path):
    values = config(**{"optimizer.learning_rate": 1e38, "optimizer.clip": 0.0,
                       "optimizer.warmup": 0.0, "controller.name": "fixed",
                       "controller.fixed": ("local",)})  # Compiles in no time.
    with pytest.raises(Diverged, match=r"^step \d+: expected finite .* no checkpoint is kept; "):
        train(prepare(values, tmp_path / "run"), progress=False)


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("model.num_heads", 5, "model.num_heads: expected a divisor"),
        ("model.num_kv_heads", 3, "model.num_kv_heads: expected a divisor"),
        ("model.window", 0, "model.window: expected a number > 0"),
        ("prior.strength", 0.0, "strength: expected a finite number > 0"),
        ("prior.costs", "1,2", "prior.costs: expected 3 positive numbers"),
        ("prior.costs", "cheap", "prior.costs: expected one of"),
        ("model.mechanisms", ("full", "lokal"), "did you mean 'local'"),
        ("data.corpus", "sotuu", "did you mean 'sotu'"),
        ("data.corpus", "path:/no/such/file", "no/such/file"),
        ("data.batch_size", 0, "data.batch_size: expected a number > 0"),
        ("parallel.devices", 1000, "parallel.devices: expected at most"),
        ("parallel.mode", "tpu", "parallel.mode: expected one of"),
        ("optimizer.accumulate", 3, "data.batch_size: expected a multiple"),
        ("gate.end", 0.1, "gate.end: expected a step > start"),
        ("model.implementation", "cudnn", "model.implementation: expected for 'cudnn' an NVIDIA GPU"),
        ("model.mechanisms", ("full",), "model.mechanisms: expected two or more distinct names"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate: expected 0 or a number of"),
        ("objective.beta", float("inf"), "objective.beta: expected 0 or a number of"),
        ("controller.name", "bayes", "controller.name: expected one of"),
        ("data.sequence_length", 5, "sequence_length: expected more than"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(tmp_path, field, value, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        prepare(config(**{field: value}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_text_shorter_than_a_sequence_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("one short line\n" * 60)
    values = config(**{"data.corpus": f"path:{tmp_path}/short.txt", "data.sequence_length": 4096})
    with pytest.raises(ValueError, match="sequence_length: expected at most"):
        prepare(values, tmp_path / "run")


@pytest.mark.slow
def test_eight_devices_by_jit_and_pmap_equal_one(tmp_path):
    root = pathlib.Path(__file__).parent.parent
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "parallel_check.py"), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for mode in ("jit8", "pmap8", "jit1_accumulated"):
        assert result[mode]["gradient"] <= 1e-5, result
        assert result[mode]["sgd"] <= 1e-5, result
    assert result["mean_of_means"] > 1e-2, "the comparison must see a wrong normalisation"
    assert result["collectives"] > 0 and result["collectives_in_loops"] == 0, result
    assert result["float_loops"] >= 2, "accumulation and layers must really be loops"
    assert result["packed"] <= 1e-5, result
    assert sum(count > 0 for count in result["packed_routes"]) >= 2, "tokens must enter a packed loop"
    assert result["packed_collectives"] > 0 and result["packed_collectives_in_loops"] == 0, result
    assert result["points"] <= 1e-5 and result["points_collectives"] == 0, result
    assert result["left"] == [8, 8]
    for mode in ("jit", "pmap"):  # Trained on 8 devices, opened on this process's one.
        assert len(jax.devices()) == 1
        logits = load_run(tmp_path / mode).logits(np.arange(24) % 20, mode="soft")
        assert_close(logits, np.load(tmp_path / f"{mode}.npy"))


def test_a_log_survives_a_crash_in_the_middle_of_a_line_and_a_new_start(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("start", 0, {})
    log.write("train", 5, {"nll": 2.0})
    log.write("train", 10, {"nll": 1.5})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])  # Killed while writing step 10.
    log = MetricsLog(tmp_path)
    log.write("resume", 5, {})
    log.write("train", 10, {"nll": 1.4})
    log.close()
    trained = [(r["step"], r["nll"]) for r in read_metrics(tmp_path) if r["event"] == "train"]
    assert trained == [(5, 2.0), (10, 1.4)]
    log = MetricsLog(tmp_path)
    log.write("start", 0, {})
    log.close()
    assert [r["event"] for r in read_metrics(tmp_path)] == ["start"]


def test_weight_decay_is_for_matrices_also_where_layers_are_stacked():
    optimizer = make_optimizer("adamw", weight_decay=0.5, clip=0.0)
    params = {
        "norm": {"scale": jnp.ones((4, 3))},  # 4 scanned layers
        "mlp": {"kernel": jnp.ones((4, 3, 3)), "bias": jnp.ones((4, 3))},
        "table": {"embedding": jnp.ones((5, 3))},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    direction, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = jax.tree.map(lambda d: float(jnp.abs(d).max()), direction)
    assert moved == {"norm": {"scale": 0.0}, "mlp": {"kernel": 0.5, "bias": 0.0},
                     "table": {"embedding": 0.5}}
