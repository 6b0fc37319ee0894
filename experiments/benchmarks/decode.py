"""How much faster does a hard-routed model decode than the same model with full attention only?

python -m experiments.benchmarks.decode [--json=FILE] [--context=32768] [--fraction_full=0.1]
    [--batch=8] [--steps=16] [--rounds=5]

Routes are drawn at random and forced: `fraction_full` of the tokens full, the rest half linear and half local. Caches
start with random content of `context` tokens, so there is no prefill. The baseline is the model with
`controller="fixed"`; with `full` as it decodes here (row by row, by blocks in use) and with one dense product over the
whole capacity, whichever is faster. All sides share one cache, each call has its buffers back.

`floor` counts the bytes that a step must move at the least: parameters once, and per row the keys
and values that its routes name and its linear state (read and written). `ideal` is the ratio of the
two floors, `achieved` is speedup / ideal: 1 means that all of the saving arrives.
"""

from __future__ import annotations

import jax
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common, decoding
from meta_attention_jax.fields import expect

JSON = commands.define_path("json", None, "Write the rows here.")
CONTEXT = flags.DEFINE_integer("context", 32768, "Tokens in the cache at the last step.", 1)
FRACTION = flags.DEFINE_float("fraction_full", 0.1, "Of the tokens.", 0.0, 1.0)
BATCH = flags.DEFINE_integer("batch", 8, "Rows.", 1)
STEPS = flags.DEFINE_integer("steps", 16, "Decode steps of one timed call.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)


def floor_bytes(route: np.ndarray, params: int, sizes: decoding.Sizes) -> dict[str, float]:
    """Bytes per step, (hard, all-full); route is [steps, layer, batch]."""
    dim, context = sizes.model_dim, sizes.context
    key_value = 2 * dim * 4
    state = 2 * (dim * dim // sizes.heads + dim) * 4
    rows = sizes.layers * sizes.batch
    per_step = {k: float((route == k).sum()) / len(route) for k in range(3)}  # full, linear, local
    hard = per_step[0] * context * key_value + per_step[2] * min(sizes.window, context) * key_value
    return {"hard": hard + rows * state + params, "full": rows * context * key_value + params}


def main() -> None:
    context, batch, steps = CONTEXT.value, BATCH.value, STEPS.value
    with commands.user_mistakes():
        expect(steps <= context, "steps", f"at most the context {context}", steps)
    sizes = decoding.Sizes(context, batch, steps, fraction_full=FRACTION.value)
    route = decoding.draw_routes(sizes)
    sides, params = decoding.sides(sizes)
    seconds = common.interleave(sides, ROUNDS.value)
    baseline = min(decoding.BASELINES, key=lambda side: np.median(seconds[side]))
    speedup, spread = common.median_and_spread(seconds[baseline] / seconds["hard"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    floor = floor_bytes(route, size, sizes)
    per_step = {side: float(np.median(s)) / steps for side, s in seconds.items()}
    ideal = floor["full"] / floor["hard"]
    rows = [
        dict(
            name="tokens/s, hard / all-full", context=context, fraction_full=FRACTION.value,
            drawn_full=float((route == 0).mean()), batch=batch, speedup=speedup,
            spread=spread, ideal=ideal, achieved=speedup / ideal, baseline=baseline,
            hard_tokens_per_s=batch / per_step["hard"], full_tokens_per_s=batch / per_step[baseline],
            hard_floor_mb=floor["hard"] / 1e6, full_floor_mb=floor["full"] / 1e6,
            hard_gb_per_s=floor["hard"] / per_step["hard"] / 1e9,
            full_gb_per_s=floor["full"] / per_step[baseline] / 1e9,
            rounds=ROUNDS.value, steps=steps, D=sizes.model_dim, L=sizes.layers, H=sizes.heads,
            w=sizes.window,
            **{f"{side}, ms/step".replace(" ", "_"): 1e3 * t for side, t in per_step.items()},
        )
    ]
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
