"""Does packed hard routing pay, and how close does it come to what its parts cost?

python -m experiments.benchmarks.hard_routing [--json=FILE] [--times=2048,8192,32768] [--rounds=5]
    [--fractions=5,10,25] [--batches=1,4] [--max_tokens=131072]

One layer's attention, float32, H 4, d 64, w 256, routes at random positions, what is not full half linear half local.
`speedup`: the fastest full attention at hand / packed dispatch, in the same process, interleaved, median of the rounds'
ratios; `spread` its interquartile range. `efficiency`: (f t_full + t_linear + t_local) / measured, each the best there
is. Batch 4: sequences of their own fractions, 0, 5, 10 and 25 % full (`fraction_full` is their mean).
"""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.mechanisms import full, linear, local
from meta_attention_jax.routing.dispatch import hard_attention
from meta_attention_jax.types import AttentionSpec

JSON = commands.define_path("json", None, "Write the rows here.")
TIMES = flags.DEFINE_list("times", ["2048", "8192", "32768"], "T.")
FRACTIONS = flags.DEFINE_list("fractions", ["5", "10", "25"], "Percent full, batch 1.")
BATCHES = flags.DEFINE_list("batches", ["1", "4"], "Among 1 and 4.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 131072, "Larger batch x T are left out.", 1)

HEADS, DIM, WINDOW = 4, 64, 256
SQUARE_TIME, PACKED_TOKENS = 2048, 32768
"""Longest T at which the T x T form is a candidate (it is the slowest there, and the square of 8192
tokens takes a gigabyte), and most tokens at which packed dispatch of all tokens is (for time's sake)."""


def sides(time: int, batch: int, fractions, direction: str):
    """name -> call; "full ..." are the candidates of the baseline."""
    qkv = common.random_qkv(batch, time, HEADS, DIM)
    timed = lambda function, *routes: common.timed(function, direction, qkv, *routes)  # noqa: E731
    spec = AttentionSpec(window=WINDOW, implementation="blockwise")
    hard = functools.partial(hard_attention, spec=spec)
    alone = {"full blockwise": full, "linear": linear, "local": local}
    calls = {name: timed(functools.partial(one.attend, spec=spec)) for name, one in alone.items()}
    if batch * time <= PACKED_TOKENS:
        calls["full packed"] = timed(hard, jnp.zeros((batch, time), jnp.int32))
    if time <= SQUARE_TIME:
        calls["full xla"] = timed(functools.partial(full.attend, spec=AttentionSpec(implementation="xla")))
    for label, rows in fractions.items():
        calls[label] = timed(hard, jnp.asarray(common.random_routes(rows, time)))
    return calls


def rows_of(time: int, batch: int, direction: str) -> list[common.Row]:
    """Times one setting and makes its rows."""
    if batch == 1:
        fractions = {f"hard {p} %": [float(p) / 100] for p in FRACTIONS.value}
    else:
        fractions = {"hard uneven": list(common.UNEVEN)}
    seconds = common.interleave(sides(time, batch, fractions, direction), ROUNDS.value)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    baseline = min((name for name in medians if name.startswith("full")), key=medians.get)
    rows = []
    for label, parts in fractions.items():
        f = float(np.mean(parts))
        speedup, spread = common.median_and_spread(seconds[baseline] / seconds[label])
        ideal = f * medians[baseline] + medians["linear"] + medians["local"]
        rows.append({
            "T": time,
            "fraction_full": f,
            "direction": direction,
            "batch": batch,
            "speedup": speedup,
            "efficiency": ideal / medians[label],
            "spread": spread,
            "baseline": baseline,
            "candidates": {n: m for n, m in medians.items() if n.startswith("full")},
            "seconds": medians[label],
            "full_seconds": medians[baseline],
            "linear_seconds": medians["linear"],
            "local_seconds": medians["local"],
            "rounds": ROUNDS.value,
        })
    return rows


def main() -> None:
    with commands.user_mistakes():
        times = common.numbers("times", TIMES.value, "at least 1", lambda x: x >= 1)
        batches = common.numbers("batches", BATCHES.value, "1 or 4", lambda x: x in (1, len(common.UNEVEN)))
        common.numbers("fractions", FRACTIONS.value, "from 0 to 100", lambda x: x <= 100)
    sizes = list(itertools.product(times, batches))
    for time, batch in sizes:
        if batch * time > MAX_TOKENS.value:
            print(f"left out: batch {batch} x T {time} > max_tokens {MAX_TOKENS.value}")
    fit = [size for size in sizes if math.prod(size) <= MAX_TOKENS.value]
    common.tell((rows_of(*size, direction) for size in fit for direction in common.DIRECTIONS), JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
