"""Interleaved timing and the rows every benchmark prints.

A benchmark answers one question with a *ratio* of two sides that run in one process, in turns, so
that a slow minute of the machine slows both. Times are seconds of wall clock.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base
from experiments import common as commands
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole

Row = dict[str, Any]

UNEVEN = (0.0, 0.05, 0.10, 0.25)
"""Shares of full attention of the four sequences of an uneven batch."""

DIRECTIONS = ("forward", "forward+backward")


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, np.ndarray]:
    """name -> seconds of every round, shape [rounds]: each function is called once per round, waited for,
    in an order that rotates from round to round; before that `warmup` times untimed (compilation, caches)."""
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


def median_and_spread(ratios: np.ndarray) -> tuple[float, float]:
    """Over the rounds; the spread is the interquartile range."""
    low, high = np.percentile(ratios, [25, 75])
    return float(np.median(ratios)), float(high - low)


def ratio_row(name: str, seconds: Mapping[str, np.ndarray], numerator: str, denominator: str, **sizes: Any) -> Row:
    """One row of two interleaved sides: `ratio` is the median over rounds of seconds[numerator] / seconds[denominator],
    below 1 where the numerator is faster, and `spread` the interquartile range."""
    ratio, spread = median_and_spread(seconds[numerator] / seconds[denominator])
    return {
        "name": name,
        **sizes,
        "ratio": ratio,
        "spread": spread,
        "rounds": len(seconds[numerator]),
        "seconds": float(np.median(seconds[numerator])),
        "baseline": denominator,
        "baseline_seconds": float(np.median(seconds[denominator])),
    }


def random_qkv(batch: int, time: int, heads: int, dim: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Queries, keys and values, [B, T, H, d] each."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (batch, time, heads, dim), dtype) for key in keys]


def timed(function: Callable[..., jax.Array], direction: str, qkv: Sequence[jax.Array], *more: Any) -> Callable:
    """A compiled call of `function(q, k, v, *more)`, or of its gradients: of the sum of squares, by q, k, v."""

    def gradients(q, k, v, *more):
        loss = lambda *x: jnp.sum(jnp.square(function(*x, *more).astype(jnp.float32)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    return functools.partial(jax.jit(function if direction == "forward" else gradients), *qkv, *more)


def random_routes(fractions, time: int) -> np.ndarray:
    """[B, T]: full with the sequence's own probability, else linear or local."""
    rng = np.random.default_rng(0)
    uniform = rng.random((len(fractions), time))
    f = np.asarray(fractions)[:, None]
    return np.where(uniform < f, 0, np.where(uniform < f + (1 - f) / 2, 1, 2)).astype(np.int32)


def sized_config(model_dim: int, layers: int, time: int, window: int, batch: int, heads: int = 4) -> ConfigDict:
    """The defaults at other sizes, for one device."""
    config = base.get_config()
    config.data.sequence_length, config.data.batch_size = time, batch
    config.model.model_dim, config.model.num_layers = model_dim, layers
    config.model.num_heads = config.model.num_kv_heads = heads
    config.model.window = window
    config.parallel.devices = 1
    return config


def numbers(field: str, texts: list[str], expected: str, good) -> list[int]:
    """Whole numbers of a list flag; raises ValueError of one sentence at the first bad one."""
    expect(texts, field, f"whole numbers, {expected}", "none")
    for text in texts:
        if not text.isdigit() or not good(int(text)):
            raise ValueError(f"{field}: expected whole numbers, {expected}, got {text!r}.")
    return [int(text) for text in texts]


def device_or_fail(platform: str) -> jax.Device:
    """The first device; one sentence and exit code 2 where it is no GPU but should be one."""
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        device = jax.devices()[0]
    except RuntimeError as error:  # JAX_PLATFORMS names what is not there.
        commands.fail(f"device: expected a GPU, got none ({sentence(error)})")
    if platform == "gpu" and jax.default_backend() != "gpu":
        commands.fail(
            f"device: expected a GPU, got {jax.default_backend()}; `make gpu-check` installs the CUDA extra of jax. "
            "Without one, --platform=cpu tries those scripts that have it."
        )
    return device


def sentence(error: Exception | str) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def environment() -> Row:
    """Device, versions and commit: the header of every result file."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "backend": jax.default_backend(),
        "devices": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{lib: importlib.metadata.version(lib) for lib in ("jax", "jaxlib", "flax")},
        "commit": commit(),
    }


def commit() -> Optional[str]:
    """Short hash of the checkout, with "-dirty" appended if it has changes, but for records; None outside git."""

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    try:
        short = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results")
        return short + ("-dirty" if changed else "")
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
        if isinstance(value, float):
            return f"{value:.4g}"
        return "" if value is None else str(value).replace("|", "\\|")

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tell(parts: Iterable[Sequence[Row]], path: Optional[str], table: Callable[[Sequence[Row]], str] = markdown) -> None:
    """Prints the environment and a table of each part of the rows; all so far are in the file at `path`."""
    print(environment())
    rows: list[Row] = []
    for part in parts:
        print(table(part), flush=True)
        rows += part
        if path:
            write_json(path, rows)
