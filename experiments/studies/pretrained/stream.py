"""A published model read layer by layer, its attention replaced by what a study asks for.

The package's model runs mechanisms; a study also wants what no mechanism is: both outputs of a layer at once, masks by
head, routes that depend on the outputs. Weights, norms, rotations and projections are the package's; only who attends
to whom is written here, as squares. One window at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meta_attention_jax.mechanisms.blocks import MASKED, capped, rotate
from meta_attention_jax.mechanisms.projections import Norm, Projections
from meta_attention_jax.model import ModelConfig
from meta_attention_jax.types import Rope

Square = Bool[Array, "#head time time"]
Stream = Float[Array, "time model"]


class Layer(NamedTuple):
    """One layer at work on one window."""

    x: Stream  # Before it, not normalised.
    h: Stream  # Normalised: what attention and controller see.
    q: Float[Array, "time head dim"]  # Turned by their positions.
    k: Float[Array, "time kv_head dim"]
    logits: Float[Array, "head time time"]  # Of every pair, without a mask.
    past: Square  # s <= t.
    near: Square  # What the window and its sinks leave of it.
    merge: Callable[[Float[Array, "head time time"]], Stream]  # Weights of values -> what is added to x.

    def attend(self, allowed: Square) -> Stream:
        """What softmax attention over the allowed keys adds to the stream."""
        return self.merge(jax.nn.softmax(jnp.where(allowed, self.logits, MASKED), axis=-1))

    def routed(self, full: Bool[Array, "#head time"]) -> Stream:
        """The same: some tokens, of all or of some heads, attend to all their past, the others to window and sinks."""
        return self.attend(self.past & (self.near | full[..., None]))


def change(layer: Layer, full: Stream, other: Stream) -> Float[Array, "time"]:
    """d = ||o_full - o_other||^2 / ||x||^2 of every token."""
    return jnp.sum(jnp.square(full - other), axis=-1) / jnp.sum(jnp.square(layer.x), axis=-1)


Attend = Callable[[Layer, Any], tuple[Stream, Any]]
"""(the layer, what is its own of `extras`) -> (what is added to x, what is to be remembered of it)."""


def read(
    config: ModelConfig, params: Any, tokens: Int[Array, "time"], attend: Attend, extras: Any = None
) -> tuple[Stream, Any]:
    """(the stream behind the last norm, what `attend` has said of the routed layers [layer ...]). `extras` [layer ...]:
    what differs by routed layer. Layers that are windows by nature stay what they are."""
    x = _embedded(config, params, tokens)
    routed = functools.partial(_layer, config, attend=attend)
    if config.scan_layers:
        step = lambda x, given: routed(given[0], x, extra=given[1])  # noqa: E731
        x, said = jax.lax.scan(step, x, (params["layers"], extras))
        return _last(config, params, x), said
    said = []
    for i in range(config.num_layers):
        own = params[f"layer_{i}"]
        if i in config.routed:
            x, one = routed(own, x, extra=jax.tree.map(lambda leaf: leaf[len(said)], extras))  # noqa: B023
            said.append(one)
        else:
            x, _ = _layer(config, own, x, attend=_by_nature, extra=None, window=config.windows[i])
    return _last(config, params, x), jax.tree.map(lambda *leaves: jnp.stack(leaves), *said)


def logits(config: ModelConfig, params: Any, x: Float[Array, "token model"]) -> Float[Array, "token vocab"]:
    """What the model predicts from its stream behind the last norm."""
    table = params["embedding"]["embedding"].T if config.tied else params["head"]["kernel"]
    return capped(x @ table, config.logit_softcap)


def _by_nature(layer: Layer, extra: None) -> tuple[Stream, None]:
    return layer.attend(layer.near), None


def _embedded(config: ModelConfig, params: Any, tokens: Int[Array, "time"]) -> Stream:
    scale = config.model_dim**0.5 if config.embedding_scale is None else config.embedding_scale
    return params["embedding"]["embedding"][tokens] * jnp.float32(scale)


def _last(config: ModelConfig, params: Any, x: Stream) -> Stream:
    return Norm(epsilon=config.norm_epsilon).apply({"params": params["final_norm"]}, x)


def _layer(
    config: ModelConfig, own: Any, x: Stream, *, attend: Attend, extra: Any, window: Optional[int] = None
) -> tuple[Stream, Any]:
    norm = lambda name, x: Norm(epsilon=config.norm_epsilon).apply({"params": own[name]}, x)  # noqa: E731
    h = norm("attention_norm", x)
    post = (lambda y: norm("attention_post_norm", y)) if config.post_norms else lambda y: y
    rope = config.rope if window is None else config.window_rope or config.rope
    attended, said = attend(at_work(config, own["attention"]["projections"], x, h, post, window, rope), extra)
    x = x + attended
    h = norm("mlp_norm", x)
    dense = lambda name, x: nn.Dense(own[name]["kernel"].shape[1], use_bias="bias" in own[name]).apply(  # noqa: E731
        {"params": own[name]}, x
    )
    act = {"silu": nn.silu, "gelu": nn.gelu}[config.activation]
    h = dense("down", act(dense("gate", h)) * dense("up", h))
    return x + (norm("mlp_post_norm", h) if config.post_norms else h), said


def at_work(
    config: ModelConfig, params: Any, x: Stream, h: Stream, post: Callable[[Stream], Stream],
    window: Optional[int], rope: Rope,
) -> Layer:
    time, heads, kv_heads = len(x), config.num_heads, config.kv_heads
    projections = Projections(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=config.head_dim, features=config.model_dim,
        use_bias="qkv" in config.biases, out_bias="out" in config.biases,
        norm_epsilon=config.norm_epsilon if config.qk_norm else None,
    ).bind({"params": params})
    q, k, v = projections.project(h[None])
    places = jnp.arange(time)
    q, k, v = rotate(q, places[None], rope)[0], rotate(k, places[None], rope)[0], v[0]
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    grouped = q.reshape(time, kv_heads, heads // kv_heads, config.head_dim)
    pairs = jnp.einsum("qgrd,kgd->grqk", grouped, k).reshape(heads, time, time) * jnp.float32(scale)
    distance = (places[:, None] - places[None])[None]
    width, sinks = (config.attention.width, config.attention.sinks) if window is None else (window, 0)
    past = distance >= 0

    def merge(weights: Float[Array, "head time time"]) -> Stream:
        by_group = weights.reshape(kv_heads, heads // kv_heads, time, time)
        mixed = jnp.einsum("grqk,kgd->qgrd", by_group, v).reshape(1, time, heads, config.head_dim)
        return post(projections.merge(mixed)[0])

    return Layer(
        x=x, h=h, q=q, k=k, logits=capped(pairs, config.attention.softcap), past=past,
        near=past & ((distance < width) | (places[None, None] < sinks)), merge=merge,
    )
