"""Interleaved timing and the rows every benchmark prints.

A benchmark answers one question with a *ratio* of two sides that run in one process, in turns, so
that a slow minute of the machine slows both. Times are seconds of wall clock.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meta_attention_jax.files import write_whole

Row = dict[str, Any]

UNEVEN = (0.0, 0.05, 0.10, 0.25)
"""Shares of full attention of the four sequences of an uneven batch."""


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, np.ndarray]:
    """Times every function once per round; the order rotates from round to round.

    Args:
      functions: name -> call without arguments; its result is waited for (jax.block_until_ready).
      rounds: timed rounds, at least 1.
      warmup: untimed calls of each function first (compilation, caches).

    Returns:
      name -> seconds, shape [rounds]; entry r of every name belongs to the same round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}.")
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            jax.block_until_ready(functions[name]())
    seconds = {name: np.zeros(rounds) for name in names}
    for r in range(rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name][r] = time.perf_counter() - start
    return seconds


def ratio_row(name: str, seconds: Mapping[str, np.ndarray], numerator: str, denominator: str, **sizes: Any) -> Row:
    """One row: the ratio of two interleaved sides.

    `ratio` is the median over rounds of seconds[numerator] / seconds[denominator] (below 1: the
    numerator is faster), `spread` its interquartile range.
    """
    ratios = seconds[numerator] / seconds[denominator]
    low, high = np.percentile(ratios, [25, 75])
    return {
        "name": name,
        **sizes,
        "ratio": float(np.median(ratios)),
        "spread": float(high - low),
        "rounds": int(ratios.size),
        "seconds": float(np.median(seconds[numerator])),
        "baseline": denominator,
        "baseline_seconds": float(np.median(seconds[denominator])),
    }


def random_routes(fractions, time: int) -> np.ndarray:
    """[B, T]: full with the sequence's own probability, else linear or local."""
    rng = np.random.default_rng(0)
    uniform = rng.random((len(fractions), time))
    f = np.asarray(fractions)[:, None]
    return np.where(uniform < f, 0, np.where(uniform < f + (1 - f) / 2, 1, 2)).astype(np.int32)


def numbers(field: str, texts: list[str], expected: str, good) -> list[int]:
    """Whole numbers of a list flag; raises ValueError of one sentence at the first bad one."""
    for text in texts:
        if not text.isdigit() or not good(int(text)):
            raise ValueError(f"{field}: expected whole numbers, {expected}, got {text!r}.")
    return [int(text) for text in texts]


def environment() -> Row:
    """Device, versions and commit: the header of every result file."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "backend": jax.default_backend(),
        "devices": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        **{lib: importlib.metadata.version(lib) for lib in ("jax", "jaxlib", "flax")},
        "commit": commit(),
    }


def commit() -> str | None:
    """Short hash of the checkout, with "-dirty" appended if it has changes; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        short = git("rev-parse", "--short", "HEAD")
        return short + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes {"environment": ..., "rows": [...]}; parent folders are made."""
    record = {"environment": environment(), "rows": list(rows)}
    write_whole(path, json.dumps(record, indent=2) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
