"""Searches: ranges, what Optuna proposes again after a restart, the command."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke
from experiments.studies import front, outcome, pinned, searching, sweeps
from meta_attention_jax.sweeps.search import SAMPLERS, Search
from meta_attention_jax.sweeps.space import choice, content_label, ends, integers, log_uniform, uniform
from meta_attention_jax.training.logs import read_metrics
from tests import making
from tests.test_commands import ROOT, check_mistake, check_success, command, environment  # noqa: F401
from tests.test_engine import until
from tests.test_sweep import final

RANGES = {
    "prior.strength": log_uniform(0.5, 32.0), "gate.price": uniform(0, 1), "data.num_pairs": integers(1, 4),
    "controller.fixed": choice(("full",), ("full", "local")), "controller.name": "bayesian", "seed": choice(0, 1),
}
LIGHT = making.light(steps=9, every=3)
CONFIG = making.config_file(LIGHT, """
def get_search():
    return {"optimizer.learning_rate": choice(1e-3, 1e-2, 1e30), "seed": choice(0, 1)}
""")


def light():
    config = smoke.get_config()
    config.update_from_flattened_dict(LIGHT)
    return config


def score(point):
    """Nats and cost in the place of training; None for a point that diverges."""
    if point["gate.price"] > 0.9:
        return None
    return [point["prior.strength"] * (1 + point["gate.price"]), 1 / point["prior.strength"] + point["data.num_pairs"]]


@pytest.mark.parametrize("call, sentence", [
    (lambda: log_uniform(3.0, 2.0), r"log_uniform: expected finite ends, the lower one first, got \(3.0, 2.0\)."),
    (lambda: log_uniform(0, 2.0), "log_uniform: expected ends > 0, got 0.0."),
    (lambda: uniform(1, 1), "uniform: expected finite ends"),
    (lambda: uniform(0, float("inf")), "uniform: expected finite ends"),
    (lambda: uniform(0, "1"), "uniform: expected a number, got '1'."),
    (lambda: integers(1, 2.0), "integers: expected an integer, got 2.0."),
    (lambda: choice(1), "choice: expected several values that differ, got"),
    (lambda: choice("a", "a"), "choice: expected several values that differ"),
    (lambda: searching.check(light(), RANGES, []), "objectives: expected one or several of nats, soft_nats, cost, got"),
    (lambda: searching.check(light(), RANGES, ["nats", "time"]), "objectives: expected .* got 'nats,time'."),
    (lambda: searching.check(light(), RANGES, ["nats", "nats"]), "objectives: expected"),
    (lambda: searching.check(light(), {"prior.strenght": uniform(0, 1)}, ["nats"]), "sweep: expected a field"),
    (lambda: searching.check(light(), {"seed": 0, "gate.end": uniform(0, 2)}, ["nats"]), "gate.end: expected a share"),
    (lambda: searching.check(light(), {f"a.field{i:02}": uniform(0, 1) for i in range(12)}, ["nats"]),
     "config: expected ranges whose names and values fit into the 200 characters of a point's name, got '252 of 12"),
    (lambda: searching.check(light(), {"model.window": uniform(1, 4)}, ["nats"]), "model.window: expected a value"),
])
def test_mistakes_in_ranges_and_objectives_are_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_ends_of_ranges_are_points_and_a_name_depends_on_its_point_alone():
    assert ends({"a": uniform(0, 1), "b": choice("x", "y", "z"), "c": 5}) == [
        {"a": 0.0, "b": "x", "c": 5}, {"a": 1.0, "b": "y", "c": 5}, {"a": 1.0, "b": "z", "c": 5}]
    one = {"prior.strength": 0.25, "controller.fixed": ("full", "local")}
    again = {"prior.strength": 0.25, "controller.fixed": ["full", "local"]}  # As JSON has it.
    other = {"prior.strength": 0.25000001, "controller.fixed": ("full", "local")}
    assert content_label(one) == content_label(again)
    assert content_label(one).startswith("strength=0.25,fixed=full+local,")
    assert len({content_label(one), content_label(other), content_label({**one, "seed": 1})}) == 3
    assert len(content_label({"name": "x" * 999})) == 200


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="search: expected the package optuna .extra optuna: .* got none"):
        searching.check(light(), RANGES, ["nats"])


def test_mistakes_of_the_file_and_the_command_come_before_any_work(command, tmp_path):  # noqa: F811
    path, root = tmp_path / "s.py", tmp_path / "new"
    for old, new, sentence in (
        ("get_search", "get_searches", r"config: expected a file that defines get_search\(\), got"),
        ("choice(1e-3, 1e-2, 1e30)", "log_uniform(2.0, 1.0)", r"log_uniform: .* the lower one first, got \(2.0, 1.0\)"),
        ("return {", "return 1 / 0, {", r"config: expected a get_search\(\) that runs in .* ZeroDivisionError"),
        ("return {", "return {'seed': 0} or {", "config: expected .* a dict of fields, one with a range at least"),
    ):
        path.write_text(CONFIG.replace(old, new))
        with pytest.raises(ValueError, match=sentence):
            sweeps.load_search(path)
    path.write_text(CONFIG)
    for flags, sentence in (
        (("--search=optuna", "--objectives=time"), "objectives: expected one or several of nats, soft_nats, cost, got"),
        (("--search=optuna", "--trials=0"), "trials: expected"),
        (("--search=optuna", "--group=0"), "group: expected --search=grid with it, got 0"),
        (("--trials=3",), "trials: expected --search=optuna with it, got 3"),
        (("--devices_per_group=4",), "devices_per_group: expected --engine=ray with it, got 4"),
    ):
        check_mistake(command("sweep", f"--config={path}", f"--workdir={root}", *flags), sentence)
    assert not root.exists()


def batches_of(search, known, count):
    """Batches 0 to count - 1 of a search, those that are known given again, all told."""
    made = []
    for number in range(count):
        made.append(search.ask(number, 6, known[number] if number < len(known) else ()))
        search.tell([score(point) for point in made[-1]])
    return made


@pytest.fixture
def quick(monkeypatch):
    """Every line of the journal is synced, which some disks take long for."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.optuna
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_is_told_the_same_proposes_the_same(sampler, tmp_path, quick):
    import optuna

    new = lambda name: Search(tmp_path / name, RANGES, ["nats", "cost"], sampler, seed=3, at_once=6)  # noqa: E731
    whole = batches_of(new("whole.log"), (), 3)
    points = [point for batch in whole for point in batch]
    assert any(score(point) is None for point in points), "one has to diverge"
    for point in points:
        assert 0.5 <= point["prior.strength"] <= 32 and point["data.num_pairs"] in range(1, 5)
        assert point["prior.strength"] == float(f"{point['prior.strength']:.6g}")
        assert point["controller.fixed"] in RANGES["controller.fixed"].values and point["seed"] in (0, 1)
        assert list(point) == list(RANGES) and point["controller.name"] == "bayesian"
    for cut in (1, 2):
        known = json.loads(json.dumps(whole[:cut]))  # As `sweep.json` has them.
        (tmp_path / "cut.log").write_bytes((tmp_path / "whole.log").read_bytes()[:-40])  # A last line cut in half,
        (tmp_path / "cut.log.lock").touch()  # and the lock of one that was killed while it wrote.
        assert batches_of(new("cut.log"), known, 3) == whole
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "cut.log"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    assert [trial.values for trial in study.trials] == [score(point) for point in points]
    assert [trial.state.name for trial in study.trials] == ["FAIL" if not score(p) else "COMPLETE" for p in points]
    other = Search(tmp_path / "other.log", RANGES, ["nats", "cost"], sampler, seed=4, at_once=6)
    assert batches_of(other, (), 1) != whole[:1]


class Killed(BaseException):
    pass


@pytest.fixture
def untrained(monkeypatch, quick):
    """Points whose rows are what `score` says, and which were trained, in order; `die` says before which it is killed,
    and whether once its batch is pinned."""
    trained, die = [], {}

    def rows(root, points):
        ended = {label: score(point) for label, point in points.items() if (root / "points" / label).exists()}
        return [
            {"label": label, **({"nll_hard": found[0], "cost": found[1]} if found else {"diverged": "x"})}
            for label, found in ended.items()
        ]

    def train(root, new, shared):
        if die.get(len(trained)) == "asked":
            raise Killed
        pinned.pin(root / "sweep.json", shared, "this search", searching.GROWING)
        for label in new:
            if die.pop(len(trained), None):
                raise Killed
            if not (root / "points" / label).exists():
                (root / "points" / label).mkdir(parents=True)
                trained.append(label)

    def search(root, **fields):
        options = {"sampler": "nsga2", "trials": 10, "at_once": 4} | fields
        return searching.search(root, light(), RANGES, ["nats", "cost"], **options,
                                train=lambda new, shared: train(root, new, shared))

    monkeypatch.setattr(outcome, "rows", rows)
    monkeypatch.setattr(outcome, "write_results", lambda *_, **__: None)
    return search, trained, die


@pytest.mark.optuna
def test_killed_before_any_point_it_goes_on_with_every_trial_once(untrained, tmp_path, capsys):
    search, trained, die = untrained
    whole = search(tmp_path / "whole")
    labels = list(trained)
    assert list(whole) == labels and 8 < len(labels) <= 10
    stored = (tmp_path / "whole" / "sweep.json").read_text()
    for place, when in ((0, "asked"), (4, "asked"), (0, "pinned"), (3, "pinned"), (6, "pinned"), (8, "pinned")):
        trained.clear()
        die[place] = when
        root = tmp_path / f"{when}{place}"
        with pytest.raises(Killed):
            search(root)
        die.clear()
        journal = root / searching.JOURNAL
        if place == 3:
            journal.unlink()
        else:
            journal.write_bytes(journal.read_bytes()[: 100 * place])
        assert search(root) == whole and trained == labels
        assert (root / "sweep.json").read_text() == stored
    assert search(tmp_path / "whole", trials=12).items() > whole.items()  # It may have more trials, not fewer.
    for fields, sentence in (
        ({"trials": 11}, "error: trials: expected at least the 12 that"),
        ({"at_once": 5}, "error: search.trials_at_once: expected 4"),
        ({"sampler": "tpe"}, "error: search.sampler: expected 'nsga2'"),
    ):
        with pytest.raises(SystemExit):
            search(tmp_path / "whole", **fields)
        assert sentence in capsys.readouterr().err


@pytest.mark.optuna
def test_a_point_that_is_proposed_again_is_told_and_not_trained_again(untrained, tmp_path, monkeypatch, capsys):
    search, trained, _ = untrained
    told = []
    monkeypatch.setattr(Search, "tell", lambda self, scores: told.append(scores))
    monkeypatch.setattr(Search, "ask", lambda self, number, count, known=(): [
        {"prior.strength": 1.0 + i // 2, "gate.price": 0.0, "data.num_pairs": 1} for i in range(number, number + count)
    ])
    assert list(search(tmp_path / "a", trials=8, at_once=4)) == trained and len(trained) == len(set(trained)) == 3
    assert [len(scores) for scores in told] == [4, 4] and told[0][1:] == told[0][1:2] + told[1][1:3]
    shutil.rmtree(tmp_path / "a" / "points" / trained[0])
    monkeypatch.setattr(pinned, "pin", lambda *_: None)
    with pytest.raises(SystemExit):  # What no row comes of stops it.
        searching.search(tmp_path / "a", light(), RANGES, ["nats", "cost"], sampler="nsga2", trials=8, at_once=4,
                         train=lambda new, shared: None)
    assert "search: expected all points of a batch to come to their end" in capsys.readouterr().err


@pytest.mark.optuna
def test_two_commands_on_one_directory_do_not_both_search(untrained, tmp_path, capsys):
    search, _, _ = untrained
    search(tmp_path / "a", trials=1)
    with searching.hold(tmp_path / "a"):
        with pytest.raises(SystemExit):
            search(tmp_path / "a")
    assert "workdir: expected" in capsys.readouterr().err


FLAGS = ("--search=optuna", "--trials=6", "--trials_at_once=3", "--objectives=nats", "--test_batches=1")


@pytest.mark.optuna
def test_the_command_searches_and_reads_the_test_split_of_the_chosen_alone(command, tmp_path):  # noqa: F811
    (tmp_path / "s.py").write_text(CONFIG)
    config, root = f"--config={tmp_path / 's.py'}", tmp_path / "sweep"
    out = check_success(command("sweep", config, f"--workdir={root}", *FLAGS))
    assert "trials 4 to 6 of 6" in out and "nothing is chosen yet" in out and out.count("chosen: ") == 1
    rows, stored = (json.loads((root / name).read_text()) for name in ("rows.json", "sweep.json"))
    assert [row["label"] for row in rows] == list(stored["points"])
    assert sum(map(len, stored["batches"].values())) == 6 and len(stored["batches"]) == 2
    assert {"diverged" in row for row in rows} == {True, False}
    pick = {row["setting"] for row in rows if "test" in row}
    assert len(pick) == 1 and len(list(root.glob("points/*/test.json"))) == sum("test" in row for row in rows)
    assert (root / "pareto.png").stat().st_size > 0 and "chosen" in (root / "table.md").read_text()
    # A run that is lost and a journal that is cut: the run is trained again, in its place in its program.
    shutil.rmtree(root / "points" / next(row["label"] for row in rows if "diverged" not in row))
    (root / searching.JOURNAL).write_text("{")
    before = (root / "rows.json").read_bytes()
    out = check_success(command("sweep", config, f"--workdir={root}", *FLAGS))
    assert out.count("\ntrials ") == 1 and (root / "rows.json").read_bytes() == before
    check_success(command("report", f"--workdir={root}"))
    check_mistake(command("sweep", "--config=configs/sweep_timing.py", f"--workdir={root}"), "still, as in")


def test_a_front_is_reached_by_the_first_point_within_its_intervals():
    line = {"setting": "a", "nll_hard": 1.5, "nll_hard_pm": 0.1, "cost": 0.2, "cost_pm": 0.0}
    row = lambda label, nats, cost: {"label": label, "nll_hard": nats, "cost": cost}  # noqa: E731
    found = [{"label": "x", "diverged": "nan"}, row("y", 1.4, 0.3), row("z", 1.59, 0.2), row("w", 1.0, 0.2)]
    assert [(one["points"], one["by"]) for one in front.reached([line], found)] == [(3, "z")]
    assert front.reached([line], found[:2])[0]["points"] is None
    assert front.hypervolume(found, (1.0, 2.0)) == pytest.approx(0.8 * 1.0)
    assert front.hypervolume(found[:3], (1.0, 2.0)) == pytest.approx(0.7 * 0.6 + 0.1 * 0.41)


@pytest.mark.optuna
@pytest.mark.slow
def test_ten_kills_of_the_command_change_no_bit(tmp_path):
    (tmp_path / "s.py").write_text(CONFIG)

    def start(root):
        line = [sys.executable, "-m", "experiments.sweep", f"--config={tmp_path / 's.py'}", f"--workdir={root}", *FLAGS]
        return subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ended(process):
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err.decode()

    def check(root):
        for name in ("rows.json", "sweep.json"):
            assert (root / name).read_bytes() == (whole / name).read_bytes()
        assert sorted(os.listdir(root / "points")) == sorted(os.listdir(whole / "points"))
        for row in json.loads((root / "rows.json").read_text()):
            if "diverged" not in row:
                log = read_metrics(root / "points" / row["label"])
                assert [r["step"] for r in log if r["event"] == "eval"] == [3, 6, 9]
                assert [r["event"] for r in log].count("start") == 1
                jax.tree.map(np.testing.assert_array_equal, final(root, row["label"], 9), final(whole, row["label"], 9))

    ended(start(whole := tmp_path / "whole"))
    files = lambda root: sum(1 for _ in root.rglob("*"))  # noqa: E731
    draw, root = random.Random(22), tmp_path / "killed"
    for _ in range(10):
        process, most = start(root), files(root) + draw.randint(1, files(whole) // 8)
        until(lambda: files(root) >= most or process.poll() is not None)
        assert process.poll() is None, "it ended before the kills; give it more trials"
        process.kill()
        process.communicate()
    ended(start(root))
    check(root)
