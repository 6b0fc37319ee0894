"""Parameters split over devices, several processes, and programs for TPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from configs import smoke
from meta_attention_jax.analysis import hlo
from meta_attention_jax.controller.baselines import CONTROLLERS
from meta_attention_jax.sharding import split_axis
from meta_attention_jax.training import aot, build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from tests import making
from tests.close import assert_close
from tests.fuzz_harness import call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
WITHOUT_LIBTPU = importlib.util.find_spec("libtpu") is None


def environment(devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("scanned", (False, *making.slow(True)))
def test_every_matrix_has_a_rule_and_its_axis_is_a_width(controller, scanned):
    config = smoke.get_config()
    config.controller.name = controller
    config.model.scan_layers = scanned
    params = aot.abstract_state(config, 96).params
    widths = {config.model.model_dim, config.controller.hidden}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, axis = jax.tree_util.keystr(path), split_axis(path)
        if re.search(r"(kernel|embedding)'\]$", name):
            assert axis is not None and leaf.shape[axis] in widths, (name, leaf.shape)
        else:
            assert axis is None, name


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"parallel.fsdp": 3}, r"parallel.fsdp: expected a divisor of the 8 devices, got 3."),
        ({"parallel.fsdp": 8, "model.model_dim": 36, "model.num_heads": 2},
         r"model.model_dim: expected a multiple of parallel.fsdp = 8, got 36."),
        ({"parallel.fsdp": 8, "controller.hidden": 12},
         r"controller.hidden: expected a multiple of parallel.fsdp = 8, got 12."),
        ({"parallel.fsdp": 2, "parallel.mode": "pmap"},
         r"parallel.mode: expected 'jit' with parallel.fsdp = 2, got 'pmap'."),
        ({"parallel.fsdp": 0}, r"parallel.fsdp: expected a number > 0, got 0."),
    ],
)
def test_what_cannot_be_split_is_one_sentence(changes, sentence):
    config = smoke.get_config()
    config.update_from_flattened_dict({"data.batch_size": 8, **changes})
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        build.validate_without_devices(config)
        build.check_parallel(config, jax.devices() * 8)


HLO = """
%body (p: f32[8]) -> f32[8] {
  %ag = bf16[16,32]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
%condition (p: s32[]) -> pred[] {
  %n = s32[] constant(5)
}
%early (p: f32[8]) -> f32[8] {
  %ag.1 = f32[8,4]{1,0} all-gather(%x), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}
%async_collective_fusion.7 (p: f32[8]) -> f32[8] {
  %ag.2 = f32[8,4]{1,0} all-gather(%x), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}
%follows (p: s32[]) -> pred[] {
  ROOT %c = pred[] compare(%a, %b), direction=LT
}
%inner (p: f32[8]) -> f32[8] {
  %f = f32[8] fusion(%x), calls=%async_collective_fusion.7
  %ar = (f32[3]{0}, f32[]) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%condition, body=%body
  %async-collective-start.1 = f32[8] fusion(%x), calls=%early
  %v = f32[8] while(%p), condition=%follows, body=%inner
  %rs = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""


def test_collectives_are_read_with_their_size_and_their_loops():
    found = {(c.kind, c.size, c.group, c.loops, c.times) for c in hlo.collectives(HLO)}
    assert found == {
        ("all-gather", 1024, 4, (5,), 5),
        ("all-gather", 128, 4, (), 1),  # Once, where it starts.
        ("all-reduce", 16, 2, (None,), 1),
        ("reduce-scatter", 64, 4, (), 1),
    }


@pytest.mark.slow
def test_split_parameters_train_as_whole_ones_and_restore_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sharding_check.py"), str(tmp_path)],
        env=environment(8), capture_output=True, text=True, timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for way in ("fsdp8", "data2_fsdp4", "fsdp2_acc2", "scanned"):
        assert result[way]["gradient"] <= 1e-5 and result[way]["sgd"] <= 1e-5, result
    total, most = result["bytes"]
    assert most <= 1.3 * total / 8, result
    # Layers gather their own, attention and sampler nothing.
    assert result["loops"] == [[], [result["layers"]]], result
    # Every split matrix of a layer forward and backward; the embedding once.
    assert result["gathers"] == {"()": 1, f"({result['layers']},)": 2 * (result["split"] - 1)}, result
    assert max(result["evaluated"]) <= 1e-5 and result["finite"], result
    assert len(result["restores"]) == 25 and all(result["restores"].values()), result


def port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def two_processes(workdir, *changes):
    """The training command in two processes of four devices."""
    place = f"--coordinator=localhost:{port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.train", "--config=configs/smoke.py",
             f"--workdir={workdir}", "--multihost", place, "--num_processes=2",
             f"--process_id={index}", "--config.data.batch_size=8", *changes],
            env=environment(4), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]


def ended(running):
    outputs = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], outputs


def parameters(path, step):
    saved = Checkpoints(path / "checkpoints", read_only=True)
    try:
        return saved.restore_params(step)
    finally:
        saved.close()


# SGD: Adam hides a wrong scale.
STEPS = ("--config.train.steps=6", "--config.train.checkpoint_every=3", "--config.train.eval_every=3",
         "--config.train.log_every=1", "--config.optimizer.name=sgd", "--config.optimizer.clip=0",
         "--config.optimizer.learning_rate=0.1")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """2 x 4 devices = 1 x 8, and one process opens what two have written."""
    codes, outputs = ended(
        two_processes(tmp_path / "two", *STEPS, "--config.parallel.fsdp=8")
    )
    assert codes == [0, 0], outputs
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1, "the first process alone tells trackers"
    one = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=configs/smoke.py", "--workdir",
         str(tmp_path / "one"), "--config.data.batch_size=8", *STEPS],
        env=environment(8), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert one.returncode == 0, one.stderr
    for step in (3, 6):
        assert_close(parameters(tmp_path / "two", step), parameters(tmp_path / "one", step))
    logs = [read_metrics(tmp_path / name) for name in ("two", "one")]
    assert [r["event"] for r in logs[0]] == [r["event"] for r in logs[1]]
    for a, b in zip(*logs):
        if a["event"] == "train":
            assert a["tokens"] == b["tokens"]
            assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)
    # Goes on in one process, on one device.
    config = smoke.get_config()
    config.data.batch_size = 8
    config.update_from_flattened_dict({
        "train.steps": 6, "train.checkpoint_every": 3, "train.eval_every": 3,
        "train.log_every": 1, "parallel.devices": 1, "optimizer.name": "sgd",
        "optimizer.clip": 0.0, "optimizer.learning_rate": 0.1,
    })
    assert train(prepare(config, tmp_path / "two"), progress=False)["soft"]["nll"] > 0


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_read_is_passed_over_by_both(tmp_path):
    """The shards that process 1 has written are cut; they alone."""
    run = tmp_path / "run"
    codes, outputs = ended(two_processes(run, *STEPS, "--config.parallel.fsdp=8"))
    assert codes == [0, 0], outputs
    files = [p for p in (run / "checkpoints" / "6" / "state" / "ocdbt.process_1").rglob("*")
             if p.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    codes, outputs = ended(two_processes(run, *STEPS, "--config.parallel.fsdp=8"))
    assert codes == [0, 0], outputs
    assert "checkpoints/6'" in outputs[0] and "The step before it is taken" in outputs[0]
    assert (run / "damaged" / "6").is_dir() and (run / "checkpoints" / "6").is_dir()
    assert [r["step"] for r in read_metrics(run) if r["event"] == "resume"] == [3]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    """SIGINT, which is passed on as SIGTERM; costs are measured by one process for both."""
    run = tmp_path / "run"
    running = two_processes(run, "--config.train.steps=5000", "--config.train.checkpoint_every=5000",
                            "--config.train.eval_every=5000", "--config.train.log_every=1",
                            "--config.parallel.fsdp=4", "--config.prior.costs=measured")
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count('"train"') >= 3):
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGINT)
    codes, outputs = ended(running)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    stops = [re.search(r"SIGTERM: stopped after step (\d+); .* goes on from it", o) for o in outputs]
    assert all(stops) and len({stop.group(1) for stop in stops}) == 1, outputs
    assert [p.name for p in (run / "checkpoints").iterdir()] == [stops[0].group(1)]


@pytest.mark.slow
def test_a_mistake_is_told_by_both_processes(tmp_path):
    codes, outputs = ended(two_processes(tmp_path / "run", "--config.model.num_heads=5"))
    assert codes == [2, 2], outputs
    for output in outputs:
        assert "error: model.num_heads: expected a divisor" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--coordinator=localhost:1"], "multihost: expected --multihost"),
        (["--multihost", "--coordinator=localhost:1"], "num_processes: expected a value"),
        (["--multihost", "--coordinator=localhost", "--num_processes=2", "--process_id=0"],
         "coordinator: expected HOST:PORT"),
        (["--multihost", "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
         "process_id: expected a number from 0 to num_processes - 1 = 1, got 2"),
    ],
)
def test_processes_that_cannot_meet_are_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(ROOT)
    told = call("train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}", *arguments)
    assert told.code == 2 and told.err.startswith(f"error: {sentence}"), told.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--programs=softt"], "programs: expected some of"),
        (["--topology=moon"], "topology: expected "),
        pytest.param(["--topology=h100", "--config.parallel.devices=1"],
                     "topology: expected the CUDA compiler", marks=pytest.mark.skipif(
                         importlib.util.find_spec("jax_cuda13_plugin") is not None,
                         reason="the CUDA compiler is here")),
        (["--config.parallel.fsdp=3"], "topology: expected the TPU compiler" if WITHOUT_LIBTPU else
         "parallel.fsdp: expected a divisor of the 4 devices, got 3"),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(monkeypatch, arguments, sentence):
    monkeypatch.chdir(ROOT)
    told = call("checks.compile", "--config=configs/smoke.py", "--topology=v5e:2x2", *arguments)
    assert told.code == 2 and told.err.startswith(f"error: {sentence}"), told.err


def compile_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.checks.compile", "--config=configs/smoke.py", *arguments],
        env={**environment(1), "TF_CPP_MIN_LOG_LEVEL": "3"}, cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="no TPU compiler: libtpu is not installed (jax[tpu])")
def test_a_small_config_compiles_for_a_tpu(tmp_path):
    done = compile_command("--topology=v5e:2x2", "--config.parallel.fsdp=4",
                           "--config.data.batch_size=8", "--config.model.scan_layers=True",
                           f"--json={tmp_path / 'report.json'}")
    assert done.returncode == 0, done.stderr
    report, = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert set(report["programs"]) == {"soft", "packed", "decode"}
    for name in ("soft", "packed"):
        program = report["programs"][name]
        assert 0.4 <= program["gathered"] / program["needed"] <= 1.001, program
    for name, program in report["programs"].items():
        assert program["memory"]["total"] > 0 and program["collectives_in_inner_loops"] == 0
        kinds = {row["kind"] for row in program["collectives"]}
        assert kinds >= {"all-gather", "reduce-scatter"} if name != "decode" else not kinds


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="no TPU compiler: libtpu is not installed (jax[tpu])")
def test_what_does_not_fit_into_a_chip_is_one_sentence():
    done = compile_command("--topology=v5e:2x2", "--programs=soft", "--config.data.batch_size=4096",
                           "--config.data.sequence_length=2048", "--config.model.implementation=xla")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^error: memory: expected at most .* got .*\.$", done.stdout + done.stderr, re.M)
