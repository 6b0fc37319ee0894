"""Timings on a GPU against full attention by cuDNN, and a dated record of them and of the checks.

make gpu-check                              the checks of tests/test_gpu.py, then this, in 10 minutes
python -m experiments.benchmarks.gpu [--budget_minutes=4] [--checks=FILE.xml] [--out=FOLDER]
python -m experiments.benchmarks.gpu --platform=cpu --out=FOLDER    tries the script itself, tiny

`--checks` is what pytest's --junitxml wrote. Exit code 1 if a check failed or something raised, 2
where there is no GPU. Writes gpu_check_<date>_<device>.json and .md.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import pathlib
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
from absl import flags

from experiments import common as commands
from experiments.benchmarks import decoding
from experiments.benchmarks import gpu_timings as timings
from experiments.benchmarks.common import DIRECTIONS, Row, device_or_fail, environment, markdown, sentence

PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "cpu tries this script, tiny.")
OUT = commands.define_path("out", None, "Folder of the record; experiments/results on a GPU.")
CHECKS = commands.define_path("checks", None, "What pytest --junitxml wrote of tests/test_gpu.py.")
BUDGET = flags.DEFINE_float("budget_minutes", 4.0, "No timing starts that would end later.", 0.0)

RESULTS = pathlib.Path(__file__).parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of everything."""

    # (T, d, window) of each pair of timing tables, the most important first.
    tables: tuple[tuple[int, int, int], ...] = ((8192, 64, 256), (2048, 64, 256), (8192, 128, 256), (16384, 64, 256))
    train_step: tuple[tuple[str, int], ...] = (
        ("model_dim", 256), ("layers", 4), ("time", 1024), ("window", 128), ("batch", 8),
    )
    decode: decoding.Sizes = decoding.Sizes(context=8192, batch=8, steps=16)
    rounds: int = 5


TINY = Sizes(
    tables=((128, 16, 20),),
    train_step=(("model_dim", 32), ("layers", 1), ("time", 64), ("window", 8), ("batch", 2)),
    decode=decoding.Sizes(context=32, batch=2, steps=2, model_dim=32, layers=1, window=8),
    rounds=2,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One line of progress."""

    name: str
    seconds: float  # It may take so long on a data-center GPU, compilation included: a guess, to tell the time left.
    rows: Callable[[], list[Row]]


def tasks_of(sizes: Sizes) -> list[Task]:
    """The most important first."""

    def task(name: str, seconds: float, rows: Callable[..., list[Row]], *of: Any) -> Task:
        return Task(f"timings, {name}", seconds, functools.partial(rows, *of, sizes.rounds))

    tables = [
        task(f"T {length}, d {dim}, {direction}", 14, timings.mechanism_rows, length, dim, window, direction)
        for length, dim, window in sizes.tables for direction in DIRECTIONS
    ]
    models = [task("train step", 45, timings.train_step_rows, dict(sizes.train_step)),
              task("decoding", 25, timings.decode_rows, sizes.decode)]
    return tables[:4] + models + tables[4:]


def checked(path: str) -> list[dict[str, Any]]:
    """Sections of the record from pytest's report: a row per comparison, or one per test without."""
    try:
        cases = list(xml.parse(path).iter("testcase"))
    except (OSError, xml.ParseError) as error:
        raise ValueError(f"checks: expected a report of pytest, got {path!r} ({error}).") from None
    sections = []
    for case in cases:
        rows = [json.loads(p.get("value")) for p in case.iter("property") if p.get("name") == "row"]
        broken = case.find("failure") is not None or case.find("error") is not None
        if not rows or broken and all(row["passed"] is not False for row in rows):
            told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            note = "" if told is None else sentence(told.get("message") or "")
            passed = False if broken else None if told is not None else True
            rows.append(dict(check=case.get("name"), value=None, tolerance=None, passed=passed, note=note))
        seconds = round(float(case.get("time", 0)), 1)
        sections.append(dict(name=case.get("name"), kind="check", seconds=seconds, rows=rows))
    return sections


def run_tasks(tasks: Sequence[Task], budget: float, began: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Sections {name, kind, seconds, rows} of the record; no timing may be under way `budget` seconds after
    `began`, of `time.monotonic()`."""
    sections, guessed, spent = [], 0.0, 0.0
    pace = 1.0  # How much slower or faster than the guesses this machine is.
    for number, task in enumerate(tasks, 1):
        start = time.monotonic()
        if start - began + pace * task.seconds > budget:
            rows = [timings.without(task.name, f"not run: budget of {budget / 60:.3g} minutes")]
        else:
            rows = attempt(task)
            guessed += task.seconds
            spent += time.monotonic() - start
            pace = spent / guessed if guessed else 1.0
        took = time.monotonic() - start
        sections.append(dict(name=task.name, kind="timing", seconds=round(took, 1), rows=rows))
        left = pace * sum(t.seconds for t in tasks[number:])
        left = min(left, max(budget - (time.monotonic() - began), 0.0))
        say(f"[{number}/{len(tasks)}] {task.name}: {verdict(rows)} ({took:.0f} s), about {left:.0f} s left")
    return sections


def attempt(task: Task) -> list[Row]:
    """Its rows, or one that failed: no table stops the others."""
    try:
        return task.rows()
    except Exception as error:
        return [timings.without(task.name, f"{type(error).__name__}: {sentence(error)}") | {"passed": False}]


def count(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows passed, were timed, failed, and were not run."""
    found = dict.fromkeys(("passed", "timed", "failed", "not run"), 0)
    for row in rows:
        without = "not run" if row.get("ratio") is None else "timed"
        found[{True: "passed", False: "failed"}.get(row.get("passed"), without)] += 1
    return found


def verdict(rows: Sequence[Row]) -> str:
    return ", ".join(f"{n} {name}" for name, n in count(rows).items() if n)


def about(device: jax.Device, sections: Sequence[Any], began: float) -> dict[str, Any]:
    """The header of the record."""
    found = environment()
    commit = found.pop("commit")
    on_gpu = found["backend"] == "gpu"
    packages = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions()
        if re.match(r"nvidia-cudnn|jax-cuda|nvidia-cuda-runtime", d.metadata["Name"] or "")
    }
    return {
        "record": "GPU" if on_gpu else f"no GPU record: {found['backend']}, to try the script",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m experiments.benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
        **found,
        "driver": driver() if on_gpu else None,
        "platform_version": " ".join(str(device.client.platform_version).split()),
        "compute_capability": getattr(device, "compute_capability", None),
        "packages": packages,
        "seeds": "inputs by T or 0 to 3, routes 0, parameters and data 0",
        "minutes": round((time.monotonic() - began) / 60, 2),
        "rows": count([row for section in sections for row in section["rows"]]),
    }


def driver() -> Optional[str]:
    """Name, driver and memory of each GPU, as the vendor's tool says it; None without the tool."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # A missing tool is an OSError.
        return None
    return "; ".join(answer.stdout.strip().splitlines())


def page(header: dict[str, Any], sections: Sequence[dict[str, Any]]) -> str:
    """The record for people."""
    lines = [f"# GPU check, {header['device']}, {header['date'][:10]}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in header.items()]
    for section in sections:
        rows = section["rows"]
        if section["kind"] == "check":
            rows = [dict(row, passed={True: "yes", False: "**NO**"}.get(row["passed"], "not run")) for row in rows]
        lines += ["", f"## {section['name']} ({section['seconds']} s)", "", markdown(rows)]
    lines += ["", "Ratios are medians over interleaved rounds, below 1 the first side is faster; "
              "spread is the interquartile range."]
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, header: dict[str, Any], sections: Sequence[Any]) -> pathlib.Path:
    """Writes both files under a name that is not taken; returns that of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    ends = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    paths = (folder / f"gpu_check_{header['date'][:10]}_{slug}{end}.json" for end in ends)
    path = next(path for path in paths if not (path.exists() or path.with_suffix(".md").exists()))
    content = json.dumps(dict(header, sections=list(sections)), indent=1, allow_nan=False)
    for place, text in ((path, content + "\n"), (path.with_suffix(".md"), page(header, sections))):
        with open(place, "x", encoding="utf-8") as file:
            file.write(text)
    return path


def main() -> None:
    began = time.monotonic()
    if PLATFORM.value == "cpu" and OUT.value is None:
        commands.fail("out: expected a folder with --platform=cpu, whose record is none, got none.")
    with commands.user_mistakes():
        sections = checked(CHECKS.value) if CHECKS.value else []
    device = device_or_fail(PLATFORM.value)
    sizes = Sizes() if PLATFORM.value == "gpu" else TINY
    print(f"{len(jax.devices())} x {device.device_kind}, {environment()['commit'] or 'no commit'}", flush=True)
    sections += run_tasks(tasks_of(sizes), 60 * BUDGET.value, began, functools.partial(print, flush=True))
    header = about(device, sections, began)
    path = write(pathlib.Path(OUT.value or RESULTS), header, sections)
    rows = [row for section in sections for row in section["rows"]]
    for row in (row for row in rows if row.get("passed") is False):
        what, note = row.get("check", row.get("what")), f" {row['note']}" if "note" in row else ""
        print(f"failed: {what}: {row.get('value')}, expected at most {row.get('tolerance')}{note}", file=sys.stderr)
    print(f"{header['minutes']} minutes: {verdict(rows)}; {path} and .md")
    if header["rows"]["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    commands.run(main)
