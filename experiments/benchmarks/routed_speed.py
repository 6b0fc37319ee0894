"""A routed published model against full attention alone: prefill of a long text, then decoding, measured.

python -m experiments.benchmarks.routed_speed --workdir=runs/smollm2/end_to_end --length=8064 --steps=128
    [--price=0] [--window=256] [--forms=blockwise,xla] [--unstacked] [--rounds=3] [--json=FILE]

Both sides hold the same parameters and read the same held-out text, in turns; full attention alone in its fastest form.
`allowed` is what FLOPs allow at the measured share of full attention: those of full attention on every token over those
of the routes, the model's products and its controllers included. Of decoding it is what bytes allow: weights and the
whole past over weights and what the routes read of it, at the share of the prompt. With --unstacked layers are decoded
apart (`Run.unstacked`).
"""

from __future__ import annotations

import dataclasses
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
from meta_attention_jax.model import LanguageModel, unstacked
from meta_attention_jax.routing.accounting import count_layers
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build

SERVED = ("auto", "xla", "blockwise")
"""Forms of full attention that a run which may be given any segments has."""


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


def rows(
    run: Run, *, length: int, steps: int, price: float, rounds: int, forms: Sequence[str] = ("auto",),
    apart: bool = False,
) -> list[Row]:
    """Prefill and decoding, hard and packed, over full attention alone in the fastest of `forms`."""
    hypers = run.hypers.routing.replace(price=jnp.float32(price))
    tokens, capacity = passage(run, length), -(-(length + steps) // 64) * 64
    lengths = np.array([tokens.shape[1]], np.int32)
    alone = run.model.routed_by(controller="fixed", fixed=("full",))
    models = {"routed": run.model.clone(mode="hard", dispatch="packed")}
    models |= {f"full {form}": with_attention(alone, implementation=form) for form in forms}
    filled: dict[str, Any] = {}

    def reading(name: str):
        def read():
            filled[name] = prefill(models[name], run.params, tokens, lengths, hypers, capacity=capacity)
            return filled[name][1]

        return read

    def writing(name: str):
        model, params = unstacked(models[name], run.params) if apart else (models[name], run.params)

        def write():
            # The loop consumes what it is given; lengths begin anew with every copy.
            cache, logits, _ = jax.tree.map(jnp.copy, filled[name])
            return decode_loop(
                model, params, cache, logits, jax.random.split(jax.random.key(0), 1), hypers, steps=steps
            )[2]["tokens"]

        return write

    def compared(what: str, seconds: dict[str, np.ndarray]) -> tuple[str, Row]:
        fastest = min((name for name in seconds if name != "routed"), key=lambda name: np.median(seconds[name]))
        ratio, spread = median_and_spread(seconds[fastest] / seconds["routed"])
        return fastest, {
            "what": what, "tokens": length if what == "prefill" else steps, "window": run.model.config.attention.window,
            "price": price, "times": ratio, "spread": spread, "rounds": rounds,
            **{f"{name} s": float(np.median(one)) for name, one in seconds.items()},
        }

    fastest, prefilled = compared("prefill", interleave({name: reading(name) for name in models}, rounds))
    route = np.asarray(filled["routed"][2]["route"])[:, :, :length]
    prefilled |= spent(run, route, length)
    prefilled["share"] = float((route == run.mechanisms.index("full")).mean())
    # A step is alike in all forms.
    _, decoded = compared("decode", interleave({name: writing(name) for name in ("routed", fastest)}, rounds))
    decoded |= {"unstacked": apart, "allowed": allowed_in_decoding(run, length + steps // 2, prefilled["share"])}
    return [prefilled, decoded]


def with_attention(model: LanguageModel, **changes: Any) -> LanguageModel:
    """The same model, with other fields of its attention."""
    attention = dataclasses.replace(model.config.attention, **changes)
    return model.clone(config=dataclasses.replace(model.config, attention=attention))


def allowed_in_decoding(run: Run, past: int, share: float) -> float:
    """Bytes of a step in which every layer reads all of `past` tokens, over those of a step in which a share does."""
    config = run.model.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(run.params))
    token = 2 * config.kv_heads * config.head_dim * jnp.dtype(config.dtype or config.param_dtype).itemsize
    near = min(past, config.attention.width + config.attention.sinks)
    layers = len(config.routed)
    return (weights + layers * token * past) / (weights + layers * token * (share * past + (1 - share) * near))


def spent(run: Run, route: np.ndarray, length: int) -> dict[str, float]:
    """`allowed`, and the bytes that attention moves for these routes over those of full attention."""
    config = run.model.config
    counted = jax.device_get(jax.jit(lambda route: count_layers(route, config))(jnp.asarray(route)))
    flops = count_flops(config, time=length, controller_outputs=build.controller_outputs(run.config))
    # Windows by nature are counted with the routes; logits are those of the last token alone.
    trunk = flops.trunk - flops.windows - flops.logits * (1 - 1 / length)
    full = trunk - flops.controller + float(counted.flops.full_only) / length
    routed = trunk + float(counted.flops.executed_packed) / length
    return {
        "allowed": full / routed,
        "bytes": float(counted.bytes.executed_packed) / float(counted.bytes.full_only),
    }


def main() -> None:
    with common.user_mistakes():
        run = load_run(WORKDIR.value, **DATA())
        expect(run.config.retrofit.backbone, "workdir", "a run that has routed a published model", WORKDIR.value)
        check_length(run, LENGTH.value, STEPS.value)
        prices = common.finite("price", PRICE.value)
        expect(FORMS.value, "forms", f"some of {SERVED}", "none")
        for form in FORMS.value:
            expect(form in SERVED, "forms", f"some of {SERVED}", form)
        if WINDOW.value:
            run = dataclasses.replace(run, model=with_attention(run.model, window=WINDOW.value))
    parts: Sequence[Sequence[Row]] = [
        rows(run, length=LENGTH.value, steps=STEPS.value, price=price, rounds=ROUNDS.value, forms=FORMS.value,
             apart=UNSTACKED.value)
        for price in prices
    ]
    tell(parts, JSON.value)


if __name__ == "__main__":
    WORKDIR = common.define_path("workdir", None, "A run, or an export of one.")
    LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of the prompt.", 1)
    STEPS = flags.DEFINE_integer("steps", 64, "Tokens that are decoded.", 1)
    PRICE = flags.DEFINE_list("price", ["0"], "Lambdas.")
    WINDOW = flags.DEFINE_integer("window", None, "Of local attention; None is the run's own.", 2)
    FORMS = flags.DEFINE_list("forms", ["auto"], "Of full attention alone (`AttentionSpec.implementation`).")
    UNSTACKED = flags.DEFINE_boolean("unstacked", False, "Decode with the layers apart.")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each side.", 1)
    JSON = common.define_path("json", None, "Write the rows to this file as well.")
    flags.mark_flag_as_required("workdir")
    DATA = common.define_data()
    common.run(main, prints=True)
