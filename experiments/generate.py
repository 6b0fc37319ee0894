"""Goes on from a prompt with a trained run, and shows which mechanism served every token.

python -m experiments.generate --workdir=runs/x --prompt="..." [--mode=hard] [--steps=200]
    [--temperature=0.8] [--top_k=20] [--top_p=0.95] [--seed=0] [--step=latest] [--threshold=0.5]
    [--show_routes] [--layer=1] [--color=auto]

Greedy unless a sampling flag is given. The prompt of a `recall` run is names separated by blanks.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from meta_attention_jax import analysis
from meta_attention_jax.analysis.text import visible_pieces
from meta_attention_jax.generation import Sampler, generate, greedy, pad_prompts
from meta_attention_jax.routing.mixture import MODES
from meta_attention_jax.training.run import open_run

WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.")
MODE = flags.DEFINE_enum("mode", "hard", list(MODES), "How tokens are routed.")
STEPS = flags.DEFINE_integer("steps", 200, "Tokens to generate.", 1)
STEP = flags.DEFINE_string("step", "latest", "latest, best, or a saved step.")
THRESHOLD = flags.DEFINE_float("threshold", 0.5, "theta of gated mode.", 0.0, 1.0)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Of sampling, > 0; 1 when absent.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k most likely tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the most likely tokens of this mass.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", 0)
SHOW_ROUTES = flags.DEFINE_bool("show_routes", False, "Show the mechanism of every token.")
LAYER = flags.DEFINE_integer("layer", None, "Whose routes; when absent, that with most full.", 0)
COLOR = flags.DEFINE_enum(
    "color", "auto", ["auto", "always", "never"], "Colours; auto: when stdout is a terminal."
)
flags.mark_flags_as_required(["workdir", "prompt"])

LINE = 80  # columns of text above its letters


def sampler():
    """Greedy, or what the flags ask for.

    Raises:
      ValueError: a flag out of range.
    """
    if TEMPERATURE.value is None and TOP_K.value is None and TOP_P.value is None:
        return greedy
    temperature = 1.0 if TEMPERATURE.value is None else TEMPERATURE.value
    return Sampler(temperature=temperature, top_k=TOP_K.value, top_p=TOP_P.value)


def route_letters(mechanisms) -> list[str]:
    """One letter per mechanism: F for full, L for linear, l for local, digits for others."""
    known = {"full": "F", "linear": "L", "local": "l"}
    return [known.get(name, str(k)) for k, name in enumerate(mechanisms)]


def lettered(pieces, route, mechanisms) -> str:
    """The text in lines with a line of letters under each; a token's letter spans its width."""
    letters = route_letters(mechanisms)
    lines, top, below = [], "", ""
    for piece, k in zip(visible_pieces(pieces), route):
        piece, ends = piece.rstrip("\n"), piece.endswith("\n")
        top, below = top + piece, below + letters[k] * len(piece)
        if ends or len(top) >= LINE:
            lines, top, below = lines + [top, below], "", ""
    legend = ", ".join(f"{letter} {name}" for letter, name in zip(letters, mechanisms))
    return "\n".join([legend, *lines, *([top, below] if top else [])])


def main() -> None:
    with common.user_mistakes():
        draw = sampler()
        run = open_run(WORKDIR.value, step=STEP.value)
        tokenizer = run.dataset.tokenizer
        prompt = tokenizer.encode(PROMPT.value.encode())
        pad_prompts([prompt], run.model.vocab_size)
        layers = run.model.num_layers
        if LAYER.value is not None and LAYER.value >= layers:
            raise ValueError(f"layer: expected below {layers}, got {LAYER.value}.")
    hypers = run.hypers.routing.replace(threshold=jnp.float32(THRESHOLD.value))
    trace = generate(
        run.model,
        run.params,
        [prompt],
        steps=STEPS.value,
        hypers=hypers,
        keys=jax.random.split(jax.random.key(SEED.value), 1),
        sampler=draw,
        mode=MODE.value,
    )
    tokens = [*prompt, *np.asarray(trace.tokens[0])]
    if not SHOW_ROUTES.value:
        print(tokenizer.decode(tokens).decode("utf-8", "replace"))
        return
    mechanisms = tuple(run.model.mechanisms)
    route = np.concatenate([trace.prompt_route[:, 0], trace.route[:, 0]], axis=1)
    shares = np.stack([(route == k).mean(axis=1) for k in range(len(mechanisms))], axis=1)
    layer = LAYER.value
    if layer is None:
        layer = int(np.argmax(shares[:, mechanisms.index("full") if "full" in mechanisms else 0]))
    pieces = [tokenizer.decode([token]) for token in tokens]
    color = COLOR.value == "always" or (COLOR.value == "auto" and sys.stdout.isatty())
    print(f"{run.path.name} at step {run.step}, {MODE.value}, routes of layer {layer}")
    draw_text = analysis.coloured_terminal if color else lettered
    print(draw_text(pieces, route[layer], mechanisms))
    for i, row in enumerate(shares):
        fractions = ", ".join(f"{name} {share:.1%}" for name, share in zip(mechanisms, row))
        print(f"layer {i}: {fractions}")


if __name__ == "__main__":
    common.run(main)
