"""The sweep command: points, groups, resuming, divergence, results."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from experiments.studies import outcome, pinned, sweeps
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.together import train_together
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.processes import hold
from tests.test_commands import ROOT, check_mistake, check_success, command, environment  # noqa: F401

CONFIG = '''
from configs import smoke
from meta_attention_jax.sweeps.space import chain, point, product, sweep


def get_config():
    config = smoke.get_config()
    config.name = "try <i>"
    config.model.num_layers = 1
    config.controller.name = "softmax"
    config.train.steps = 6
    config.train.eval_every = config.train.checkpoint_every = 6
    return config


def get_sweep():
    return chain(
        product(sweep("optimizer.learning_rate", (1e-3, 3e-3, 1e30)), sweep("seed", (0, 1))),
        point(name="local", **{"controller.name": "fixed", "controller.fixed": ("local",)}),
    )
'''


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "sweep_try.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.mark.slow
def test_groups_fill_one_directory_and_the_last_tells_all(command, config, tmp_path):  # noqa: F811
    root = tmp_path / "sweep"
    first = check_success(
        command("sweep", config, f"--workdir={root}", "--group=1", "--test_batches=1")
    )
    assert not list(root.glob("points/*/test.json"))  # The test split waits for the last point.
    out = check_success(
        command("sweep", config, f"--workdir={root}", "--group=0", "--test_batches=1")
    )
    names = [f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.003") for seed in (0, 1)]
    for name in [*names, "local"]:
        assert read_metrics(root / "points" / name)[-1]["step"] == 6
    for seed in (0, 1):
        assert "expected finite" in (root / "points" / f"learning_rate=1e+30,seed={seed}.diverged").read_text()
    rows = json.loads((root / "rows.json").read_text())
    assert len(rows) == 7
    tested = {row["setting"] for row in rows if "test" in row}
    assert len(tested) == 1 and tested.pop().startswith("learning_rate=0.00")
    table = (root / "table.md").read_text()
    assert table.count("chosen") == 1 and "local" in table
    for name in ("pareto.png", "against.png", "table.csv"):
        assert (root / name).stat().st_size > 0
    assert "local: " in first and "6 runs of" in out and "as one program" in out
    # A point is an ordinary run.
    check_success(command(
        "evaluate", f"--workdir={root / 'points' / 'local'}", "--max_batches=1"
    ))
    for path, kind in ((root, "sweep"), (root / "points" / names[0], "run")):
        told = check_success(command("report", f"--workdir={path}"))
        assert told.startswith(f"{kind}: ")
        page = (path / "report" / "index.html").read_text()
        assert "<i>" not in page and "&lt;i&gt;" in page and "://" not in page
        assert "<script" not in page and "data:image/png;base64" in page
    again = check_success(command("sweep", config, f"--workdir={root}"))
    assert "as one program" not in again and "chosen:" in again


LIGHT = {"controller.name": "fixed", "controller.fixed": ("local",), "model.num_layers": 1,
         "train.steps": 6, "train.eval_every": 2, "train.checkpoint_every": 2, "train.eval_batches": 1,
         "parallel.devices": 1}
LIGHT_POINTS = algebra.sweep("seed", (0, 1, 2))


def light(root, points=LIGHT_POINTS):
    config = smoke.get_config()
    config.update_from_flattened_dict(LIGHT)
    configs = dict(zip(algebra.labels(points), (algebra.configured(config, p) for p in points)))
    return sweeps.prepared(root, configs, sweeps.open_datasets(configs.values()))


def final(root, label, step=6):
    saved = Checkpoints(root / "points" / label / "checkpoints", read_only=True)
    try:
        return saved.restore_params(step)
    finally:
        saved.close()


@pytest.mark.slow
def test_points_that_were_left_at_different_steps_end_as_if_never_left(tmp_path, capsys):
    sweeps.train_points(tmp_path / "whole", light(tmp_path / "whole"))
    root = tmp_path / "left"
    jobs = light(root)
    for label, step in (("seed=0", 2), ("seed=1", 4)):  # As one that was killed while it saved.
        train_together(list(jobs.values()), names=list(jobs), only=[label], stop_after=step, label="", progress=False)
    assert [sweeps.steps_done(job.path) for job in jobs.values()] == [2, 4, 0]
    with hold(jobs["seed=2"].path):  # By another process.
        sweeps.train_points(root, light(root))
        assert "seed=2: left to the process that trains it." in capsys.readouterr().out
    found = outcome.result(root, LIGHT_POINTS)
    assert len(found.rows) == 2 and found.pick is None and found.title == " (2 of 3 points)"
    sweeps.train_points(root, light(root))
    found = outcome.result(root, LIGHT_POINTS)
    assert found.pick is not None and found.title == ""
    for label in algebra.labels(LIGHT_POINTS):
        jax.tree.map(np.testing.assert_array_equal, final(root, label), final(tmp_path / "whole", label))
    assert [r["step"] for r in read_metrics(jobs["seed=0"].path) if r["event"] == "eval"] == [2, 4, 6]


@pytest.mark.slow
def test_two_processes_at_once_train_no_point_twice(command, tmp_path):  # noqa: F811
    path = tmp_path / "shared.py"
    path.write_text(f"""
from configs import smoke
from meta_attention_jax.sweeps.space import sweep

def get_config():
    config = smoke.get_config()
    config.update_from_flattened_dict({LIGHT!r})
    return config

def get_sweep():
    return sweep("seed", range(4))
""")
    root = tmp_path / "sweep"
    arguments = [f"--config={path}", f"--workdir={root}", "--test_batches=1"]
    both = [
        subprocess.Popen([sys.executable, "-m", "experiments.sweep", *arguments], cwd=ROOT, env=environment(),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # Of the same points: as a scheduler that starts a job twice.
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in err, out + err
    check_success(command("sweep", *arguments))
    rows = json.loads((root / "rows.json").read_text())
    assert sorted(row["seed"] for row in rows) == [0, 1, 2, 3]
    for row in rows:
        log = read_metrics(root / "points" / row["label"])
        assert [r["event"] for r in log].count("start") == 1 and log[-1]["step"] == 6
    assert not list(root.glob(".*"))


def line(setting, nll, cost, diverged=0, **point):
    return {"setting": setting, "point": point, "seeds": 2, "diverged": diverged,
            "nll_hard": nll, "cost": cost}


def test_survivors_of_a_diverging_setting_are_no_front():
    made = [line("a", 1.0, 0.5), line("b", 0.9, 0.4, diverged=1), line("c", 1.1, 0.3),
            line("d", 1.2, 0.6)]
    assert outcome.front(made) == ["c", "a"]
    assert outcome.chosen(made) == "a"


def test_the_frame_has_a_column_per_swept_field():
    made = [line("strength=1", 1.0, 0.5, **{"prior.strength": 1.0}),
            line("full", 1.0, 1.0, name="full")]
    found = outcome.Result(rows=[], lines=made, front=[], pick=None, total=3)
    frame = found.frame()
    assert list(frame.columns[:4]) == ["setting", "prior.strength", "name", "seeds"]
    assert frame["prior.strength"][0] == 1.0 and np.isnan(frame["prior.strength"][1])
    assert found.title == " (0 of 3 points)"


def test_a_pinned_sweep_may_grow_and_log_anew_but_not_change(tmp_path):
    path = tmp_path / "sweep" / "sweep.json"
    shared = {"config": {"train": {"log_every": 5, "steps": 9}}, "points": {"a": {"seed": 0}}}
    pinned.pin(path, shared, "this sweep", grows=["points"])
    more = {"config": {"train": {"log_every": 1, "steps": 9}},
            "points": {"a": {"seed": 0}, "b": {"seed": 1}}}
    pinned.pin(path, more, "this sweep", grows=["points"])
    stored = json.loads(path.read_text())
    assert stored == {"config": shared["config"], "points": more["points"]}
    for wrong, field in (
        ({**more, "points": {"a": {"seed": 3}, "b": {"seed": 1}}}, "points.a.seed: expected 0"),
        ({**more, "points": {"b": {"seed": 1}}}, "points: expected 'a' still, .* got none"),
        ({**more, "points": {"b": {"seed": 1}, "": {"seed": 0}}}, "points: expected 'a' still"),
        ({**more, "config": {"train": {"log_every": 1, "steps": 8}}}, "config.train.steps"),
    ):
        with pytest.raises(ValueError, match=field):
            pinned.pin(path, wrong, "this sweep", grows=["points"])
    assert json.loads(path.read_text()) == stored
    # A label that another one begins with is another label.
    path = tmp_path / "other" / "sweep.json"
    pinned.pin(path, {"points": {"s=1.5": {"s": 1.5}, "s=2": {"s": 2}}}, "this sweep", grows=["points"])
    with pytest.raises(ValueError, match="points: expected 's=1.5' still"):
        pinned.pin(path, {"points": {"s=1": {"s": 1}, "s=2": {"s": 2}}}, "this sweep", grows=["points"])


def test_test_scores_are_those_of_the_chosen_setting_alone(tmp_path, monkeypatch):
    rows = [
        {"label": s, "setting": s, "point": {"p": s}, "seed": 0, "nll_hard": nll, "cost": cost,
         "test": {"nll_hard": 1.0, "cost": 0.5}}
        for s, nll, cost in (("a", 1.0, 0.5), ("b", 1.001, 0.4), ("c", 0.9, 0.9))
    ]  # "b" was chosen before the sweep grew by "c".
    monkeypatch.setattr(outcome, "rows", lambda root, points: rows)
    found = outcome.result(tmp_path, [row["point"] for row in rows])
    assert found.pick == "c"
    assert [row["label"] for row in found.rows if "test" in row] == ["c"]
    assert [line["setting"] for line in found.lines if "test_cost" in line] == ["c"]


@pytest.mark.slow
def test_a_report_of_nothing_is_one_line(command, tmp_path):  # noqa: F811
    check_mistake(command("report", f"--workdir={tmp_path}"), "workdir: expected the directory of")


def test_mistakes_come_before_any_work(command, config, tmp_path):  # noqa: F811
    check_mistake(
        command("sweep", "--config=configs/smoke.py", f"--workdir={tmp_path / 'a'}"),
        "get_sweep",
    )
    check_mistake(
        command("sweep", config, f"--workdir={tmp_path / 'b'}", "--group=2"),
        "group: expected one of 2, from 0, got 2",
    )
    bad = tmp_path / "bad.py"
    bad.write_text(CONFIG.replace('"seed"', '"sede"'))
    check_mistake(
        command("sweep", f"--config={bad}", f"--workdir={tmp_path / 'c'}"), "sede"
    )
    check_mistake(
        command("sweep", config, f"--workdir={tmp_path / 'd'}", "--config.data.corpus=path:/none"),
        "/none",
    )
    assert not (tmp_path / "d").exists(), "the corrected command must be free to use it"
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    check_mistake(command("sweep", config, f"--workdir={tmp_path / 'full'}"), "workdir")


GROWING = '''
from configs import smoke
from meta_attention_jax.sweeps.space import product, sweep


def get_config():
    config = smoke.get_config()
    config.update_from_flattened_dict({light})
    return config


def get_sweep():
    return product(sweep("optimizer.learning_rate", {rates}), sweep("seed", {seeds}))
'''


@pytest.mark.slow
def test_a_sweep_grows_by_a_second_value_of_a_field(command, tmp_path):  # noqa: F811
    path, root = tmp_path / "grows.py", tmp_path / "sweep"
    flags = (f"--config={path}", f"--workdir={root}", "--test_batches=0")
    trained = {}
    for rates, seeds in (((0.01,), (0,)), ((0.01,), (0, 1, 2)), ((0.01, 0.003), (0, 1, 2))):
        path.write_text(GROWING.format(light=LIGHT, rates=rates, seeds=seeds))
        out = check_success(command("sweep", *flags))
        rows = {row["label"]: row["nll_hard"] for row in json.loads((root / "rows.json").read_text())}
        assert len(rows) == len(rates) * len(seeds)
        assert trained.items() <= rows.items()  # Nothing was trained anew under another name.
        assert len(list((root / "points").glob("*/config.json"))) == len(rows)
        trained = rows
    assert "3" in (root / "table.md").read_text() and "chosen: learning_rate=" in out
    assert "point" in trained
    check_success(command("report", f"--workdir={root}"))
    path.write_text(GROWING.format(light=LIGHT, rates=(0.01,), seeds=(0, 1)))
    check_mistake(command("sweep", *flags), "expected")
