"""The GPU benchmark without a GPU: its refusal, budget and record, and all of it at tiny sizes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.benchmarks import gpu
from tests.test_commands import environment

ROOT = pathlib.Path(__file__).parent.parent
HEADER = {"device": "Some GPU 80GB/x", "date": "2026-01-02T03:04:05+00:00"}
REPORT = """<testsuites><testsuite>
<testcase name="good" time="1.5"><properties><property name="row" value="{row}"/></properties></testcase>
<testcase name="broken" time="0.5"><error message="RuntimeError: two&#10;lines">...</error></testcase>
<testcase name="absent" time="0.0"><skipped message="not run: no cuDNN"/></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_it_says_so_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.device_or_fail("gpu")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: device: expected a GPU, got cpu; ") and said.count("\n") == 1


def test_the_budget_stops_timings_and_what_raises_stops_no_other():
    def broken():
        raise RuntimeError("two\nlines")

    def timed():
        return [dict(what="t", ratio=1.0, spread=0.0, rounds=1)]

    said = []
    # The first timing would end within the budget, the second, which is thought to take hours, not.
    sections = gpu.run_tasks(
        [gpu.Task("timed", 10.0, timed), gpu.Task("late", 1e12, timed), gpu.Task("raises", 0.0, broken)],
        budget=60.0, began=time.monotonic(), say=said.append,
    )
    first, late, last = (section["rows"] for section in sections)
    assert first[0]["ratio"] == 1.0 and late[0]["note"] == "not run: budget of 1 minutes"
    assert last[0]["passed"] is False and last[0]["note"] == "RuntimeError: two lines"
    assert said[0].startswith("[1/3] timed: 1 timed") and "left" in said[0]


def test_the_checks_come_from_the_report_of_the_tests(tmp_path):
    row = json.dumps(dict(check="a", value=1.0, tolerance=2.0, passed=True)).replace('"', "&quot;")
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(row=row))
    good, broken, absent = gpu.checked(str(path))
    assert good["rows"] == [dict(check="a", value=1.0, tolerance=2.0, passed=True)]
    assert broken["rows"][0]["passed"] is False and "RuntimeError: two lines" in broken["rows"][0]["note"]
    assert absent["rows"][0]["passed"] is None and absent["rows"][0]["note"] == "not run: no cuDNN"
    assert gpu.count([s["rows"][0] for s in (good, broken, absent)]) == {
        "passed": 1, "timed": 0, "failed": 1, "not run": 1
    }
    path.write_text("no report")
    with pytest.raises(ValueError, match="^checks: expected a report of pytest, got"):
        gpu.checked(str(path))


def test_a_record_is_never_overwritten(tmp_path):
    rows = [dict(check="a | b", value=3.0, tolerance=2.0, passed=False)]
    sections = [dict(name="s", kind="check", seconds=1.0, rows=rows)]
    paths = [gpu.write(tmp_path, HEADER, sections) for _ in range(3)]
    stem = "gpu_check_2026-01-02_some-gpu-80gb-x"
    assert [path.name for path in paths] == [f"{stem}{end}.json" for end in ("", "_2", "_3")]
    assert json.loads(paths[0].read_text())["sections"] == sections
    assert "| a \\| b | 3 | 2 | **NO** |" in paths[0].with_suffix(".md").read_text()


@pytest.mark.slow
def test_all_timings_run_at_tiny_sizes_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--platform=cpu", f"--out={tmp_path}"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = tmp_path.glob("gpu_check_*_cpu.json")
    content = json.loads(record.read_text())
    assert content["backend"] == "cpu" and content["record"].startswith("no GPU record")
    timed = [row for section in content["sections"] for row in section["rows"]]
    for row in timed:
        # cuDNN is named where it is missing, and nothing else is.
        assert (row["ratio"] is None) == ("cuDNN" in row["what"]), row
        assert row["ratio"] is not None or row["note"].startswith("not run: implementation: ")
    for part in ("linear / cuDNN full", "portable hard, 10 % full / blockwise full",
                 "train step, Bayesian packed hard / full-only", "decode, hard"):
        assert any(part in row["what"] for row in timed), part
