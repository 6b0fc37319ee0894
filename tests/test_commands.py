"""The commands as a user calls them: a run's life, and mistakes, each of them one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import common
from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.generation import generate
from meta_attention_jax.runs import load_run
from tests.close import assert_close

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = ("--config=configs/smoke.py", "--config.train.steps=4", "--config.train.eval_every=4",
         "--config.train.checkpoint_every=4", "--config.train.eval_batches=1",
         "--config.model.num_layers=1", "--config.parallel.devices=1")


def environment():
    """That of the tests themselves: compiled quickly rather than well, and once for all of them."""
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"):
        flags = flags if flag in flags else f"{flags} {flag}".strip()
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command("train", *flags) -> Result."""
    folder = tmp_path_factory.mktemp("commands")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "command_server.py")], cwd=ROOT, text=True,
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )

    def call(name, *flags):
        paths = {stream: folder / stream for stream in ("stdout", "stderr")}
        request = {"argv": [f"experiments.{name}", *map(str, flags)]}
        request |= {stream: str(path) for stream, path in paths.items()}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Result(code, paths["stdout"].read_text(), paths["stderr"].read_text())

    yield call
    server.stdin.close()
    assert server.wait(timeout=30) == 0
    server.stdout.close()


def test_flags_of_the_compiler_reach_the_commands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2")
    assert environment()["XLA_FLAGS"].startswith("--xla_cpu_max_isa=SSE4_2 --xla_backend_opt")
    monkeypatch.delenv("XLA_FLAGS")
    assert environment()["XLA_FLAGS"].startswith("--xla_backend_opt")


def nobody():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("place, keeps", [("new/home", True), ("off", False), ("file", False), (None, False)])
def test_what_is_compiled_is_kept_where_there_is_a_place(place, keeps, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if place is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(pathlib.Path, "home", nobody)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    try:
        jax.config.update("jax_enable_compilation_cache", place != "off")
        common.keep_compiled()
        found = jax.config.jax_compilation_cache_dir
        assert (found != before) == keeps
        if keeps:
            assert pathlib.Path(found).is_dir()
            assert pathlib.Path(found).parent == tmp_path / place / "meta_attention_jax/compiled"
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # Asked for none.
            jax.config.update("jax_compilation_cache_dir", before)
            common.keep_compiled()
            assert jax.config.jax_compilation_cache_dir == before
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)


def check_success(result):
    assert result.code == 0, result.err
    assert "Traceback" not in result.err and "error: " not in result.err
    return result.out


def check_mistake(result, sentence):
    """Exit code 2 and one line that says `sentence`, before anything else is said."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert sentence in result.err, result.err


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_rows(path, modes, tokens):
    rows = json.loads(path.read_text())
    assert [row["mode"] for row in rows] == modes
    for row in rows:
        assert row["step"] == 4 and row["split"] == "validation" and row["tokens"] == tokens
        assert finite(row) and 0 < row["nll"] < 10
        assert row["elbo"] == pytest.approx(row["nll"] + row["kl"])
        fractions = [row[f"fraction/{name}"] for name in ("full", "linear", "local")]
        assert sum(fractions) == pytest.approx(1)
        assert row["cost"] == pytest.approx(
            sum(f * c for f, c in zip(fractions, (1, 0.15, 0.3))), rel=1e-5
        )
    return {row["mode"]: row for row in rows}


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """(a run, what its training said)."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, check_success(command("train", f"--workdir={run}", *SMOKE))


@pytest.mark.slow
def test_training_a_finished_run_evaluates_it_again_and_rewrites_nothing(command, trained, tmp_path):
    first, run = trained[1], tmp_path / "run"
    shutil.copytree(trained[0], run)
    assert "validation, soft: " in first and "validation, hard: " in first
    assert "finished" not in first and "resumed" not in first
    records = (run / "metrics.jsonl").read_text()

    again = check_success(command("train", f"--workdir={run}", *SMOKE))
    assert "finished at step 4" in again
    assert again.splitlines()[2:] == first.splitlines()[-2:], "the same evaluation"
    assert (run / "metrics.jsonl").read_text().startswith(records), "nothing is rewritten"

    stored = (run / "config.json").read_text()
    other = command("train", f"--workdir={run}", *SMOKE, "--config.prior.strength=3")
    check_mistake(other, "prior.strength: expected 2.0, as in ")
    assert (run / "config.json").read_text() == stored


@pytest.mark.slow
def test_evaluation_of_a_run(command, trained, tmp_path):
    (run, first), table = trained, tmp_path / "rows.json"
    where = (f"--workdir={run}", f"--json={table}")
    shown = check_success(command("evaluate", *where, "--modes=soft,hard", "--max_batches=1"))
    assert "run at step 4, validation split" in shown
    rows = check_rows(table, ["soft", "hard"], tokens=8 * 32)
    for mode, row in rows.items():
        assert f"validation, {mode}: {row['nll']:.4f} nats" in first, "training's own evaluation"
        assert f"{row['nll']:.4f}" in shown
    spent = rows["hard"]["flops"]
    assert "flops" not in rows["soft"] and f"{spent['executed_packed']:.3e}" in shown
    assert 0 < spent["projected"] <= spent["full_only"] < spent["executed_dense"]
    assert rows["soft"]["hard_fraction"] == 0 and rows["hard"]["hard_fraction"] == 1
    assert rows["soft"]["nll"] != rows["hard"]["nll"]
    assert rows["soft"]["cost"] == rows["hard"]["cost"], "the first layer's routes are the same"

    theta = rows["soft"]["uncertainty"]  # some tokens are below their mean, some above
    shown = check_success(command("evaluate", *where, "--modes=gated", f"--threshold={theta}",
                                  "--max_batches=1", "--samples=2"))
    gated, sampled = json.loads(table.read_text())
    assert 0 < gated["hard_fraction"] < 1
    assert sampled["predictive"] < sampled["elbo"] and f"ELBO {sampled['elbo']:.4f}" in shown

    check_success(command("evaluate", *where, "--modes=soft", "--max_batches=1", "--length=16",
                          "--step=best"))
    check_rows(table, ["soft"], tokens=8 * 16)

    for flags, sentence in (
        (["--step=3"], "step: expected 'latest', 'best' or one of [4], got '3'."),
        (["--length=6"], "sequence_length: expected more than"),
        ([f"--json={run}/config.json/rows.json"], "json: expected a file in a folder that can be written"),
    ):
        check_mistake(command("evaluate", f"--workdir={run}", *flags), sentence)


@pytest.mark.slow
def test_prices_and_a_budget(command, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    beside = ROOT / "experiments" / "results" / "sweep_recall"
    shown = check_success(command(
        "evaluate", f"--workdir={run}", "--prices=9,0,-9", "--budget_cost=0.4", "--max_batches=1",
        "--modes=hard", f"--beside={beside}",
    ))
    rows = json.loads((run / "prices.json").read_text())
    assert [row["price"] for row in rows] == [-9, 0, 9]
    assert [row["cost"] for row in rows][::2] == pytest.approx([1.0, 0.15])
    assert (run / "prices.png").stat().st_size > 10_000
    [found] = json.loads((run / "budgets.json").read_text())["budgets"]
    assert found["cost"] <= 0.4 and f"lambda = {found['price']:.4f}" in shown
    for flags, sentence in (
        (["--prices=0,x"], "prices: expected finite numbers, got 'x'."),
        (["--prices=nan"], "prices: expected finite numbers, got 'nan'."),
        (["--budget_cost=0.1"], "cost: expected a budget in [0.15 (the cheapest mechanism's), 1], got 0.1."),
        (["--budget_cost=1", "--budget_share=1"], "budget: expected a cost or a share, got "),
        (["--prices=0", f"--beside={tmp_path}"], "beside: expected the results of a sweep in "),
    ):
        check_mistake(command("evaluate", f"--workdir={run}", *flags), sentence)
    result = command("generate", f"--workdir={run}", "--prompt=k3=v1", "--price=nan")
    check_mistake(result, "price: expected a finite number, got nan.")


def test_evaluation_of_a_damaged_run_is_one_line(command, trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained[0], damaged)
    stored = json.loads((damaged / "config.json").read_text())

    def refused(sentence, **changes):
        changed = {**stored, **changes}
        (damaged / "config.json").write_text(json.dumps(changed))
        check_mistake(command("evaluate", f"--workdir={damaged}"), sentence)

    refused("parameters of the config's model, embed", model={**stored["model"], "model_dim": 64})
    refused("workdir: expected a complete config in ", data={"corpus": "recall"})
    for step in (damaged / "checkpoints").glob("4/state/*"):
        shutil.rmtree(step) if step.is_dir() else step.unlink()
    refused("step: expected a complete checkpoint in ")


@pytest.mark.slow
def test_training_from_the_parameters_of_a_run_at_another_length(command, trained, tmp_path):
    run, longer = trained[0], tmp_path / "longer"
    further = command("train", f"--workdir={longer}", *SMOKE, f"--config.train.init_from={run}",
                      "--config.data.sequence_length=48", "--config.optimizer.learning_rate=1e-9")
    assert f"from {run}" in check_success(further)
    assert_close(load_run(longer).params, load_run(run).params)


def test_parameters_that_do_not_fit_make_no_run(command, trained, tmp_path):
    run = trained[0]
    for flags, sentence in (
        ([f"--config.train.init_from={tmp_path}"], "train.init_from: expected a run directory"),
        ([f"--config.train.init_from={run}", "--config.model.model_dim=64"],
         "expected parameters of the config's model, "),
        ([f"--config.train.init_from={run}", "--config.data.num_values=9"], "expected "),
    ):
        check_mistake(command("train", f"--workdir={tmp_path}/new", *SMOKE, *flags), sentence)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_study_of_uncertainty_ranks_every_measure(command, trained, tmp_path):
    run, study = trained[0], tmp_path / "study"
    shown = check_success(command("studies.uncertainty", f"--runs={run}", f"--out={study}", "--batches=1"))
    studies = json.loads((study / "rows.json").read_text())["studies"]
    assert {name.split(", ")[1] for name in studies} == set(MEASURES)
    for [found] in studies.values():
        ends = found["frontier"][0], found["frontier"][-1]
        assert [p["hard"] for p in ends] == [0.0, 1.0]
        assert ends[0]["cost"] == pytest.approx(1.45) and ends[1]["cost"] <= 1.0
        assert found["curve"]["random"] == pytest.approx(ends[1]["nll"] - ends[0]["nll"], abs=1e-5)
    assert (study / "risk.png").stat().st_size > 10_000 and "risk.png" in shown


def test_a_study_of_no_runs_is_one_line(command, tmp_path):
    result = command("studies.uncertainty", "--runs=", f"--out={tmp_path}")
    check_mistake(result, "runs: expected at least one")


def test_generation_shows_text_and_routes(command, trained):
    run, prompt = trained[0], "k3=v1 k1=v2 c0 ?k1"
    text = check_success(command("generate", f"--workdir={run}", f"--prompt={prompt}", "--steps=5",
                                 "--show_routes", "--layer=0"))
    first_line = text.splitlines()[0]
    assert first_line.startswith(prompt) and len(first_line.split()) == 4 + 5
    assert "F full  L linear  w local" in text and "the prompt's 4 tokens first" in text
    letters = text.splitlines()[-1].split()
    opened = load_run(run)
    ids = opened.dataset.tokenizer.encode(prompt.encode())
    trace = generate(opened.model, opened.params, [ids], steps=5, mode="hard",
                     hypers=opened.hypers.routing)
    continued = opened.dataset.tokenizer.decode(trace.tokens[0]).decode()
    assert first_line.split()[4:] == continued.split(), "what the library generates"
    routes = np.concatenate([trace.prompt_route[0, 0], trace.route[0, 0]])
    assert [letter[0] for letter in letters] == ["FLw"[k] for k in routes]
    sampled = {check_success(command("generate", f"--workdir={run}", f"--prompt={prompt}",
                                     "--steps=20", "--temperature=9", f"--seed={seed}"))
               for seed in (1, 2)}
    assert len(sampled) == 2, "a seed counts"
    soft = check_success(command("generate", f"--workdir={run}", f"--prompt={prompt}", "--steps=5",
                                 "--mode=soft", "--show_routes", "--color=always"))
    assert "100% of these tokens mix" in soft and "\x1b[" in soft and "\x1b[" not in text


def test_a_mistake_in_generation_is_one_line(command, trained):
    for flags, sentence in (
        (["--prompt=hello"], "text: expected names such as k0=v0, got b'hello'."),
        (["--prompt="], "prompt: expected at least one token"),
        (["--prompt=k3=v1", "--top_p=2"], "top_p: expected a number in (0, 1], got 2.0."),
        (["--prompt=k3=v1", "--layer=1"], "layer: expected less than 1, got 1."),
        (["--prompt=k3=v1", "--chat"], "chat: expected a tokenizer with a chat template, got 'symbols'."),
    ):
        check_mistake(command("generate", f"--workdir={trained[0]}", *flags), sentence)


TRAINING_MISTAKES = [
    (["--config.prior.strenght=2"], "got 'strenght'; did you mean 'strength'?"),
    (["--config.priro.strength=2"], "got 'priro'; did you mean 'prior'?"),
    (["--config.zzz=2"], "config: expected a field of the config, got 'zzz'."),
    (["--config.train.steps=many"], "train.steps: expected an integer, got 'many'."),
    (["--config.train.steps=0"], "train.steps: expected a number > 0, got 0."),
    (["--config.prior.strength=-1"], "prior.strength: expected a finite number > 0, got -1.0."),
    (["--config.prior.costs=1,2"], "prior.costs: expected 3 positive numbers"),
    (["--config.data.corpus=sotuu"], "did you mean 'sotu'?"),
    (["--wrokdir=x"], "this command has, got --wrokdir; did you mean --workdir?"),
    (["again"], "arguments: expected flags only, got 'again'."),
]


def test_a_mistake_in_training_is_one_line_and_makes_no_directory(command, tmp_path):
    run = tmp_path / "run"
    for flags, sentence in TRAINING_MISTAKES:
        check_mistake(command("train", f"--workdir={run}", *SMOKE, *flags), sentence)
        assert not run.exists()


def test_a_config_that_is_not_there_or_no_config_is_one_line(command, tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    run = tmp_path / "run"
    for flags, sentence in (
        (["--config=configs/smok.py"], "No such file or directory: 'configs/smok.py'"),
        (["--config=configs/smok.py", "--config.seed=1"], "No such file or directory"),
        (["--config=configs"], "Is a directory: 'configs'"),
        ([f"--config={tmp_path}/empty.py"], "has no attribute 'get_config'"),
        ([f"--config={tmp_path}/broken.py"], "invalid syntax (broken.py, line 1)"),
        ([], "--config must have a value"),
    ):
        check_mistake(command("train", f"--workdir={run}", *flags), sentence)
    check_mistake(command("train", *SMOKE), "--workdir must have a value")
    assert not run.exists()


def test_a_mistake_in_evaluation_is_one_line_and_writes_nothing(command, tmp_path):
    for flags, sentence in (
        ([], "workdir: expected a run directory with config.json, got "),
        (["--modes=soft,firm"], "modes: expected some of ('soft', 'hard', 'gated'), got 'firm'."),
        (["--split=tset"], "split: expected one of train, validation, test, got 'tset'."),
        (["--length=0"], "length: expected a positive integer, got '0'."),
        (["--threshold=1.5"], "threshold: expected a number in the range [0.0, 1.0], got"),
        (["--samples=few"], "samples: expected a non-negative integer, got 'few'."),
    ):
        check_mistake(command("evaluate", f"--workdir={tmp_path}", *flags), sentence)
    check_mistake(command("evaluate", f"--workdir={tmp_path}/nowhere"), "workdir: expected a run")
    check_mistake(command("evaluate"), "--workdir must have a value")
    assert not list(tmp_path.iterdir())


def test_a_broken_run_directory_is_refused(command, tmp_path):
    (tmp_path / "config.json").write_text("not json")
    workdir = f"--workdir={tmp_path}"
    check_mistake(command("evaluate", workdir), "workdir: expected a config in ")
    check_mistake(command("train", workdir, *SMOKE), "workdir: expected a config in ")
    check_mistake(command("generate", workdir, "--prompt=x"), "workdir: expected a config in ")
    (tmp_path / "config.json").write_text('{"name": "smoke"}')
    check_mistake(command("evaluate", workdir), "workdir: expected checkpoints in ")


@pytest.mark.smoke
def test_a_mistake_is_one_line_of_the_real_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path}/run", *SMOKE,
         "--config.prior.strenght=2"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )
    check_mistake(Result(done.returncode, done.stdout, done.stderr), "did you mean 'strength'?")
    assert not (tmp_path / "run").exists()
