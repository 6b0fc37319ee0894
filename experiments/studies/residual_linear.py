"""A linear mechanism on a published model: does what is left of a window's softmax earn its place by learned features?

python -m experiments.studies.residual_linear --out=runs/residual_linear
    [--controllers=experiments/results/controllers/smollm2] [--steps=150] [--windows=51]

Every layer attends to its window and sinks by softmax and, by one normaliser, to all older keys by features:

    o_t = (sum_near e^{q.k_s} v_s + e^{b_h} sum_far phi(q) . phi(k_s) v_s) / (the same without v)
    phi(x) = (f(W_h x), f(-W_h x)),    f = softmax ("softmax") or exp ("exp")

W [head, dim, feature] and b are learned, all else is frozen, by the distance of each layer's output from that of full
attention in full attention's own stream (LoLCATs, arXiv 2410.10254, is the nearest published recipe). Computed as
squares: what is measured is nats, not time. Without its linear part it is the window.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, Int

from experiments import common
from experiments.benchmarks.common import environment
from experiments.studies import routed
from experiments.studies.pretrained.stream import Layer, Stream, change, read
from experiments.studies.pretrained.stream import logits as predicted
from meta_attention_jax import analysis
from meta_attention_jax.console import say
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole
from meta_attention_jax.model import ModelConfig
from meta_attention_jax.objective import token_nll
from meta_attention_jax.runs import load_run
from meta_attention_jax.types import Batch

FORMS = ("softmax", "exp")
Maps = dict[str, Array]
""""query" [layer H d d], "key" [layer G d d], "bias" [layer H]."""


FIRST = {"softmax": (1.0, -2.0), "exp": (0.03, -10.0)}
"""Of each form: the scale of W = 1 at the start, and b there, small enough that the window still decides."""
RATE = 1e-2  # Of Adam, falling to 0.
PER_UNIT = 10.0
"""b is that many times what is learned, since it has further to go than W."""


def first_maps(config: ModelConfig, form: str) -> Maps:
    """Features of the coordinates themselves."""
    layers, dim = config.num_layers, config.head_dim
    scale, bias = FIRST[form]
    eye = scale * jnp.eye(dim, dtype=jnp.float32)
    return {
        "query": jnp.tile(eye, (layers, config.num_heads, 1, 1)),
        "key": jnp.tile(eye, (layers, config.kv_heads, 1, 1)),
        "bias": jnp.full((layers, config.num_heads), bias / PER_UNIT),
    }


def features(x: Float[Array, "time head dim"], weights: Array, form: str) -> Float[Array, "time head feature"]:
    """phi."""
    z = jnp.einsum("thd,hdf->thf", x, weights)
    z = jnp.concatenate([z, -z], axis=-1)
    if form == "exp":
        return jnp.exp(jnp.clip(z, -10.0, 10.0))
    return jnp.concatenate([jax.nn.softmax(part, axis=-1) for part in jnp.split(z, 2, axis=-1)], axis=-1)


def attention(layer: Layer, maps: Maps | None, form: str) -> tuple[Stream, Stream]:
    """What full attention adds to the stream, and what the window with what `form` adds to it does."""
    full = layer.attend(layer.past)
    if form == "window":
        return full, layer.attend(layer.near)
    phi_q, phi_k = features(layer.q, maps["query"], form), features(layer.k, maps["key"], form)
    phi_k = jnp.repeat(phi_k, layer.q.shape[1] // layer.k.shape[1], axis=1)
    far = jnp.where(layer.past & ~layer.near, jnp.einsum("qhf,khf->hqk", phi_q, phi_k), 0.0)
    logits = jnp.where(layer.near, layer.logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest) + far * jnp.exp(PER_UNIT * maps["bias"][:, None, None] - largest)
    return full, layer.merge(weights / weights.sum(axis=-1, keepdims=True))


def forward(
    config: ModelConfig, params: Any, maps: Maps | None, tokens: Int[Array, "time"], form: str, *, stream: str
) -> tuple[Float[Array, "time vocab"], Float[Array, "layer time"], Maps | None]:
    """(logits, each layer's ||full - form||^2 / ||x||^2, its gradient by that layer's maps). `stream`: "full" goes on
    with full attention, "form" with what is tried."""

    def attend(layer: Layer, my_maps: Maps | None):
        def lost(my_maps):
            full, tried = attention(layer, my_maps, form)
            harm = change(layer, full, tried)
            return harm.mean(), (full, tried, harm)

        if stream == "full" and form in FORMS:
            (_, (full, tried, harm)), slope = jax.value_and_grad(lost, has_aux=True)(my_maps)
        else:
            (_, (full, tried, harm)), slope = lost(my_maps), None
        return full if stream == "full" else tried, (harm, slope)

    x, (harm, slope) = read(config, params, tokens, attend, maps)
    return predicted(config, params, x), harm, slope


def fit(run: Any, form: str, steps: int) -> tuple[Maps, list[float]]:
    """The maps, and the mean distance at each step."""
    config = run.model.config
    maps = first_maps(config, form)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    @jax.jit
    def step(maps, state, params, tokens):
        _, harm, slope = forward(config, params, maps, tokens, form, stream="full")
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(maps, updates), state, harm.mean()

    state, seen = optimizer.init(maps), []
    for i in range(steps):
        maps, state, harm = step(maps, state, run.params, run.dataset.train_batch(i).tokens[0])
        seen.append(float(harm))
        if i % 10 == 9:
            say(f"{form}, step {i + 1}/{steps}: {np.mean(seen[-10:]):.5f} from full attention's output")
    return maps, seen


def measured(run: Any, batch: Batch, maps: Maps | None, form: str) -> dict[str, Any]:
    """`routed.measured` of a form that all tokens of all layers use."""
    nll, guess, harm = (np.asarray(x) for x in jax.device_get(_read(run.model.config, run.params, maps, batch, form)))
    return {**routed.of_task(run, batch, nll, guess), "share": 0.0, "distance": float(harm.mean())}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _read(config: ModelConfig, params: Any, maps: Maps | None, batch: Batch, form: str) -> tuple[Array, Array, Array]:
    own = "window" if form == "full" else form
    stream = "full" if form == "full" else "form"
    logits, harm, _ = forward(config, params, maps, batch.tokens[0], own, stream=stream)
    return token_nll(logits[None], batch.targets), jnp.argmax(logits[None], axis=-1), harm


COLUMNS = [column for column in routed.COLUMNS if column.key != "share"]


def page(run: Any, rows: Sequence[dict[str, Any]], fitted: dict[str, Any]) -> str:
    """The table as Markdown."""
    said = (
        f"{run.config.retrofit.backbone}, test split, T {run.dataset.sequence_length}, window "
        f"{run.config.model.window}, {run.config.model.sinks} sinks, no router: every token of every layer is served "
        "alike. `window` is the linear part switched off. Distance of a layer's output from full attention's, in full "
        "attention's stream, before and after the features were fitted: "
        + ", ".join(f"{form} {one['first']:.4f} to {one['last']:.4f}" for form, one in fitted.items())
        + f" ({next(iter(fitted.values()))['steps']} windows)."
    )
    return f"# Window and residual linear\n\n{said}\n\n{analysis.markdown_table(routed.lines(rows), COLUMNS)}\n"


def main() -> None:
    out = pathlib.Path(OUT.value)
    with common.user_mistakes():
        run = load_run(CONTROLLERS.value, **DATA())
        config = run.model.config
        expect(run.config.retrofit.backbone, "controllers", "a run that has routed a published model", run.path)
        plain = config.scan_layers and not (config.qk_norm or config.post_norms or config.biases or config.windows)
        expect(plain and config.tied, "controllers", "a Llama with tied embeddings and stacked layers", run.path)
        common.check_output("out", out / "rows.json")
        expect(not (out / "rows.json").exists(), "out", "a folder without rows.json", str(out))
    fitted, maps = {}, {}
    for form in FORMS:
        maps[form], seen = fit(run, form, STEPS.value)
        first, last = (float(np.mean(part)) for part in (seen[:10], seen[-10:]))
        fitted[form] = {"steps": STEPS.value, "rate": RATE, "first": first, "last": last}
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(routed.windows(run, "test", WINDOWS.value)):
        own = np.asarray(batch.loss_mask) & (np.asarray(batch.positions) >= run.config.model.window)
        if number >= WINDOWS.value or not own.any():
            continue
        for arm in ("full", "window", *FORMS):
            rows.append({"window": number, "arm": arm, "split": "test", **measured(run, batch, maps.get(arm), arm)})
        if number % 5 == 4:
            say(f"window {number + 1}/{WINDOWS.value}: " + ", ".join(f"{r['arm']} {r['nll']:.3f}" for r in rows[-4:]))
    content = {"environment": environment(), "fitted": fitted, "rows": rows}
    write_whole(out / "rows.json", json.dumps(content) + "\n")
    print(analysis.terminal_table(routed.lines(rows), COLUMNS))
    analysis.write_text(out / "README.md", page(run, rows, fitted))


if __name__ == "__main__":
    CONTROLLERS = common.define_path(
        "controllers", "experiments/results/controllers/smollm2", "A run that has routed the model, or an export."
    )
    OUT = common.define_path("out", "runs/residual_linear", "Where rows and table go.")
    STEPS = flags.DEFINE_integer("steps", 150, "Of each form's fit, a window each.", 1)
    WINDOWS = flags.DEFINE_integer("windows", 51, "Of all tasks together.", 1)
    DATA = common.define_data()
    common.run(main, prints=True)
