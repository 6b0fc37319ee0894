"""Goes on from a prompt with a trained run, and shows which attention served each token.

python -m experiments.generate --workdir=runs/x --prompt="Fellow citizens" [--mode=hard] [--steps=200]
    [--temperature=0.8 --top_k=40 --top_p=0.95 --seed=0] [--show_routes] [--layer=0] [--step=best]
    [--threshold=0.5] [--nostop] [--chat]

Greedy unless one of the sampler's flags is given. A `recall` run takes names: --prompt="k3=v1 c2 ?k3".
With --chat the prompt is a user's message, told to the model as its chat template says.
"""

from __future__ import annotations

from absl import flags

from experiments import common
from experiments.studies import samples
from meta_attention_jax.fields import expect
from meta_attention_jax.generation import sampler_of
from meta_attention_jax.routing.decide import MODES
from meta_attention_jax.runs import load_run

WORKDIR = common.define_path("workdir", None, "The run directory.", buckets=True)
PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.")
MODE = flags.DEFINE_enum("mode", "hard", list(MODES), "How tokens are routed.")
THRESHOLD = flags.DEFINE_float("threshold", None, "theta of gated mode; the run's own when absent.", 0.0, 1.0)
PRICE = flags.DEFINE_float("price", None, "lambda of the decision; the run's own when absent.")
STEPS = flags.DEFINE_integer("steps", 200, "Tokens to generate.", 1, 10**6)
STEP = flags.DEFINE_string("step", "latest", "latest, best, or a saved step.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "> 0.")
TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens; at least 1.")
TOP_P = flags.DEFINE_float("top_p", None, "Keep the likeliest tokens of this mass; in (0, 1].")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", 0, 2**32 - 1)
STOP = flags.DEFINE_bool("stop", True, "Stop at a token that ends a text, where the tokenizer has one.")
CHAT = flags.DEFINE_bool("chat", False, "The prompt is a user's message, by the model's chat template.")
DATA = common.define_data()
SHOW_ROUTES = flags.DEFINE_bool("show_routes", False, "Show the mechanism of each token.")
LAYER = flags.DEFINE_integer("layer", None, "Layer to show; the one with most full when absent.", 0)
COLOR = flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "ANSI colours.")
flags.mark_flags_as_required(["workdir", "prompt"])


def main() -> None:
    with common.user_mistakes():
        draw = dict(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
        sampler_of(**draw)  # Its mistakes before any work.
        theta = THRESHOLD.value  # absl lets NaN through.
        expect(theta is None or 0 <= theta <= 1, "threshold", "theta in [0, 1]", theta)
        run = load_run(WORKDIR.value, step=STEP.value, **DATA()).at(price=PRICE.value)
        layer, layers, routed = LAYER.value, run.config.model.num_layers, run.model.config.routed
        expect(layer is None or layer < layers, "layer", f"less than {layers}", layer)
        expect(layer is None or layer in routed, "layer", f"one that has a router, {routed}", layer)
        layer = None if layer is None else routed.index(layer)
        prompt = run.encode(PROMPT.value)
        if CHAT.value:
            speaks = getattr(run.tokenizer, "template", None) is not None
            expect(speaks, "chat", "a tokenizer with a chat template", run.tokenizer.kind)
            prompt = run.tokenizer.chat([{"role": "user", "content": PROMPT.value}])
    made = run.generate(
        prompt, steps=STEPS.value, mode=MODE.value, seed=SEED.value, threshold=THRESHOLD.value, stop=STOP.value, **draw
    )
    print(samples.printable(made.text))
    if SHOW_ROUTES.value:
        colour = COLOR.value == "always" or (COLOR.value == "auto" and samples.wants_colour())
        print()
        print(samples.show_routes(run, made.ids, made.trace, layer=layer, colour=colour))


if __name__ == "__main__":
    common.run(main, prints=True)
