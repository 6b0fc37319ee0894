"""How does the peak memory of the layer's gradient grow with the length, and what is it at 32k?

python -m experiments.benchmarks.memory [--json=FILE]

Compiler's figures (temporaries, outputs), not timings: the ratio has no spread.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax import AttentionSpec, MetaAttention

JSON = commands.define_path("json", None, "Write the rows here.")
HEADS, DIM, WINDOW = 4, 64, 256
SHORT, LONG, LONGEST = 4096, 16384, 32768


def peak_bytes(time: int, mode: str = "soft") -> int:
    """Temporaries and outputs of the compiled gradient, bytes; "hard" is by packed dispatch."""
    layer = MetaAttention(
        num_heads=HEADS, spec=AttentionSpec(window=WINDOW, implementation="blockwise"), rotary=True,
        mode=mode, dispatch="packed",
    )
    x = jax.ShapeDtypeStruct((1, time, HEADS * DIM), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(layer.init, key, jnp.zeros((1, 8, HEADS * DIM)))

    def loss(params, x):
        keys = jax.random.split(key, 1) if mode == "soft" else None
        return jnp.sum(jnp.square(layer.apply({"params": params}, x, keys=keys)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["params"], x).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def main() -> None:
    short, long = peak_bytes(SHORT), peak_bytes(LONG)
    rows = [
        {"name": "peak memory of the layer's gradient", "T": LONG, "T_baseline": SHORT,
         "ratio": long / short, "spread": 0.0, "bytes": long, "baseline_bytes": short}
    ]
    soft, hard = peak_bytes(LONGEST), peak_bytes(LONGEST, "hard")
    rows.append(
        {"name": "the same, hard (packed) / soft", "T": LONGEST, "T_baseline": LONGEST,
         "ratio": hard / soft, "spread": 0.0, "bytes": hard, "baseline_bytes": soft}
    )
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
