"""A routed published model against full attention alone: prefill of a long text, then decoding, measured.

python -m experiments.benchmarks.routed_speed --workdir=runs/smollm2/end_to_end --length=8064 --steps=128
    [--price=0] [--rounds=3] [--json=FILE]

Both sides hold the same parameters and read the same held-out text, in turns. `allowed` is what FLOPs allow at the
measured share of full attention: those of full attention on every token over those of the routes, the model's products
and its controllers included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from experiments.benchmarks.common import Row, interleave, median_and_spread, tell
from meta_attention_jax.cost import count_flops
from meta_attention_jax.data.corpora import load_corpus
from meta_attention_jax.fields import expect
from meta_attention_jax.generation import decode_loop, prefill
from meta_attention_jax.routing.accounting import count_layers
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build


def passage(run: Run, length: int) -> np.ndarray:
    """Tokens of one held-out document after the other, [1, length]."""
    held = load_corpus(run.config.data.corpus, run.config.data.split).splits["test"]
    longest = sorted(held, key=lambda document: -len(document.data))
    parts, total = [], 0
    for document in longest:
        parts.append(run.tokenizer.encode(document.data))
        total += len(parts[-1])
        if total >= length:
            break
    return np.concatenate(parts)[None, :length]


def check_length(run: Run, length: int, steps: int) -> None:
    """Refuses more tokens than the model was made for."""
    most = run.model.config.context
    fits = most is None or length + steps <= most
    expect(fits, "length", f"with the steps at most the context of {most}", length + steps)


def rows(run: Run, *, length: int, steps: int, price: float, rounds: int) -> list[Row]:
    """Prefill and decoding, hard and packed, over full attention alone."""
    hypers = run.hypers.routing.replace(price=jnp.float32(price))
    tokens, capacity = passage(run, length), -(-(length + steps) // 64) * 64
    lengths = np.array([tokens.shape[1]], np.int32)
    models = {
        "routed": run.model.clone(mode="hard", dispatch="packed"),
        "full": run.model.routed_by(controller="fixed", fixed=("full",)),
    }
    filled: dict[str, Any] = {}

    def reading(name: str):
        def read():
            filled[name] = prefill(models[name], run.params, tokens, lengths, hypers, capacity=capacity)
            return filled[name][1]

        return read

    def writing(name: str):
        def write():
            # The loop consumes what it is given; lengths begin anew with every copy.
            cache, logits, _ = jax.tree.map(jnp.copy, filled[name])
            return decode_loop(
                models[name], run.params, cache, logits, jax.random.split(jax.random.key(0), 1), hypers, steps=steps
            )[2]["tokens"]

        return write

    found = []
    full = run.mechanisms.index("full")
    for what, make in (("prefill", reading), ("decode", writing)):
        seconds = interleave({name: make(name) for name in models}, rounds)
        ratio, spread = median_and_spread(seconds["full"] / seconds["routed"])
        row = {
            "what": what, "tokens": length if what == "prefill" else steps, "price": price, "times": ratio,
            "spread": spread, "rounds": rounds, "routed_seconds": float(np.median(seconds["routed"])),
            "full_seconds": float(np.median(seconds["full"])),
        }
        if what == "prefill":
            route = np.asarray(filled["routed"][2]["route"])
            row |= spent(run, route, length)
            row["share"] = float((route[:, :, :length] == full).mean())
        found.append(row)
    return found


def spent(run: Run, route: np.ndarray, length: int) -> dict[str, float]:
    """`allowed`, and the bytes that attention moves for these routes over those of full attention."""
    config = run.model.config
    route = jnp.asarray(route[:, :, :length])
    counted = jax.device_get(jax.jit(lambda route: count_layers(route, config))(route))
    flops = count_flops(config, time=length, controller_outputs=build.controller_outputs(run.config))
    trunk = flops.trunk - flops.windows  # Which are counted with the routes.
    full = trunk - flops.controller + float(counted.flops.full_only) / length
    routed = trunk + float(counted.flops.projected) / length
    return {
        "allowed": full / routed,
        "bytes": float(counted.bytes.executed_packed) / float(counted.bytes.full_only),
    }


def main() -> None:
    with common.user_mistakes():
        run = load_run(WORKDIR.value)
        expect(run.config.retrofit.backbone, "workdir", "a run that has routed a published model", WORKDIR.value)
        check_length(run, LENGTH.value, STEPS.value)
        prices = common.finite("price", PRICE.value)
    parts: Sequence[Sequence[Row]] = [
        rows(run, length=LENGTH.value, steps=STEPS.value, price=price, rounds=ROUNDS.value)
        for price in prices
    ]
    tell(parts, JSON.value)


if __name__ == "__main__":
    WORKDIR = common.define_path("workdir", None, "A run, or an export of one.")
    LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of the prompt.", 1)
    STEPS = flags.DEFINE_integer("steps", 64, "Tokens that are decoded.", 1)
    PRICE = flags.DEFINE_list("price", ["0"], "Lambdas.")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each side.", 1)
    JSON = common.define_path("json", None, "Write the rows to this file as well.")
    flags.mark_flag_as_required("workdir")
    common.run(main, prints=True)
