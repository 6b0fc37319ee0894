"""Are linear and local attention cheaper than the best full attention, forward and backward?

python -m experiments.benchmarks.mechanisms [--json=FILE] [--time=8192] [--rounds=7]
"""

from __future__ import annotations

import functools

from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.types import AttentionSpec

JSON = commands.define_path("json", None, "Write the rows here.")
TIME = flags.DEFINE_integer("time", 8192, "T.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.", 1)
HEADS, DIM, WINDOW = 4, 64, 256


def main() -> None:
    rows = []
    qkv = common.random_qkv(1, TIME.value, HEADS, DIM)
    spec = AttentionSpec(window=WINDOW, implementation="blockwise")
    forms = {name: functools.partial(attend, name, spec=spec) for name in ("full", "linear", "local")}
    for direction in common.DIRECTIONS:
        calls = {name: common.timed(form, direction, qkv) for name, form in forms.items()}
        seconds = common.interleave(calls, ROUNDS.value)
        sizes = dict(direction=direction, T=TIME.value, H=HEADS, d=DIM, w=WINDOW)
        rows += [common.ratio_row(f"{name} / blockwise full", seconds, name, "full", **sizes)
                 for name in ("linear", "local")]
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
