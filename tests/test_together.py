"""Points of a sweep trained as one program are what they would have been alone."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps import together
from meta_attention_jax.sweeps.group import Group, bytes_needed, point_of, points_that_fit
from meta_attention_jax.training import parallel
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.step import gradient_sums, init_state, train_step
from tests.close import assert_close, distance

POINTS = algebra.zipped(
    algebra.sweep("prior.strength", (0.5, 2.0, 8.0)),
    algebra.sweep("seed", (3, 4, 5)),
    algebra.sweep("optimizer.learning_rate", (0.05, 0.1, 0.02)),
    algebra.sweep("objective.beta", (0.0, 0.01, 0.1)),
    algebra.sweep("gate.start", (0.2, 0.4, 0.1)),
    algebra.sweep("prior.costs", ("nominal", "1,0.5,0.5", "analytic")),
)


def base(**changes):
    config = smoke.get_config()
    config.optimizer.name = "sgd"
    config.model.num_layers = 1
    config.train.steps = 20
    config.gate.end = 0.8
    config.update_from_flattened_dict(changes)
    return config


def prepared(root, config, points=POINTS):
    return [
        prepare(algebra.configured(config, one), root / str(index))
        for index, one in enumerate(points)
    ]



@pytest.mark.slow
def test_gradients_are_those_of_the_runs_alone(tmp_path):
    jobs = prepared(tmp_path, base())
    spec, batch = jobs[0].spec, jobs[0].dataset.train_batch(0)
    gradients = jax.jit(jax.vmap(functools.partial(gradient_sums, spec), in_axes=(0, None, 0)))
    group = Group(jobs, jax.devices()[:1])
    found, _ = gradients(group.states(), batch, group.hypers)
    norms = []
    # The specs differ in the gate's times alone, which the hypers overrule.
    gradient = jax.jit(functools.partial(gradient_sums, spec))
    for index, job in enumerate(jobs):
        state = init_state(spec, jax.random.key(job.config.seed), batch, job.hypers)
        alone, _ = gradient(state, batch, job.hypers)
        norms.append(float(jnp.linalg.norm(jnp.stack([jnp.linalg.norm(g) for g in jax.tree.leaves(alone)]))))
        assert_close(point_of(found, index), alone)
    assert len({round(norm, 3) for norm in norms}) == 3  # The points do differ.


@pytest.mark.parametrize("turns", [True, False], ids=("in turn", "vmapped"))
def test_parameters_are_those_of_the_runs_alone(tmp_path, turns):
    jobs = prepared(tmp_path, base())
    spec, batches = jobs[0].spec, [jobs[0].dataset.train_batch(number) for number in range(20)]
    group = Group(jobs, jax.devices()[:1], turns)
    many = group.states()
    for batch in batches:
        many, _ = group.step(many, group.replicate(batch), group.hypers, group.frozen)
    one = jax.jit(functools.partial(train_step, spec))
    initial = jax.jit(lambda key, hypers: init_state(spec, key, batches[0], hypers))
    ends = []
    for index, job in enumerate(jobs):
        state = initial(jax.random.key(job.config.seed), job.hypers)
        for batch in batches:
            state, _ = one(state, batch, job.hypers)
        assert_close(point_of(many.params, index), state.params)
        ends.append(state.params)
    assert all(distance(a, b) > 1e-3 for a, b in itertools.combinations(ends, 2))


SHORT = {"train.steps": 12, "train.eval_every": 6, "train.checkpoint_every": 6}
LIGHT = {"controller.name": "fixed", "controller.fixed": ("local",)}  # Compiles in no time.
QUIET = dict(label="x", names=["a", "b"], progress=False)


@pytest.mark.slow
def test_directories_are_those_of_ordinary_runs_interrupted_or_not(tmp_path):
    config = base(**SHORT)
    jobs = prepared(tmp_path / "many", config, POINTS[:2])
    assert together.train_together(jobs, **QUIET) == [None, None]

    parts = prepared(tmp_path / "parts", config, POINTS[:2])
    together.train_together(parts, stop_after=6, **QUIET)
    assert read_metrics(parts[0].path)[-1]["step"] == 6
    together.train_together(prepared(tmp_path / "parts", config, POINTS[:2]), start=6, **QUIET)
    for part, whole in zip(parts, jobs):
        a, b = read_metrics(part.path)[-1], read_metrics(whole.path)[-1]
        assert a == b and a["step"] == 12

    index, one = 1, POINTS[1]
    alone = prepare(algebra.configured(config, one), tmp_path / "alone")
    train(alone, progress=False)
    left, right = read_metrics(jobs[index].path), read_metrics(alone.path)
    assert [(r["event"], r["step"]) for r in left] == [(r["event"], r["step"]) for r in right]
    assert left[0].pop("together") == ["a", "b"]
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        assert a.get("nll", 0) == pytest.approx(b.get("nll", 0), rel=1e-4)
    assert left[-1]["hard"]["nll"] == pytest.approx(right[-1]["hard"]["nll"], rel=1e-4)
    assert left[-1]["hard"]["cost"] == pytest.approx(right[-1]["hard"]["cost"], abs=0.02)
    saved = Checkpoints(jobs[index].path / "checkpoints", read_only=True)
    reference = Checkpoints(alone.path / "checkpoints", read_only=True)
    params = saved.restore_params(12)
    assert_close(params, reference.restore_params(12))
    assert saved.best == reference.best
    saved.close()
    reference.close()
    # And goes on alone: the whole state is there.
    longer = prepare(algebra.configured(config, one), jobs[index].path)
    assert train(longer, progress=False)["hard"]["nll"] == left[-1]["hard"]["nll"]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [True, False], ids=("in turn", "vmapped"))
def test_a_point_that_diverges_stops_no_other(tmp_path, monkeypatch, turns):
    monkeypatch.setattr(together, "Group", functools.partial(Group, turns=turns))
    points = algebra.zipped(
        algebra.sweep("optimizer.learning_rate", (0.05, 1e30, 0.05)), algebra.sweep("seed", (0, 1, 2))
    )
    config = base(**{"train.steps": 10, "train.eval_every": 5, "train.checkpoint_every": 5, **LIGHT})
    jobs = prepared(tmp_path, config, points)
    told = {}
    failures = together.train_together(
        jobs, label="x", names=["a", "b", "c"], progress=False, failed=told.__setitem__
    )
    assert failures[0] is None and failures[2] is None and told == {"b": failures[1]}
    assert "expected finite numbers" in failures[1] and "no checkpoint is kept" in failures[1]
    ends = [read_metrics(job.path)[-1]["step"] for job in jobs]
    assert ends[0] == ends[2] == 10 and ends[1] == 0
    assert not list((jobs[1].path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_groups_that_do_not_fit_are_trained_in_parts(tmp_path, capsys):
    config = base(**{"train.steps": 4, "train.eval_every": 4, "train.checkpoint_every": 4, **LIGHT})
    jobs = prepared(tmp_path, config, POINTS)
    group = Group(jobs, jax.devices()[:1])
    needed = group.needed()
    assert needed >= bytes_needed(group.step) > 0
    failures = together.train_together(
        jobs, label="x", names=["a", "b", "c"], memory=needed - 1
    )
    assert failures == [None] * 3
    sizes = [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()
             if "as one program" in line]
    assert sizes == ["2", "1"]
    assert all(read_metrics(job.path)[-1]["step"] == 4 for job in jobs)


@pytest.mark.parametrize(
    "needed, one, points, memory, fit",
    [
        (110, 20, 10, 109, 9),  # 10 fixed, 10 each
        (110, 20, 10, 60, 5),
        (110, 20, 10, 59, 4),
        (110, 20, 10, 5, 1),  # Not even one: it is tried all the same.
        (110, 20, 10, 1000, 10),
        (20, 20, 2, 19, 1),
    ],
)
def test_as_many_points_as_fit(needed, one, points, memory, fit):
    assert points_that_fit(needed, one, points, memory) == fit


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, field, values",
    [
        ({}, "prior.preference", (0.1, 10.0)),
        ({"controller.name": "cost_penalty"}, "objective.beta", (0.1, 10.0)),
        ({"controller.name": "cost_penalty", "objective.beta": 1.0}, "controller.entropy_bonus",
         (0.0, 2.0)),
        ({"controller.name": "gumbel", "controller.temperature_start": 4.0}, "gate.end", (0.5, 0.9)),
        ({"gate.kind": "settled"}, "gate.threshold", (0.3, 1.0)),
        ({"gate.kind": "settled"}, "gate.start", (0.1, 0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_array_input_counts_under_vmap(tmp_path, changes, field, values):
    changes = {**changes, "optimizer.learning_rate": 0.2, "gate.end": 0.8}
    jobs = prepared(tmp_path, base(**changes), algebra.sweep(field, values))
    group = Group(jobs, jax.devices()[:1], turns=False)
    many = group.states()
    alone = [point_of(many, index) for index in range(2)]
    # Each with the spec of its own config.
    ones = [jax.jit(functools.partial(train_step, job.spec)) for job in jobs]
    for number in range(20):
        if number == 1:  # As if a hundred steps had passed: a settled gate opens when it may.
            waited = lambda s: s.replace(gate=s.gate.replace(count=s.gate.count + 200))  # noqa: E731
            many, alone = waited(many), [waited(state) for state in alone]
        batch = jobs[0].dataset.train_batch(number)
        many, metrics = group.step(many, group.replicate(batch), group.hypers, group.frozen)
        for index, job in enumerate(jobs):
            alone[index], scalars = ones[index](alone[index], batch, job.hypers)
            assert float(metrics["threshold"][index]) == pytest.approx(float(scalars["threshold"]))
    for index in range(2):
        assert_close(point_of(many.params, index), alone[index].params)
    assert distance(alone[0].params, alone[1].params) > 1e-4  # The field does count.


@pytest.mark.slow
def test_points_on_several_devices_are_those_on_one_resumed_or_not(tmp_path):
    root = pathlib.Path(__file__).parent.parent
    two = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    for how, flags in {"devices": two, "cores": os.environ["XLA_FLAGS"]}.items():
        env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, str(root / "tests" / "points_check.py"), str(tmp_path), how],
            env=env, capture_output=True, text=True, timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    # All at once; on as many as were asked for; and by the memory of less than one, one after another.
    said = [(line.split()[1], line[-7:]) for line in done.stdout.splitlines() if "one program" in line]
    assert said == [("3", "3 x cpu"), ("3", "1 x cpu"), *[("1", "1 x cpu")] * 3]
    ways = ("one", "two", "parts", "cores", "short")
    for index in range(3):
        logs = [read_metrics(tmp_path / name / str(index)) for name in ways]
        states = []
        for name in ways:
            saved = Checkpoints(tmp_path / name / str(index) / "checkpoints", read_only=True)
            assert saved.steps == (6, 12)
            states.append(saved.restore_params(12))
            saved.close()
        assert_close(states[1], states[0])
        for state in states[3:]:
            assert_close(state, states[0])
        jax.tree.map(np.testing.assert_array_equal, states[2], states[1])
        for log in logs[1:]:
            assert log[-1]["step"] == 12
            for mode in ("soft", "hard"):
                assert log[-1][mode]["nll"] == pytest.approx(logs[0][-1][mode]["nll"], rel=1e-5)


def test_where_there_are_devices_cores_become_none():
    before = jax.devices()
    parallel.device_per_core()
    assert jax.devices() == before == parallel.for_run() == parallel.for_points(before) and not parallel._cores
    assert 1 <= parallel.cores() <= os.cpu_count()


@pytest.mark.parametrize(
    "said, expected", [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)]
)
def test_cores_are_a_containers_part_of_all(monkeypatch, said, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: said)
    assert parallel.cores() == expected


def test_jobs_of_several_programs_are_refused(tmp_path):
    points = algebra.sweep("model.window", (4, 5))
    with pytest.raises(ValueError, match="points of one program"):
        together.train_together(
            prepared(tmp_path, base(), points), label="x", names=["a", "b"], progress=False
        )
    assert json.loads((tmp_path / "0" / "config.json").read_text())["name"] == "smoke"
