"""The GPU check without a GPU: its refusal, budget and record, and all of it at tiny sizes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest

from experiments import gpu_check, gpu_checks
from tests.test_commands import environment

ROOT = pathlib.Path(__file__).parent.parent
HEADER = {"device": "Some GPU 80GB/x", "date": "2026-01-02T03:04:05+00:00"}


def test_without_a_gpu_it_says_so_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.device_or_fail("gpu")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: device: expected a GPU, got cpu; ") and said.count("\n") == 1


def task(name, kind, rows, seconds=10.0):
    return gpu_check.Task(name, kind, seconds, rows)


def test_what_raises_fails_and_the_budget_stops_timings_alone():
    def broken():
        raise RuntimeError("two\nlines")

    def good():
        return [gpu_checks.check("a", 1.0, 2.0), gpu_checks.check("b", float("nan"), 2.0)]

    def timed():
        return [dict(what="t", ratio=1.0, spread=0.0, rounds=1)]

    said = []
    # The first timing would end within the budget, the second, which is thought to take hours, not.
    sections = gpu_check.run_tasks(
        [task("raises", "check", broken), task("good", "check", good),
         task("timed", "timing", timed), task("late", "timing", timed, 1e12),
         task("raises too", "timing", broken, 0.0)],
        budget=60.0, began=time.monotonic(), say=said.append,
    )
    raised, passed, first, late, last = (section["rows"] for section in sections)
    assert raised[0]["passed"] is False and raised[0]["note"] == "RuntimeError: two lines"
    assert [row["passed"] for row in passed] == [True, False] and passed[1]["value"] is None
    assert first[0]["ratio"] == 1.0 and late[0]["note"] == "not run: budget of 1 minutes"
    assert last[0]["passed"] is False and last[0]["note"] == "RuntimeError: two lines"
    assert said[1].startswith("[2/5] good: 1 passed, 1 failed") and "left" in said[1]


def test_a_record_is_never_overwritten(tmp_path):
    rows = [gpu_checks.check("a | b", 3.0, 2.0)]
    sections = [dict(name="s", kind="check", seconds=1.0, rows=rows)]
    paths = [gpu_check.write(tmp_path, HEADER, sections) for _ in range(3)]
    stem = "gpu_check_2026-01-02_some-gpu-80gb-x"
    assert [path.name for path in paths] == [f"{stem}{end}.json" for end in ("", "_2", "_3")]
    assert json.loads(paths[0].read_text())["sections"] == sections
    assert "| a \\| b | 3 | 2 | **NO** |" in paths[0].with_suffix(".md").read_text()


@pytest.mark.slow
def test_all_of_it_runs_at_tiny_sizes_without_a_gpu(tmp_path):
    env = {**environment(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "experiments.gpu_check", "--platform=cpu", f"--out={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "left\n[2/" in result.stdout
    (record,) = tmp_path.glob("gpu_check_*_cpu.json")
    (page,) = tmp_path.glob("gpu_check_*_cpu.md")
    content = json.loads(record.read_text())
    assert content["backend"] == "cpu" and content["record"].startswith("no GPU record")
    assert "no GPU record" in page.read_text() and content["rows"]["failed"] == 0
    rows = [row for section in content["sections"] for row in section["rows"]]
    compared = [row for row in rows if "check" in row]
    timed = [row for row in rows if "what" in row]
    # cuDNN is named where it is missing, and nothing else is.
    for row in compared:
        assert (row["passed"] is None) == ("cudnn" in row["check"]), row
        if row["passed"] is not None:
            assert row["passed"] is True and row["value"] <= row["tolerance"]
    for row in timed:
        assert (row["ratio"] is None) == ("cuDNN" in row["what"]), row
        assert row["ratio"] is not None or row["note"].startswith("not run: implementation: ")
    for part in ("full xla", "full blockwise", "linear", "local", "packed = select, bfloat16",
                 "mesh of", "causality", "recall, bfloat16, restored"):
        assert any(part in row["check"] for row in compared), part
    for part in ("linear / cuDNN full", "packed hard, 10 % full / blockwise full",
                 "train step, Bayesian packed hard / full-only", "decode, hard"):
        assert any(part in row["what"] for row in timed), part
