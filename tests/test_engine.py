"""Groups of a sweep as tasks: what the engine does with them, without Ray; and a Ray of two machines on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import jax
import numpy as np
import pytest

from configs import smoke
from experiments.studies import sweeps
from meta_attention_jax.sweeps import engine
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.training.interrupt import Interrupted
from meta_attention_jax.training.logs import read_metrics
from tests import making
from tests.test_commands import ROOT, environment
from tests.test_sweep import final

SEEDS = 6
CONFIG = making.config_file(making.light(steps=600, every=20), f"""
def get_sweep():
    return chain(sweep("seed", range({SEEDS})), point(name="bad", **{{"optimizer.learning_rate": 1e30}}))
""")
PATIENCE = 400.0


class Failed(Exception):
    """In the place of ray.exceptions.RayError."""

    def __init__(self, cause=None):
        super().__init__("a traceback")
        self.cause = cause


class Cancelled(Failed):
    pass


@dataclasses.dataclass(eq=False)
class Ref:
    call: tuple


@pytest.fixture
def fake(monkeypatch):
    """A Ray that makes a call when its result is asked for, and keeps what is asked of it."""
    asked = types.SimpleNamespace(options=None, cancelled=[])

    def remote(**options):
        asked.options = options
        return lambda work: types.SimpleNamespace(remote=lambda *call: Ref((work, call)))

    def get(ref):
        if ref in asked.cancelled:
            raise Cancelled
        work, call = ref.call
        return work(*call)

    ray = types.SimpleNamespace(
        remote=remote, get=get, wait=lambda refs, timeout: (refs[:1], refs[1:]), cancel=asked.cancelled.append,
        exceptions=types.SimpleNamespace(RayError=Failed, TaskCancelledError=Cancelled),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(engine, "PAUSE", 0.0)
    return asked


def test_calls_that_fail_stop_no_other_and_those_left_to_others_are_made_again(fake, capsys):
    made = []

    def work(name):
        made.append(name)
        if name == "mistake":
            raise Failed(ValueError("seed: expected a number, got none."))
        if name == "dies":
            raise Failed
        if name == "bug":
            raise Failed(KeyError("x"))
        return name == "busy" and made.count("busy") < 3

    names = ("good", "mistake", "dies", "bug", "busy")
    errors = engine.on_ray(work, {name: (name,) for name in names}, {"num_gpus": 2})
    assert made == [*names, "busy", "busy"]
    assert errors == ["mistake: seed: expected a number, got none.",
                      "dies: expected a worker that lives, got 21 that died (Failed).", "bug: a traceback"]
    assert capsys.readouterr().out.splitlines() == errors
    assert fake.options == {"max_calls": 1, "max_retries": 20, "num_gpus": 2}


def test_a_signal_cancels_what_is_left_once(fake):
    made = []

    def work(name):
        made.append(name)
        signal.raise_signal(signal.SIGTERM)  # SIGINT is ignored in a shell's background.

    with pytest.raises(Interrupted):
        engine.on_ray(work, {name: (name,) for name in "abc"}, {})
    assert made == ["a"] and len(fake.cancelled) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 1), (signal.SIGINT, None)])
def test_a_worker_that_has_to_go_counts_as_dead_but_one_that_is_cancelled_does_not(monkeypatch, number, code):
    def stopped():
        raise Interrupted(number)

    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(Interrupted):  # The exit is none here.
        engine._in_worker(os.getcwd(), stopped)
    assert left == ([] if code is None else [code])


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="engine: expected the package ray .extra ray: .* got none"):
        engine.connect(None, 1)


def test_groups_are_of_one_program_in_the_order_of_the_points():
    points = {"a": {"seed": 0}, "b": {"model.window": 5}, "c": {"seed": 1}, "d": {"seed": 2}}
    configs = {name: algebra.configured(smoke.get_config(), point) for name, point in points.items()}
    assert sweeps.groups(configs) == [["a", "c", "d"], ["b"]]
    assert sweeps.groups(configs, at_once=2) == [["a", "c"], ["d"], ["b"]]
    assert sweeps.groups(configs, together=False) == [["a"], ["b"], ["c"], ["d"]]


def children(pid):
    """All processes below one, with their command lines."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            found[int(path.parent.name)] = parent, (path.parent / "cmdline").read_bytes().decode(errors="replace")
    below, last = {pid}, set()
    while below != last:
        last, below = below, below | {child for child, (parent, _) in found.items() if parent in below}
    return {child: found[child][1] for child in below - {pid} if child in found}


def workers(machine):
    """Processes that work on a task."""
    return [pid for pid, line in children(machine.pid).items() if line.startswith("ray::_in_worker")]


def until(condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class Cluster:
    """Machines of one core each, on loopback, with a token of their own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.machines, self.commands = pathlib.Path(folder), [], []
        self.env = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
                    "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

    def add(self):
        where = [f"--address={self.address}"]
        if not self.machines:
            where = ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self.folder}",
                     "--include-dashboard=false"]
        self.machines.append(self._start(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1",
             "--num-cpus=1", f"--object-store-memory={10**8}", *where], f"machine{len(self.machines)}"))
        until(lambda: any(line.startswith("ray::RuntimeEnvAgent")
                          for line in children(self.machines[-1].pid).values()))
        return self.machines[-1]

    def sweep(self, root, *flags):
        """The command, on its way."""
        (config := self.folder / "s.py").write_text(CONFIG)
        self.commands.append(self._start(
            [sys.executable, "-m", "experiments.sweep", f"--config={config}", f"--workdir={root}", "--engine=ray",
             f"--address={self.address}", "--test_batches=1", "--points_at_once=4", *flags],
            f"command{len(self.commands)}"))
        return self.commands[-1]

    def _start(self, line, name):
        with open(self.folder / f"{name}.txt", "w") as out:
            return subprocess.Popen(line, cwd=ROOT, env=self.env, stdout=out, stderr=subprocess.STDOUT)

    def ended(self, process):
        """(code, what it said)"""
        code = process.wait(PATIENCE)
        return code, (self.folder / f"command{self.commands.index(process)}.txt").read_text()

    def close(self):
        for process in (*self.commands, *reversed(self.machines)):
            if process.poll() is None:
                below = children(process.pid)
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                for pid in (process.pid, *below):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def started():
    """Two machines."""
    # Short, for its sockets.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(folder)
        try:
            made.add()
            made.add()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    with started() as made:
        yield made


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A sweep that nothing happens to."""
    root = tmp_path_factory.mktemp("whole") / "sweep"
    code, said = cluster.ended(cluster.sweep(root))
    assert code == 0, said
    return root


def check_same(root, whole):
    """Every point was trained once, to the same bits."""
    assert (root / "rows.json").read_bytes() == (whole / "rows.json").read_bytes()
    rows = json.loads((root / "rows.json").read_text())
    assert [row["label"] for row in rows if "diverged" in row] == ["bad"] and len(rows) == SEEDS + 1
    for row in rows[:SEEDS]:
        log = [r for r in read_metrics(root / "points" / row["label"])]
        steps = [r["step"] for r in log if r["event"] == "eval"]
        assert steps == list(range(20, 601, 20))
        jax.tree.map(np.testing.assert_array_equal, final(root, row["label"], 600), final(whole, row["label"], 600))


@pytest.mark.ray
@pytest.mark.slow
def test_ten_kills_of_workers_change_no_bit(cluster, whole, tmp_path):
    draw, killed = random.Random(22), 0
    command = cluster.sweep(tmp_path / "sweep")
    while killed < 10:
        time.sleep(draw.uniform(0.5, 12.0))
        running = until(lambda: command.poll() is not None or
                        [pid for machine in cluster.machines for pid in workers(machine)])
        assert running is not True, "it ended before the kills; give it more steps"
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(sorted(running)), signal.SIGKILL)
            killed += 1
    code, said = cluster.ended(command)
    assert code == 0, said
    check_same(tmp_path / "sweep", whole)


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_dies_leaves_its_group_to_the_others(cluster, whole, tmp_path):
    command, third = cluster.sweep(tmp_path / "sweep", "--points_at_once=2"), None
    third = cluster.add()
    until(lambda: workers(third) or command.poll() is not None)
    time.sleep(8.0)
    for pid in (third.pid, *children(third.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    third.wait()
    assert command.poll() is None
    code, said = cluster.ended(command)
    assert code == 0, said
    rows = json.loads((tmp_path / "sweep" / "rows.json").read_text())
    assert len(rows) == SEEDS + 1 and sum("diverged" in row for row in rows) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_command_joins_and_one_that_is_stopped_leaves_what_is_done(cluster, whole, tmp_path):
    root = tmp_path / "sweep"
    busy = lambda: [pid for machine in cluster.machines for pid in workers(machine)]  # noqa: E731
    first = cluster.sweep(root)
    until(lambda: len(list(root.glob("points/seed=*/checkpoints/20"))) >= SEEDS // 2)
    first.send_signal(signal.SIGINT)
    code, said = cluster.ended(first)
    assert code == 128 + signal.SIGINT and "SIGINT: stopped" in said and "Traceback" not in said, said
    assert sweeps.steps_done(root / "points" / "seed=0") >= 20
    second = cluster.sweep(root)
    until(busy)
    second.kill()
    until(lambda: not busy())  # What a command has begun goes with it.
    both = [cluster.sweep(root), cluster.sweep(root)]
    for command in both:
        code, said = cluster.ended(command)
        assert code == 0 and "chosen: " in said, said
    check_same(root, whole)
    for seed in range(SEEDS):
        lines = (root / "points" / f"seed={seed}" / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line)["event"] for line in lines]
        assert events.count("start") == 1 and events.count("resume") <= 2
    until(lambda: not busy())


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_that_dies_ends_the_command_and_another_cluster_goes_on(whole, tmp_path):
    root = tmp_path / "sweep"
    for attempt in range(2):
        with started() as other:
            command = other.sweep(root)
            if attempt:
                code, said = other.ended(command)
                assert code == 0, said
                break
            until(lambda: list(root.glob("points/seed=0/checkpoints/20")))
            head = other.machines[0]
            for pid in (head.pid, *children(head.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()
            code, said = other.ended(command)
            assert code != 0 and "chosen: " not in said, said
            until(lambda: not workers(other.machines[1]))  # What they have begun goes with it.
    check_same(root, whole)


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_ends_groups_and_with_room_again_they_go_on(cluster, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        command = cluster.sweep(disk / "sweep")
        until(lambda: list(disk.glob("sweep/points/seed=0/checkpoints/20")))
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        code, said = cluster.ended(command)
        assert code != 0 and "No space left on device" in said and "chosen: " not in said, said
        (disk / "ballast").unlink()
        code, said = cluster.ended(cluster.sweep(disk / "sweep"))
        assert code == 0, said
        check_same(disk / "sweep", whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.ray
@pytest.mark.slow
def test_mistakes_of_the_cluster_are_one_sentence(cluster, tmp_path):
    code, said = cluster.ended(cluster.sweep(tmp_path / "a", "--devices_per_group=5"))
    assert code == 2 and "error: devices_per_group: expected at most the 1 CPUs of a machine, got 5" in said, said
    assert not (tmp_path / "a").exists()
