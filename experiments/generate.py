"""Goes on from a prompt with a trained run, and shows which attention served each token.

python -m experiments.generate --workdir=runs/x --prompt="Fellow citizens" [--mode=hard] [--steps=200]
    [--temperature=0.8 --top_k=40 --top_p=0.95 --seed=0] [--show_routes] [--layer=0] [--step=best]
    [--threshold=0.5]

Greedy unless one of the sampler's flags is given. A `recall` run takes names: --prompt="k3=v1 c2 ?k3".
"""

from __future__ import annotations

import os

import numpy as np
from absl import flags

from experiments import common, samples
from meta_attention_jax.generation import Draw, Sampler, greedy, pad_prompts
from meta_attention_jax.routing.mixture import MODES
from meta_attention_jax.training.run import open_run

WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.")
MODE = flags.DEFINE_enum("mode", "hard", list(MODES), "How tokens are routed.")
THRESHOLD = flags.DEFINE_float("threshold", 0.5, "theta of gated mode.", 0.0, 1.0)
STEPS = flags.DEFINE_integer("steps", 200, "Tokens to generate.", 1)
STEP = flags.DEFINE_string("step", "latest", "latest, best, or a saved step.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "> 0.")
TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens; at least 1.")
TOP_P = flags.DEFINE_float("top_p", None, "Keep the likeliest tokens of this mass; in (0, 1].")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", 0)
SHOW_ROUTES = flags.DEFINE_bool("show_routes", False, "Show the mechanism of each token.")
LAYER = flags.DEFINE_integer("layer", None, "Layer to show; the one with most full when absent.", 0)
COLOR = flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "ANSI colours.")
flags.mark_flags_as_required(["workdir", "prompt"])


def sampler() -> Draw:
    """Greedy, or a sampler of the flags that are given."""
    if TEMPERATURE.value is None and TOP_K.value is None and TOP_P.value is None:
        return greedy
    temperature = 1.0 if TEMPERATURE.value is None else TEMPERATURE.value
    return Sampler(temperature=temperature, top_k=TOP_K.value, top_p=TOP_P.value)


def main() -> None:
    with common.user_mistakes():
        draw = sampler()
        run = open_run(WORKDIR.value, step=STEP.value)
        if LAYER.value is not None and LAYER.value >= run.config.model.num_layers:
            raise ValueError(
                f"layer: expected less than {run.config.model.num_layers}, got {LAYER.value}."
            )
        prompt = np.asarray(run.dataset.tokenizer.encode(os.fsencode(PROMPT.value)))
        pad_prompts([prompt], run.dataset.vocab_size)
    ids, trace = samples.go_on(
        run, prompt, steps=STEPS.value, mode=MODE.value, draw=draw, seed=SEED.value,
        threshold=THRESHOLD.value,
    )
    print(samples.printable(run.dataset.tokenizer.decode(ids).decode(errors="replace")))
    if SHOW_ROUTES.value:
        colour = COLOR.value == "always" or (COLOR.value == "auto" and samples.wants_colour())
        print()
        print(samples.show_routes(run, ids, trace, layer=LAYER.value, colour=colour))


if __name__ == "__main__":
    common.run(main)
