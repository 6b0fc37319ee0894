"""How much faster does a hard-routed model decode than the same model with full attention only?

python -m experiments.benchmarks.decode [--json=FILE] [--context=32768] [--fraction_full=0.1]
    [--batch=8] [--steps=16] [--rounds=5]

Routes are drawn at random and forced: `fraction_full` of the tokens full, the rest half linear and
half local. Caches start with random content of `context` tokens, so there is no prefill. The
baseline is the model with `controller="fixed"`; with `full` as it decodes here (row by row, by
blocks in use) and with one dense product over the whole capacity, whichever is faster. All sides
share one cache, each call has its buffers back.

`floor` counts the bytes that a step must move at the least: parameters once, and per row the keys
and values that its routes name and its linear state (read and written). `ideal` is the ratio of the
two floors, `achieved` is speedup / ideal: 1 means that all of the saving arrives.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax import LanguageModel, RoutingHypers, get_mechanism, register_mechanism
from meta_attention_jax.generation import decode_loop
from meta_attention_jax.mechanisms.masks import MASKED

JSON = flags.DEFINE_string("json", None, "Write the rows here.")
CONTEXT = flags.DEFINE_integer("context", 32768, "Tokens in the cache at the last step.", 1)
FRACTION = flags.DEFINE_float("fraction_full", 0.1, "Of the tokens.", 0.0, 1.0)
BATCH = flags.DEFINE_integer("batch", 8, "Rows.", 1)
STEPS = flags.DEFINE_integer("steps", 16, "Decode steps of one timed call.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)
DIM, LAYERS, HEADS, WINDOW, VOCAB = 256, 4, 4, 256, 256
BASELINES = {"full by rows": "full", "full by one product": "full_dense"}


def decode_dense(q, cache, layer, *, needed):
    """Full attention of all rows at once over the whole capacity; float32, as many kv heads."""
    del needed
    logits = jnp.einsum("bhd,bhkd->bhk", q, cache.k[layer]) * q.shape[-1] ** -0.5
    visible = jnp.arange(cache.capacity)[None] < cache.length[layer][:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED), axis=-1)
    return jnp.einsum("bhk,bhkd->bhd", weights, cache.v[layer])


def make(**fields) -> LanguageModel:
    return LanguageModel(
        vocab_size=VOCAB, model_dim=DIM, num_layers=LAYERS, num_heads=HEADS, mlp_dim=4 * DIM,
        window=WINDOW, mode="hard", **fields,
    )


def floor_bytes(route: np.ndarray, params: int, context: int) -> dict[str, float]:
    """Bytes per step, (hard, all-full); route is [steps, layer, batch]."""
    key_value = 2 * DIM * 4
    state = 2 * (DIM * DIM // HEADS + DIM) * 4
    rows = LAYERS * BATCH.value
    per_step = {k: float((route == k).sum()) / len(route) for k in range(3)}  # full, linear, local
    hard = per_step[0] * context * key_value + per_step[2] * min(WINDOW, context) * key_value
    return {"hard": hard + rows * state + params, "full": rows * context * key_value + params}


def main() -> None:
    context, batch, steps = CONTEXT.value, BATCH.value, STEPS.value
    with commands.user_mistakes():
        if steps > context:
            raise ValueError(f"steps: expected at most the context {context}, got {steps}.")
    register_mechanism(
        "full_dense", dataclasses.replace(get_mechanism("full"), decode=decode_dense)
    )
    model = make()
    fixed = {
        side: make(controller="fixed", mechanisms=(name,), fixed=(name,))
        for side, name in BASELINES.items()
    }
    hypers = RoutingHypers(
        strength=jnp.float32(2.0), preference=jnp.float32(0.1),
        costs=jnp.array([1.0, 0.15, 0.3]), threshold=jnp.float32(0.0),
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), hypers=hypers)["params"]
    size = steps * LAYERS * batch
    full = round(FRACTION.value * size)
    linear = (size - full) // 2
    drawn = np.repeat(np.arange(3, dtype=np.int32), [full, linear, size - full - linear])
    route = np.random.default_rng(0).permutation(drawn).reshape(steps, LAYERS, batch)

    fill = jax.jit(lambda key, like: jax.random.normal(key, like.shape, like.dtype))
    cache = jax.jit(model.init_cache, static_argnums=(0, 1))(batch, context)
    keys, values = fill(jax.random.key(1), cache.k), fill(jax.random.key(2), cache.v)
    held = {
        "cache": cache.replace(k=keys, v=values),
        "logits": jnp.zeros((batch, VOCAB)),
    }
    del cache, keys, values  # the loop consumes them
    keys = jax.random.split(jax.random.key(3), batch)
    start = np.full((LAYERS, batch), context - steps, np.int32)

    def call(model, route):
        def run():
            cache = held["cache"].replace(length=jnp.asarray(start))
            held["cache"], held["logits"], seen = decode_loop(
                model, params, cache, held["logits"], keys, hypers, steps=steps, route=route
            )
            return held["cache"].length, seen["tokens"]

        return run

    sides = {"hard": call(model, route)}
    sides |= {side: call(one, None) for side, one in fixed.items()}
    seconds = common.interleave(sides, ROUNDS.value)
    baseline = min(BASELINES, key=lambda side: np.median(seconds[side]))
    speedups = seconds[baseline] / seconds["hard"]
    low, high = np.percentile(speedups, [25, 75])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    floor = floor_bytes(route, size, context)
    per_step = {side: float(np.median(s)) / steps for side, s in seconds.items()}
    speedup, ideal = float(np.median(speedups)), floor["full"] / floor["hard"]
    rows = [
        dict(
            name="tokens/s, hard / all-full", context=context, fraction_full=FRACTION.value,
            drawn_full=float((route == 0).mean()), batch=batch, speedup=speedup,
            spread=float(high - low), ideal=ideal, achieved=speedup / ideal, baseline=baseline,
            hard_tokens_per_s=batch / per_step["hard"],
            full_tokens_per_s=batch / per_step[baseline],
            hard_floor_mb=floor["hard"] / 1e6, full_floor_mb=floor["full"] / 1e6,
            hard_gb_per_s=floor["hard"] / per_step["hard"] / 1e9,
            full_gb_per_s=floor["full"] / per_step[baseline] / 1e9,
            rounds=ROUNDS.value, steps=steps, D=DIM, L=LAYERS, H=HEADS, w=WINDOW,
            **{f"{side}, ms/step".replace(" ", "_"): 1e3 * t for side, t in per_step.items()},
        )
    ]
    print(common.environment())
    print(common.markdown(rows))
    if JSON.value:
        common.write_json(JSON.value, rows)


if __name__ == "__main__":
    commands.run(main)
