"""What does hard routing save of attention on a GPU, against the fastest full attention there?

python -m experiments.benchmarks.kernels [--out=FILE.json] [--times=16384,32768,131072] [--budget_minutes=5]
python -m experiments.benchmarks.kernels --platform=cpu    tries the script itself, tiny

Attention alone, without projections: B 1, H = G = 16, bfloat16. A share of the tokens is routed to full attention, half
of the others to local (w 1024, 4 sinks) and half to linear. The peer is full attention on all tokens by cuDNN (by
blocks where there is none). `speedup`: median over interleaved rounds of peer / routed; `goal`: what is aimed at.
Programs are compiled side by side before anything is timed; rows are written as they come.
"""

from __future__ import annotations

import functools
import time as clock
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common, gpu_timings
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.types import AttentionSpec

FULL, LINEAR, LOCAL = range(3)
HEADS, WINDOW, SINKS, WIDE = 16, 1024, 4, 4096


class Case(NamedTuple):
    """One setting: its routes are drawn by the shares of (full, linear, local)."""

    name: str
    time: int
    shares: tuple[float, float, float]
    direction: str
    goal: Optional[float] = None
    dim: int = 128
    window: int = WINDOW
    sinks: int = SINKS
    peer: str = "full"  # Or "window", of the same width: then there are no sinks.


def mixed(share: float) -> tuple[float, float, float]:
    return share, (1 - share) / 2, (1 - share) / 2


GOALS = {16384: 2.0, 32768: 3.0, 131072: 5.0}
"""Of forward and of forward+backward at 10 %, by length."""


def cases(times: list[int]) -> list[Case]:
    """The most important first."""
    found = []
    for time in times:
        for direction in common.DIRECTIONS:
            found.append(Case("10 % full", time, mixed(0.1), direction, GOALS.get(time)))
    middle = times[len(times) // 2]
    for direction in common.DIRECTIONS:
        found += [
            Case("20 % full", middle, mixed(0.2), direction, 2.5),
            Case("all local", middle, (0.0, 0.0, 1.0), direction),
            Case("all full", middle, (1.0, 0.0, 0.0), direction, 0.5),
            Case("all local, w 4096", middle, (0.0, 0.0, 1.0), direction, 1.0, window=WIDE, sinks=0, peer="window"),
            Case("10 % full, d 64", middle, mixed(0.1), direction, dim=64),
        ]
    return found


def parts(times: list[int]) -> list[Case]:
    """What one mechanism costs where the others are asked by nobody."""
    return [
        Case(name, time, shares, direction)
        for time in times[:2] for direction in common.DIRECTIONS
        for name, shares in (("linear alone", (0.0, 1.0, 0.0)), ("10 % full, 90 % local", (0.1, 0.0, 0.9)))
    ]


def routes(case: Case) -> jax.Array:
    drawn = np.random.default_rng(case.time).choice(3, size=(1, case.time), p=case.shares)
    return jnp.asarray(drawn, jnp.int32)


def sides(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """(q, k, v, route) -> outputs, of the peer and of the routed side."""
    spec = AttentionSpec(window=case.window, sinks=case.sinks, kernel=kernel())
    if case.peer == "window" and not refusal(case):
        peer = lambda q, k, v, route: gpu_timings.cudnn_window(q, k, v, case.window)  # noqa: E731
    else:
        kind = "local" if case.peer == "window" else "full"
        peer = lambda q, k, v, route: attend(kind, q, k, v, spec=spec)  # noqa: E731
    return {"peer": peer, "routed": functools.partial(hard_attention, spec=spec)}


def kernel() -> str:
    return "pallas" if jax.default_backend() == "gpu" else "portable"


def refusal(case: Case) -> Optional[str]:
    """Why cuDNN is not the peer."""
    return gpu_timings.cudnn_refusal(jnp.bfloat16, case.dim, case.time)


def program(function: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """Of outputs, or of the gradients of q, k, v too."""
    if direction == "forward":
        return function

    def both(q, k, v, route):
        out, pull = jax.vjp(lambda *x: function(*x, route), q, k, v)
        return out, pull(q)

    return both


def arguments(case: Case) -> tuple[jax.Array, ...]:
    return *common.random_qkv(1, case.time, HEADS, case.dim, jnp.bfloat16), routes(case)


def compiled(case: Case) -> dict[str, Any]:
    shapes = [jax.ShapeDtypeStruct((1, case.time, HEADS, case.dim), jnp.bfloat16)] * 3
    shapes.append(jax.ShapeDtypeStruct((1, case.time), jnp.int32))
    return {
        name: jax.jit(program(function, case.direction)).lower(*shapes).compile()
        for name, function in sides(case).items()
    }


def pairs(case: Case) -> float:
    """Allowed pairs of the softmax mechanisms; each costs 4 d FLOPs forward."""
    route, index = np.asarray(routes(case)), np.arange(case.time)[None]
    local = np.minimum(index + 1, case.window + case.sinks)
    return float(np.where(route == FULL, index + 1, np.where(route == LOCAL, local, 0)).sum())


def row_of(case: Case, programs: dict[str, Any], rounds: int) -> common.Row:
    values = arguments(case)
    seconds = gpu_timings.per_call({n: functools.partial(p, *values) for n, p in programs.items()}, rounds)
    speedup, spread = common.median_and_spread(seconds["peer"] / seconds["routed"])
    ours, peer = (float(np.median(seconds[name])) for name in ("routed", "peer"))
    products = 2 if case.direction == "forward" else 7  # Of T x T matrices, recomputed logits among them.
    flops = products * 2 * case.dim * HEADS * pairs(case)
    return {
        "what": case.name, "T": case.time, "d": case.dim, "direction": case.direction, "speedup": speedup,
        "goal": case.goal, "spread": spread, "milliseconds": 1e3 * ours, "peer_milliseconds": 1e3 * peer,
        "softmax_tflops": flops / ours / 1e12, "kernel": kernel(),
        "peer": f"{case.peer} by {'blocks' if refusal(case) else 'cuDNN'}", "rounds": rounds,
    }


def rows(found: list[Case], rounds: int, until: float) -> Iterator[list[common.Row]]:
    """A row per case; a case that fails, or for which there is no time, says so and stops no other."""
    with futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(compiled, case) for case in found]
        for case, programs in zip(found, waiting):
            row = {"what": case.name, "T": case.time, "d": case.dim, "direction": case.direction, "goal": case.goal}
            if clock.monotonic() > until:
                programs.cancel()
                yield [row | {"note": "not run: out of time"}]
                continue
            try:
                yield [row_of(case, programs.result(), rounds)]
            except Exception as error:  # Of a compiler or a device: they have no common class.
                yield [row | {"note": f"{type(error).__name__}: {str(error)[:200]}"}]


def line(part: list[common.Row]) -> str:
    """One row for people."""
    (row,) = part
    name = f"{row['what']}, T {row['T']}, d {row['d']}, {row['direction']}"
    if "speedup" not in row:
        return f"{name:55} {row['note']}"
    goal = f", goal {row['goal']:g}" if row["goal"] else ""
    return (f"{name:55} {row['speedup']:6.2f} x the peer's speed (spread {row['spread']:.2f}{goal}); "
            f"{row['milliseconds']:.3g} against {row['peer_milliseconds']:.3g} ms, {row['softmax_tflops']:.0f} TFLOP/s")


def main() -> None:
    began = clock.monotonic()
    with commands.user_mistakes():
        times = common.numbers("times", TIMES.value, "at least 64", lambda x: x >= 64)
    common.device_or_fail(PLATFORM.value)
    if PLATFORM.value == "cpu":
        times = [64, 128]
    found = cases(times)[: 2 * len(times)] + parts(times) + cases(times)[2 * len(times) :]
    common.tell(rows(found, ROUNDS.value, began + 60 * BUDGET.value), OUT.value, line)


if __name__ == "__main__":
    PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "cpu tries this script, tiny.")
    OUT = commands.define_path("out", None, "Where the rows go, JSON.")
    TIMES = flags.DEFINE_list("times", ["16384", "32768", "131072"], "Lengths.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved.", 1)
    BUDGET = flags.DEFINE_float("budget_minutes", 5.0, "No case starts later.", 0.0)
    commands.run(main, prints=True)
