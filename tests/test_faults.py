"""What a run survives: signals, kill -9, damaged checkpoints."""

from __future__ import annotations

import errno
import functools
import gc
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from experiments import common
from experiments.studies import sweeps
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.training import build, interrupt, processes
from meta_attention_jax.training.checkpoint import Checkpoints, Damaged
from meta_attention_jax.training.drive import drive
from meta_attention_jax.training.interrupt import Interrupted, interruptible
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import not_finite, train
from meta_attention_jax.training.step import init_state, train_step
from tests.test_commands import ROOT, environment

LIGHT = {"controller.name": "fixed", "controller.fixed": ("local",), "model.num_layers": 1,
         "train.steps": 12, "train.eval_every": 4, "train.checkpoint_every": 4, "train.log_every": 1,
         "train.eval_batches": 1, "train.keep_latest": 3, "parallel.devices": 1}


def light(**changes):
    config = smoke.get_config()
    config.update_from_flattened_dict({**LIGHT, **changes})
    return config


def params(path, step=12):
    saved = Checkpoints(path / "checkpoints", read_only=True)
    try:
        return saved.restore_params(step)
    finally:
        saved.close()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(prepare(light(), path), progress=False)
    return path


class Counting:
    """Work that only counts; a signal comes in the middle of step 3."""

    def __init__(self, number):
        self.number, self.calls = number, []

    def step(self, number):
        self.calls.append(("step", number))
        if number == 2:
            signal.raise_signal(self.number)

    def log(self, done):
        self.calls.append(("log", done))
        return True

    def evaluate(self, done):
        self.calls.append(("evaluate", done))

    def save(self, done, *, evaluated=True):
        self.calls.append(("save", done, evaluated))


@pytest.fixture(autouse=True)
def default_handlers():
    """Whatever started the tests may ignore some: a shell in the background SIGINT, nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    for number in interrupt.SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_ends_the_loop_after_the_step_that_was_under_way(number):
    before = signal.getsignal(number)
    work = Counting(number)
    with pytest.raises(Interrupted, match=f"{number.name}: stopped after step 3") as stop:
        with interruptible() as asked:
            drive(work, light().train, asked, start=0, stop=12)
    assert (stop.value.signal, stop.value.step) == (number, 3)
    assert work.calls[-3:] == [("step", 2), ("log", 3), ("save", 3, False)]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_at_the_last_step_all_that_is_due_is_done_first(number):
    work = Counting(number)
    with pytest.raises(Interrupted), interruptible() as asked:
        drive(work, light().train, asked, start=0, stop=3)
    assert work.calls[-4:] == [("step", 2), ("log", 3), ("evaluate", 3), ("save", 3, True)]


def test_a_signal_that_nobody_asked_for_is_not_lost():
    with pytest.raises(Interrupted, match="SIGTERM: stopped; what is done is saved"):
        with interruptible():
            signal.raise_signal(signal.SIGTERM)


def test_an_echo_is_no_second_signal_but_a_second_one_does_what_it_did_before(monkeypatch):
    with pytest.raises(Interrupted), interruptible() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked(1) is signal.SIGINT
    monkeypatch.setattr(interrupt, "REPEAT", -1.0)
    with pytest.raises(KeyboardInterrupt) as stop, interruptible() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked(1) is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stop.value, Interrupted)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # As below nohup.
    try:
        with interruptible() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert asked(1) is None
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
@pytest.mark.parametrize("several", [False, True])
def test_a_handler_of_the_host_program_stays_but_for_the_two_that_end_it(name, several, monkeypatch):
    number = getattr(signal, name)
    assert number in interrupt.SIGNALS
    monkeypatch.setattr(processes, "several", lambda: several)
    assert signal.getsignal(number) is signal.SIG_DFL
    with interruptible():
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN)
    got = []
    for handler in (lambda *_: got.append(number), signal.SIG_IGN):
        before = signal.signal(number, handler)
        try:
            with interruptible():
                assert signal.getsignal(number) is handler
                signal.raise_signal(number)
        finally:
            signal.signal(number, before)
    assert got == [number]


def test_a_thread_trains_without_signals():
    told = []

    def body():
        with interruptible() as asked:
            told.append(asked(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert told == [None]


def train_command(path, *flags):
    values = [f"--config.{field}={','.join(v) if isinstance(v, tuple) else v}"
              for field, v in LIGHT.items() if field != "controller.fixed"]
    return [sys.executable, "-m", "experiments.train", "--config=configs/smoke.py", *values,
            "--config.controller.fixed=('local',)", f"--workdir={path}", *flags]


LONG = 60
"""Steps of the runs that are stopped, with a save every fourth."""


def start(path):
    return subprocess.Popen(
        train_command(path, f"--config.train.steps={LONG}"), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def wait(process, ready):
    """Returns once `ready()`, or when the process has ended."""
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lines(path):
    log = path / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The parameters of an uninterrupted run of the same command."""
    path = tmp_path_factory.mktemp("reference") / "run"
    process = start(path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return params(path, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_command_saves_says_how_to_go_on_and_goes_on(tmp_path, number, wanted):
    run = tmp_path / "run"
    process = start(run)
    wait(process, lambda: lines(run) > 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"{number.name}: stopped after step" in err and "the same command goes on" in err
    assert "Traceback" not in err
    step = read_metrics(run)[-1]["step"]
    assert step < LONG
    saved = Checkpoints(run / "checkpoints", read_only=True)
    assert saved.latest == step
    saved.close()
    process = start(run)
    process.communicate(timeout=120)
    assert process.returncode == 0
    same(params(run, LONG), wanted)


@pytest.mark.slow
def test_kill_at_any_moment_changes_nothing(tmp_path, wanted):
    run = tmp_path / "run"
    draw, killed = random.Random(0), 0
    for moment in ("step", "save", "save", "step"):
        known, before = set((run / "checkpoints").glob("*")), lines(run)
        process = start(run)
        if moment == "save":
            wait(process, lambda: any(p.name.endswith("tmp") for p in
                                      set((run / "checkpoints").glob("*")) - known))
        else:
            wait(process, lambda: lines(run) > before + 3)
            time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 3
    process = start(run)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    same(params(run, LONG), wanted)


def cut(path):
    """Files of a step, cut in half."""
    for file in [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 1000]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(whole, tmp_path):
    run = tmp_path / "run"
    train(prepare(light(), run), stop_after=8, progress=False)
    cut(run / "checkpoints" / "8" / "state")
    with pytest.warns(UserWarning, match="checkpoints/8'.* a damaged one .* step before it is taken"):
        train(prepare(light(), run), progress=False)
    same(params(run), params(whole))
    assert [r["step"] for r in read_metrics(run) if r["event"] == "resume"] == [4]
    assert (run / "damaged" / "8").is_dir()
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    run = tmp_path / "run"
    train(prepare(light(), run), stop_after=8, progress=False)
    for step in ("4", "8"):
        cut(run / "checkpoints" / step / "state")
    before = sorted(str(p) for p in run.rglob("*"))
    with pytest.warns(UserWarning), pytest.raises(Damaged, match="checkpoints/4'"):
        train(prepare(light(), run), progress=False)
    assert sorted(str(p) for p in run.rglob("*")) == before
    gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_point_of_a_group_goes_on_from_the_step_before(tmp_path):
    def jobs(root):
        configs = {f"seed={s}": algebra.configured(light(), {"seed": s}) for s in (0, 1)}
        return sweeps.prepared(root, configs, sweeps.open_datasets(configs.values()))

    root = tmp_path / "sweep"
    for job in jobs(root).values():
        train(job, stop_after=8, progress=False)
    cut(root / "points" / "seed=1" / "checkpoints" / "8" / "state")
    with pytest.warns(UserWarning, match="seed=1/checkpoints/8"):
        sweeps.train_points(root, jobs(root))
    for label in jobs(root):
        assert sweeps.steps_done(root / "points" / label) == 12
    gc.collect()


def flags(layers=2, scan=False):
    """All finite, of three steps."""
    def modules():
        names = {"embedding": (), **({"layers": (layers,)} if scan else
                                     {f"layer_{i}": () for i in range(layers)}), "final_norm": ()}
        return {name: np.ones((3, *shape), bool) for name, shape in names.items()}

    return {"loss": np.ones(3, bool), "penalty": np.ones((3, layers), bool),
            "routing": np.ones((3, layers), bool), "gradients": modules(), "norm": np.ones(3, bool),
            "parameters": modules()}


def test_what_is_not_finite_has_a_name():
    assert not_finite(flags()) is None
    found = flags()
    found["gradients"]["layer_1"][2] = False
    assert not_finite(found) == (2, "the gradients of layer 1")
    found["norm"][2] = False
    assert not_finite(found) == (2, "the gradients of layer 1")
    found["gradients"]["layer_1"][2] = True
    assert not_finite(found) == (2, "the norm of the gradients")
    found["penalty"][2, 1] = False
    assert not_finite(found) == (2, "the KL or penalty of layer 1")
    found["parameters"]["embedding"][1:] = False
    assert not_finite(found) == (1, "the parameters of embedding")
    found["loss"][1] = False
    assert not_finite(found) == (1, "the loss, though the routing of all layers is finite")
    found["routing"][1, 1] = False
    assert not_finite(found) == (1, "the loss, first seen in the routing of layer 1, after layer 0")
    stacked = flags(3, scan=True)
    stacked["gradients"]["layers"][0, 1:] = False
    assert not_finite(stacked) == (0, "the gradients of layer 1, layer 2")


@pytest.mark.slow
@pytest.mark.parametrize("scan", (False, True))
def test_a_poisoned_parameter_is_named_by_its_layer(scan):
    config = smoke.get_config()
    config.model.scan_layers = scan
    config.controller.name = "softmax"
    dataset = build.build_dataset(config)
    spec, hypers = build.build_spec(config, dataset), build.build_hypers(config)
    batch = dataset.train_batch(0)
    state = init_state(spec, jax.random.key(0), batch, hypers)
    step = jax.jit(functools.partial(train_step, spec))

    def words(state):
        _, metrics = step(state, batch, hypers)
        found = not_finite(jax.tree.map(lambda flag: np.asarray(flag)[None], metrics["finite"]))
        return found and found[1]

    def poisoned(path, leaf):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        if text == "layers/up/kernel":
            return leaf.at[0].set(jnp.nan)
        return leaf * jnp.nan if text == "layer_0/up/kernel" else leaf

    assert words(state) is None
    params = jax.tree_util.tree_map_with_path(poisoned, state.params)
    assert words(state.replace(params=params)) == (
        "the loss, first seen in the routing of layer 1, after layer 0"
    )


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(tmp_path):
    """The log alone: what Orbax raises was seen on a full file system, and is the second case below."""
    run = tmp_path / "run"
    prepare(light(**{"train.steps": LONG}), run)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    process = start(run)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("error: disk: No space left on device; what is complete stays")
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    run = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)
    job = prepare(light(), run)
    calls = []

    def two_saves(path):
        calls.append(path)
        return usage._replace(free=usage.free if len(calls) < 2 else 1000)

    monkeypatch.setattr(shutil, "disk_usage", two_saves)
    with pytest.raises(OSError, match="bytes for the checkpoint of step 8, got 1,000") as error:
        train(job, progress=False)
    assert common.no_room(error.value)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    train(prepare(light(), run), progress=False)
    assert read_metrics(run)[-1]["step"] == 12


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ValueError("RESOURCE_EXHAUSTED: Error writing ...: [OS error: No space left on device]"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), False),
    ],
)
def test_what_is_a_full_disk(error, full):
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("while saving") from inner
    except RuntimeError as outer:
        assert common.no_room(error) is common.no_room(outer) is full


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("jit", "pmap"))
def test_debug_nans_stops_at_the_operation(tmp_path, mode):
    diverges = ("--config.optimizer.learning_rate=1e38", "--config.optimizer.clip=0",
                "--config.optimizer.warmup=0", f"--config.parallel.mode={mode}")
    done = subprocess.run(
        train_command(tmp_path / "run", "--debug_nans", *diverges), cwd=ROOT,
        env=environment(), capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 1
    assert "FloatingPointError: Invalid value (nan)" in done.stderr
    assert "meta_attention_jax/model.py" in done.stderr, "the traceback must lead into the model"


@pytest.mark.parametrize("words, said", [
    ("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 7.\n"
     "More lines.", "(Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
                    "with pid 7)."),
    ("", "(RuntimeError)."),
])
def test_a_platform_that_cannot_be_had_says_why(monkeypatch, words, said):
    def taken():
        raise RuntimeError(words)

    monkeypatch.setattr(jax, "devices", taken)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    told = common.missing_platform()
    assert told == f"JAX_PLATFORMS: expected platforms that this machine has, got 'tpu' {said}"
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert common.missing_platform() is None


@pytest.mark.parametrize("error", [UnicodeError("no text"), UnicodeError(), UnicodeDecodeError(
    "utf-8", b"\xff", 0, 1, "invalid start byte")])
def test_every_unicode_error_is_one_sentence(error, capsys):
    with pytest.raises(SystemExit), common.user_mistakes():
        raise error
    told = capsys.readouterr().err
    assert told.startswith("error: text: expected text of Unicode, got ") and told.count("\n") == 1
