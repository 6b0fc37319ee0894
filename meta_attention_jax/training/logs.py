"""What a run tells: a live line for people, JSONL for programs. `trackers` has the rest."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

from meta_attention_jax.console import Tolerant, say
from meta_attention_jax.files import at

PLAIN_SECONDS = 10.0  # Without a terminal: at most one progress line in so many seconds.


LOG = "metrics.jsonl"


def _json_ready(value: Any) -> Any:
    """NaN and infinities as null: JSON has neither."""
    if isinstance(value, Mapping):
        return {k: _json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsLog:
    """Appends records to `metrics.jsonl`; never rewrites what is there. A resumed run appends
    {"event": "resume", "step": s}; `read_metrics` then drops the records after step s that an interrupted run had
    written before, and all that stood before a new "start"."""

    def __init__(self, directory: str | pathlib.Path):
        path = pathlib.Path(directory) / LOG
        cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8")
        if cut:  # A crash in the middle of a line must not swallow the next one.
            self._file.write("\n")

    def write(self, event: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One record; `event` is "start", "train", "eval", "packed" or "resume"."""
        record = {"event": event, "step": int(step), **metrics}
        self._file.write(json.dumps(_json_ready(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl` in order, without those that a resumed run has redone. A line cut short by a crash, or
    that is no record, is left out."""
    records: list[dict[str, Any]] = []
    path = at(directory) / LOG
    if not path.is_file():
        raise ValueError(f"workdir: expected {path.name} in {str(directory)!r}, got none.")
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or "event" not in record or not isinstance(record.get("step"), int):
            continue
        if record["event"] == "start":
            records = []
        if record["event"] == "resume":
            records = [r for r in records if r["step"] <= record["step"]]
        records.append(record)
    return records


def status_line(metrics: Mapping[str, Any], mechanisms: Sequence[str]) -> str:
    """nats, theta and route fractions in a few words."""
    routes = " ".join(f"{name} {metrics[f'fraction/{name}']:.0%}" for name in mechanisms)
    return f"nll {metrics['nll']:.3f} · {routes} · hard {metrics['hard_fraction']:.0%}"


class Progress:
    """A live line in a terminal; a plain line now and then elsewhere; nothing unless `enabled`. `total` are the steps
    of the run, `start` those done before."""

    def __init__(self, label: str, *, total: int, start: int, tokens_per_step: int, enabled: bool = True):
        self._label, self._total, self._first = label, total, 0
        self._tokens = tokens_per_step
        self._enabled = enabled
        self._began = time.monotonic()
        self._spoke = self._began
        self._live = None
        out = Tolerant(sys.stdout)
        if enabled and out.isatty():
            # A name is text, whatever it looks like to rich.
            self._live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", style="bold", markup=False),
                rich.progress.BarColumn(bar_width=20), rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[status]}", markup=False), rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=out),
            )
            self._task = self._live.add_task(label, total=total, completed=start, status="compiling")
            self._live.start()

    def update(self, step: int, status: str) -> None:
        """Shows the state after `step` steps."""
        if not self._enabled:
            return
        now = time.monotonic()
        if not self._first:  # Compilation is over: speed and ETA count from here.
            self._first, self._began = step, now
        done = step - self._first
        seconds_per_step = (now - self._began) / done if done else math.inf
        if done:
            status = f"{status} · {self._tokens / seconds_per_step / 1e3:.1f}k tok/s"
        if self._live is not None:
            self._live.update(self._task, completed=step, status=status)
        elif now - self._spoke >= PLAIN_SECONDS or step >= self._total:
            self._spoke = now
            eta = f"{(self._total - step) * seconds_per_step:.0f}s" if done else "?"
            say(f"{self._label}  {step}/{self._total}  {status} · eta {eta}")

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(f"{self._label}  {text}")

    def close(self) -> None:
        """Ends the live line."""
        if self._live is not None:
            self._live.stop()
