"""Are linear and local attention cheaper than the best full attention, forward and backward?

python -m experiments.benchmarks.mechanisms [--json=FILE] [--time=8192] [--rounds=7]
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.types import AttentionSpec

JSON = commands.define_path("json", None, "Write the rows here.")
TIME = flags.DEFINE_integer("time", 8192, "T.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.", 1)
HEADS, DIM, WINDOW = 4, 64, 256


def functions(direction: str, time: int):
    """name -> call, for one direction."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, time, HEADS, DIM)) for key in keys)

    def forward(name, q, k, v):
        return attend(name, q, k, v, spec=AttentionSpec(window=WINDOW, implementation="blockwise"))

    def backward(name, q, k, v):
        return jax.grad(lambda *x: jnp.sum(jnp.square(forward(name, *x))), argnums=(0, 1, 2))(q, k, v)

    call = forward if direction == "forward" else backward
    return {
        name: functools.partial(jax.jit(functools.partial(call, name)), q, k, v)
        for name in ("full", "linear", "local")
    }


def main() -> None:
    rows = []
    for direction in ("forward", "forward+backward"):
        seconds = common.interleave(functions(direction, TIME.value), ROUNDS.value)
        for name in ("linear", "local"):
            rows.append(
                common.ratio_row(f"{name} / blockwise full", seconds, name, "full",
                                 direction=direction, T=TIME.value, H=HEADS, d=DIM, w=WINDOW)
            )
    print(common.environment())
    print(common.markdown(rows))
    if JSON.value:
        common.write_json(JSON.value, rows)


if __name__ == "__main__":
    commands.run(main, prints=True)
