"""Bad input, drawn from a seed: one sentence, exit code 2, and nothing on the disk is changed."""

from __future__ import annotations

import collections
import gc
import pathlib
import random
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from experiments.studies import outcome, sweeps
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.together import Lost
from meta_attention_jax.training.checkpoint import Checkpoints, Damaged
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from tests import fuzz_cases, fuzz_runs, fuzz_sweeps
from tests.fuzz_harness import Accepted, call, nothing_works, snapshot, wrong

SEED = 0
WITHOUT_RUN = {
    # Group: how many of it run in `make test`; the rest is slow.
    fuzz_cases.config_values: 120,
    fuzz_cases.config_names: 30,
    fuzz_cases.config_pairs: 70,
    fuzz_cases.config_files: 70,
    fuzz_cases.corpora: 70,
    fuzz_sweeps.sweep_arguments: 60,
}
WITH_RUN = {
    fuzz_runs.configs: 8,
    fuzz_runs.files: 8,
    fuzz_runs.folders: 8,
    fuzz_runs.arguments: 16,
}

pytestmark = [
    # ml_collections loads a config file in the old way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    # Orbax leaves coroutines and sockets of what it could not read.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIGHT = {"controller.name": "fixed", "controller.fixed": ("local",), "model.num_layers": 1,
         "train.steps": 4, "train.eval_every": 2, "train.checkpoint_every": 2, "train.log_every": 1,
         "train.eval_batches": 1, "train.keep_latest": 3, "parallel.devices": 1}


def light(**changes):
    config = smoke.get_config()
    config.update_from_flattened_dict({**LIGHT, **changes})
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "run"
    train(prepare(light(), path), progress=False)
    return path


def drawn(group, count, *, rest=False):
    """`count` cases of a group, or all others."""
    draw = random.Random(f"{SEED} {group.__name__}")
    cases = group(draw)
    draw.shuffle(cases)
    return cases[count:] if rest else cases[:count]


def check(cases, tmp_path, monkeypatch, run=None):
    found = []
    with nothing_works():
        for number, case in enumerate(cases):
            root = tmp_path / str(number)
            root.mkdir()
            if case.needs_run:
                shutil.copytree(run, root / "run")
            case.made(root)
            monkeypatch.chdir(root)
            if said := wrong(root, case.command, case.argv):
                found.append(f"{case.name}: {said}")
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(root)
    assert not found, f"{len(found)} of {len(cases)} cases:\n" + "\n".join(found)


def test_there_are_many_cases_and_they_are_the_same_every_time():
    counts = {**WITHOUT_RUN, **WITH_RUN}.items()
    fast = [case for group, count in counts for case in drawn(group, count)]
    again = [case for group, count in counts for case in drawn(group, count)]
    assert [case.name for case in fast] == [case.name for case in again]
    commands = collections.Counter(case.command for case in fast)
    assert len(fast) > 400 and min(commands.values()) > 10, commands
    assert set(commands) == {"train", "sweep", "evaluate", "generate", "report"}


@pytest.mark.parametrize("group", WITHOUT_RUN, ids=lambda group: group.__name__)
def test_a_mistake_before_there_is_a_run(group, tmp_path, monkeypatch):
    check(drawn(group, WITHOUT_RUN[group]), tmp_path, monkeypatch)


@pytest.mark.slow
def test_damaged_runs_and_wrong_words_to_whole_ones(whole, tmp_path, monkeypatch):
    cases = [case for group, count in WITH_RUN.items() for case in drawn(group, count)]
    check(cases, tmp_path, monkeypatch, whole)


@pytest.mark.slow
@pytest.mark.parametrize("group", (*WITHOUT_RUN, *WITH_RUN), ids=lambda group: group.__name__)
def test_all_other_mistakes(group, whole, tmp_path, monkeypatch):
    count = {**WITHOUT_RUN, **WITH_RUN}[group]
    check(drawn(group, count, rest=True), tmp_path, monkeypatch, whole)


GOOD_TEXTS = {
    "one huge line in each file": b"word and word, " * 70_000,
    "one line without an end in each file": b"hello, " * 10,
    "one huge line": b"word and word, " * 70_000,
    "one line without an end": b"hello, " * 10,
    "line ends of another system": b"a line of text\r\n" * 90,
    "not ASCII": "\u00fcber \u4e16\u754c \U0001f600\n".encode() * 90,
    "control characters": bytes(range(1, 32)) * 90,
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
def test_odd_text_is_good_text_for_bytes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "valid", "test") if "each file" in name else ("train",):
        (tmp_path / f"{split}.txt").write_bytes(f"{split}: ".encode() + GOOD_TEXTS[name])
    with nothing_works(), pytest.raises(Accepted):
        call("train", fuzz_cases.SMOKE, "--workdir=new", "--config.data.corpus=path:train.txt")
    assert (tmp_path / "new" / "data_manifest.json").is_file()


def test_a_tokenizer_is_trained_in_a_new_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_cases.text(tmp_path)
    for _ in range(2):  # The second time with the tokenizer of the first.
        with nothing_works(), pytest.raises(Accepted):
            call("train", fuzz_cases.SMOKE, "--workdir=new", "--config.data.corpus=path:text.txt",
                 "--config.data.tokenizer=bpe", "--config.data.vocab_size=260")


AT_THE_EDGE = ("seed=4294967295", "data.seed=-1", "data.seed=7", "train.profile_step=-1",
               "objective.beta=0", "gate.threshold=0", "train.steps=2147483647", "optimizer.clip=0",
               "prior.strength=1e-30", "prior.costs=1,1e-30,1", "model.mlp_dim=0",
               "controller.fixed=local")


@pytest.mark.parametrize("flag", AT_THE_EDGE)
def test_what_is_just_possible_is_accepted(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with nothing_works(), pytest.raises(Accepted):
        call("train", fuzz_cases.SMOKE, "--workdir=new", f"--config.{flag}")


def saved(path, steps=(2, 4)):
    """Checkpoints of a small state; the nats fall."""
    checkpoints = Checkpoints(path, keep_latest=5)
    for step in steps:
        state = {"params": {"w": jnp.full(3, float(step))}}
        checkpoints.save(step, state, config={}, nll=10.0 - step)
    checkpoints.close()
    return path


@pytest.mark.parametrize(
    "content", ("", "{", "[]", "3", "{}", '{"nll": "x"}', '{"nll": NaN}', "\0")
)
def test_damaged_metrics_of_one_step_do_not_hide_the_others(content, tmp_path):
    folder = saved(tmp_path / "checkpoints")
    (folder / "4" / "metrics" / "metrics").write_text(content)
    before = snapshot(tmp_path)
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps == (2, 4) and reader.best == 2
    np.testing.assert_array_equal(reader.restore_params(2)["w"], np.full(3, 2.0))
    with pytest.raises(Damaged, match="step: expected a complete checkpoint in .*/4', got"):
        reader.restore_params(4)
    reader.close()
    assert snapshot(tmp_path) == before
    writer = Checkpoints(folder)
    with pytest.warns(UserWarning, match="checkpoints/4'.* The step before it is taken"):
        step, state = writer.restore_newest({"params": {"w": jnp.zeros(3)}})
    assert step == 2 and state["params"]["w"][0] == 2 and (tmp_path / "damaged" / "4").is_dir()
    writer.save(4, state, config={}, nll=1.0)
    writer.close()
    again = Checkpoints(folder, read_only=True)
    assert again.best == 4
    again.close()


def test_training_says_it_if_all_checkpoints_are_damaged_and_touches_none(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in run.glob("checkpoints/*/metrics/metrics"):
        path.write_text("{")
    config = tmp_path / "c.py"
    config.write_text(
        "from tests.test_fuzz import light\n\n\ndef get_config():\n    return light()\n"
    )
    before = snapshot(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A line for every one that is passed over.
        told = call("train", f"--config={config}", f"--workdir={run}")
    assert told.code == 2 and told.err.count("\n") == 1, told
    assert "error: step: expected a complete checkpoint in " in told.err
    assert snapshot(run) == before


def jobs_of(root, seeds=(0, 1, 2)):
    configs = {f"seed={s}": algebra.configured(light(), {"seed": s}) for s in seeds}
    return sweeps.prepared(root, configs, sweeps.open_datasets(configs.values()))


@pytest.mark.parametrize("together", (True, False))
def test_a_point_that_cannot_be_read_is_named_and_stops_no_other(
    together, tmp_path, monkeypatch, capsys
):
    """What the sweep does; what the training of a group does is the slow test below."""
    root, done = tmp_path / "sweep", []
    error = Damaged("step: expected a complete checkpoint in 'x', got a damaged one.")

    def one(job, *, label, **_):
        if label == "seed=1":
            raise error
        done.append(label)

    def group(jobs, *, names, only, **_):
        if "seed=1" in only:
            raise Lost("seed=1", error)
        done.extend(only)
        monkeypatch.setattr(sweeps, "steps_done", lambda path: 4 if path.name in done else 0)

    monkeypatch.setattr(sweeps, "train", one)
    monkeypatch.setattr(sweeps, "train_together", group)
    jobs = jobs_of(root)
    sweeps.train_points(root, jobs, together=together)
    assert done == ["seed=0", "seed=2"]
    out = capsys.readouterr().out
    assert out.count(f"seed=1: {error}") == 1
    assert not sweeps.failed(root, "seed=1").exists(), "it may be mended"


@pytest.mark.slow
@pytest.mark.parametrize("together", (True, False))
def test_a_damaged_point_of_a_sweep_stops_no_other(together, tmp_path, capsys):
    root = tmp_path / "sweep"
    for job in jobs_of(root).values():
        train(job, stop_after=2, progress=False)
    lost = root / "points" / "seed=1"
    for path in lost.glob("checkpoints/*/metrics/metrics"):
        path.write_text("{")
    before = snapshot(lost)
    sweeps.train_points(root, jobs_of(root), together=together)
    out = capsys.readouterr().out
    assert out.count("seed=1: step: expected a complete checkpoint in ") == 1
    assert [sweeps.steps_done(root / "points" / f"seed={s}") for s in (0, 2)] == [4, 4]
    assert before.items() <= snapshot(lost).items()
    found = outcome.result(root, [{"seed": s} for s in (0, 1, 2)])
    assert [row["label"] for row in found.rows] == ["seed=0", "seed=2"] and found.pick is None
    gc.collect()


def test_a_point_whose_log_is_damaged_is_left_out_by_name(whole, tmp_path):
    root = tmp_path / "sweep"
    for seed in (0, 1):
        shutil.copytree(whole, root / "points" / f"seed={seed}")
    (root / "points" / "seed=1" / "metrics.jsonl").write_text('{"event": "eval", "step": 4}\n')
    with pytest.warns(UserWarning, match="seed=1: expected the files of a run, got damaged ones"):
        found = outcome.rows(root, [{"seed": 0}, {"seed": 1}])
    assert [row["label"] for row in found] == ["seed=0"]


def test_the_harness_sees_a_side_effect_a_traceback_and_a_bad_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(body):
        (tmp_path / "c.py").write_text(f"import pathlib\n\n\ndef get_config():\n    {body}\n")
        found = wrong(pathlib.Path(tmp_path), "train", ("--config=c.py", "--workdir=new"))
        for path in tmp_path.glob("*.txt"):
            path.unlink()
        return found

    assert said("raise ValueError('no')") is None
    assert "changed ['x.txt']" in said("pathlib.Path('x.txt').write_text('x')")
    assert "exit code 3" in said("raise SystemExit(3)")
    assert "KeyboardInterrupt" in said("raise KeyboardInterrupt")
    assert "not one sentence" in said("print(file=__import__('sys').stderr)")
