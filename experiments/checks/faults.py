"""What a training run survives, tried out: kills, signals, damaged files, a full disk.

python -m experiments.checks.faults [--kills=20] [--signals=5] [--parts=one,two] [--json=FILE]

Every fault strikes the training command itself, in processes of their own on the CPU; the parameters in
the end are compared with those of a run that nothing happened to. About a quarter of an hour on two cores.
Exit code 1 if anything was not survived.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Optional

import jax
import numpy as np
from absl import flags

from experiments import common
from experiments.benchmarks import common as benchmarks
from meta_attention_jax.fields import expect
from meta_attention_jax.training.checkpoint import Checkpoints

KILLS = flags.DEFINE_integer("kills", 20, "kill -9 so often, over one run.", lower_bound=1)
SIGNALS = flags.DEFINE_integer("signals", 5, "Of each kind, over one run.", lower_bound=1)
PARTS = flags.DEFINE_list("parts", ["one", "two"], "Runs of one process, of two, or both.")
JSON = common.define_path("json", None, "Write the rows here.")

ROOT = pathlib.Path(__file__).parents[2]
SAVE_EVERY = 20
RUN = ("--config=configs/smoke.py", "--config.train.log_every=1", "--config.train.eval_every=500",
       f"--config.train.checkpoint_every={SAVE_EVERY}", "--config.train.eval_batches=1")
SAME = "bit-identical"
PATIENCE = 300.0
"""Seconds after which a process counts as stuck."""


class Trial:
    """The runs of one session of faults, in a folder of its own; each process has `devices` virtual ones."""

    def __init__(self, folder: pathlib.Path, *, steps: int, devices: int = 1, processes: int = 1):
        self.folder, self.steps = folder, steps
        self.devices, self.processes = devices, processes
        folder.mkdir()

    @functools.cached_property
    def wanted(self) -> list[np.ndarray]:
        """The last parameters of a run that nothing happens to, which is trained when they are first asked for."""
        path = self.folder / "whole"
        _say(f"a run of {self.processes} x {self.devices} devices that nothing happens to ...")
        self.finish(path)
        return checkpoint(path, self.steps)[1]

    def start(self, path: pathlib.Path, *prefix: str) -> list[subprocess.Popen]:
        """The training command, in all its processes."""
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                         f"--xla_force_host_platform_device_count={self.devices}".strip(),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [*prefix, sys.executable, "-m", "experiments.train", f"--workdir={path}", *RUN,
                   f"--config.train.steps={self.steps}"]
        extra = [()]
        if self.processes > 1:
            place = f"--coordinator=localhost:{_free_port()}"
            extra = [
                ("--multihost", place, f"--num_processes={self.processes}", f"--process_id={i}",
                 "--config.parallel.fsdp=4")
                for i in range(self.processes)
            ]
        return [
            subprocess.Popen([*command, *more], cwd=ROOT, env=env, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for more in extra
        ]

    def finish(self, path: pathlib.Path) -> str:
        """Runs to the end; the error stream. Raises RuntimeError where it does not end well."""
        codes, errors = ended(self.start(path))
        if any(codes):
            raise RuntimeError(f"exit codes {codes}: {errors[0][-2000:]}")
        return errors[0]

    def reach(self, path: pathlib.Path, moment: int, what: str) -> list[subprocess.Popen]:
        """The training command once it has logged a step; raises RuntimeError if it ends before."""
        running = self.start(path)
        deadline = time.monotonic() + PATIENCE
        while logged(path) < moment:
            if running[0].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: the run ended before step {moment}")
            time.sleep(0.002)
        return running

    def row(self, path: pathlib.Path, fault: str, good: int, count: int, seen: str, ok: bool = True) -> dict[str, Any]:
        """What is said of a fault, after the run at `path` has come to its end."""
        same = difference(path, self.steps, self.wanted)
        return {
            "ok": ok and good == count and same == SAME,
            "fault": fault, "times": f"{good} of {count}", "seen": seen, "parameters in the end": same,
        }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def ended(running: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """(exit codes, error streams)."""
    errors = [process.communicate(timeout=PATIENCE)[1] for process in running]
    return [process.returncode for process in running], errors


def logged(path: pathlib.Path) -> int:
    """The last step in the log; 0 before the first."""
    log = path / "metrics.jsonl"
    text = log.read_bytes()[-20000:].decode(errors="ignore") if log.exists() else ""
    steps = re.findall(r'"event": "train", "step": (\d+)', text)
    return int(steps[-1]) if steps else 0


def checkpoint(path: pathlib.Path, step: Optional[int] = None) -> tuple[int, list[np.ndarray]]:
    """(newest step or the one asked for, its parameters)."""
    with contextlib.closing(Checkpoints(path / "checkpoints", read_only=True)) as saved:
        step = saved.resolve("latest" if step is None else step)
        return step, [np.asarray(x) for x in jax.tree.leaves(saved.restore_params(step))]


def difference(path: pathlib.Path, steps: int, wanted: list[np.ndarray]) -> str:
    """Of the last parameters."""
    step, found = checkpoint(path)
    if step != steps:
        return f"ended at step {step}"
    if all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
        return SAME
    largest = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted))
    return f"differ by at most {largest:.1e}"


def kills(trial: Trial, count: int) -> dict[str, Any]:
    """kill -9 at `count` random moments of one run: between steps, and in the middle of saves."""
    path, draw = trial.folder / "kills", random.Random(0)
    struck = saving = lost = 0
    left: set[str] = set()
    for number, moment in enumerate(sorted(draw.sample(range(1, trial.steps - SAVE_EVERY), count)), 1):
        moment = max(moment, logged(path) + 2)
        running = trial.reach(path, moment, f"kill {number}")
        time.sleep(draw.uniform(0.0, 0.05))
        running[0].kill()
        codes, _ = ended(running)
        struck += codes == [-signal.SIGKILL] and logged(path) >= moment
        folders = list((path / "checkpoints").glob("*"))
        unfinished = {f"{p} {p.stat().st_mtime_ns}" for p in folders if not p.name.isdigit()}
        saving += bool(unfinished - left)
        left = unfinished
        newest = max((int(p.name) for p in folders if p.name.isdigit()), default=0)
        lost = max(lost, logged(path) - newest)
        _say(f"kill {number}/{count}: at step {logged(path)}, last complete checkpoint {newest}")
    errors = trial.finish(path)
    seen = f"{saving} while a checkpoint was being written; at most {lost} steps done anew"
    seen += "; Traceback" * ("Traceback" in errors)
    return trial.row(path, "kill -9 at a random moment", struck, count, seen, "Traceback" not in errors)


def signals(trial: Trial, number: signal.Signals, count: int) -> dict[str, Any]:
    """`count` signals over one run, each to one of its processes."""
    path, draw = trial.folder / f"{number.name}{trial.processes}", random.Random(int(number))
    told = signal.SIGTERM if trial.processes > 1 else number
    good = late = 0
    for turn, moment in enumerate(sorted(draw.sample(range(1, trial.steps // 2), count)), 1):
        # Training, not starting: before that a signal ends the process as it ends any other.
        moment = max(moment, logged(path) + 2)
        running = trial.reach(path, moment, f"{number.name} {turn}")
        began, at = time.monotonic(), logged(path)
        draw.choice(running).send_signal(number)
        codes, errors = ended(running)
        took = time.monotonic() - began
        stops = {re.search(rf"{told.name}: stopped after step (\d+); .* the same command", e) for e in errors}
        steps = {int(stop.group(1)) for stop in stops if stop}
        newest, _ = checkpoint(path)
        good += codes == [128 + told] * len(running) and steps == {newest} and None not in stops
        late = max(late, newest - at)
        _say(f"{number.name} {turn}/{count}: sent at step {at}, saved step {newest}, ended after {took:.1f} s")
    trial.finish(path)
    who = "" if trial.processes == 1 else f" to one of {trial.processes} processes"
    seen = (f"exit code {128 + told}, hint, the step named is the one saved; at most {late} steps after "
            "the log showed it")
    return trial.row(path, f"{number.name}{who}", good, count, seen)


def damaged(trial: Trial) -> dict[str, Any]:
    """Every file of the newest checkpoint cut in half, once the run is past its middle."""
    path = trial.folder / "damaged"
    running = trial.reach(path, trial.steps // 2 + 1, "damaged")
    running[0].kill()
    ended(running)
    newest, _ = checkpoint(path)
    for file in (path / "checkpoints" / str(newest)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    errors = trial.finish(path)
    named = f"checkpoints/{newest}'" in errors and "warning: " in errors
    aside = (path / "damaged" / str(newest)).is_dir()
    seen = f"a warning names it; kept as damaged/{newest}" if aside else "not set aside"
    return trial.row(path, "newest checkpoint cut in half", int(named), 1, seen)


def full_disk(trial: Trial) -> dict[str, Any]:
    """A file system with room for a part of the run, where the machine lets us make one; what is on it
    is then moved to a larger one, and goes on."""
    row = {"ok": None, "fault": "disk full", "parameters in the end": "-"}
    if shutil.which("unshare") is None:
        return {**row, "times": "not run", "seen": "needs unshare and user namespaces"}
    mount, kept = trial.folder / "small", trial.folder / "kept"
    mount.mkdir()
    script = (f"mount -t tmpfs -o size=3m small {mount} || exit 99; \"$@\" --workdir={mount}/run; "
              f"code=$?; cp -r {mount}/run {kept}; exit $code")
    code, error = (x[0] for x in ended(trial.start(
        mount / "unused", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"
    )))
    if code == 99 or error.startswith("unshare:"):
        return {**row, "times": "not run", "seen": "the machine makes no small file system for us"}
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    step, _ = checkpoint(kept)
    trial.finish(kept)
    good = code == 2 and len(sentences) == 1
    seen = f"exit code {code}, {len(sentences)} sentence, {len(error.splitlines())} lines in all; step {step} is whole"
    return trial.row(kept, "disk full", int(good), 1, seen)


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    rows = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        _say("; ".join(f"{name}: {value}" for name, value in row.items()) + "\n")
        if JSON.value:
            benchmarks.write_json(JSON.value, rows)

    with common.user_mistakes():
        for part in PARTS.value:
            expect(part in ("one", "two"), "parts", "some of one, two", part)
    with tempfile.TemporaryDirectory() as folder:
        if "one" in PARTS.value:
            one = Trial(pathlib.Path(folder) / "one", steps=1500)
            done(kills(one, KILLS.value))
            for number in (signal.SIGTERM, signal.SIGINT):
                done(signals(one, number, SIGNALS.value))
            done(damaged(one))
            done(full_disk(one))
        if "two" in PARTS.value:
            two = Trial(pathlib.Path(folder) / "two", steps=100, devices=4, processes=2)
            done(signals(two, signal.SIGTERM, SIGNALS.value))
    print(benchmarks.markdown(rows))
    if lost := [row["fault"] for row in rows if row["ok"] is False]:
        print(f"error: faults: expected to survive all, got {', '.join(lost)}.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    common.run(main)
