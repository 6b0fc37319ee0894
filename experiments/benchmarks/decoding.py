"""A hard-routed model and the same with full attention only, both decoding from a filled cache.

Shared by `experiments.benchmarks.decode` and `experiments.benchmarks.gpu`; no flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meta_attention_jax import AttentionSpec, LanguageModel, ModelConfig, Router, RoutingHypers
from meta_attention_jax.generation import decode_loop
from meta_attention_jax.mechanisms.blocks import MASKED
from meta_attention_jax.mechanisms.registry import REGISTRY

BASELINES = {"full by rows": "full", "full by one product": "full_dense"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model, its cache and one timed call of `steps` tokens to each of `batch` rows."""

    context: int
    batch: int
    steps: int
    fraction_full: float = 0.1
    model_dim: int = 256
    layers: int = 4
    heads: int = 4
    window: int = 256
    vocab: int = 256


def decode_dense(q, cache, layer, *, needed, spec):
    """Full attention of all rows at once over the whole capacity; float32, as many kv heads."""
    del needed, spec
    logits = jnp.einsum("bhd,bhkd->bhk", q, cache.k[layer]) * q.shape[-1] ** -0.5
    visible = jnp.arange(cache.capacity)[None] < cache.length[layer][:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED), axis=-1)
    return jnp.einsum("bhk,bhkd->bhd", weights, cache.v[layer])


def make(sizes: Sizes, **router: Any) -> LanguageModel:
    config = ModelConfig(
        vocab_size=sizes.vocab, model_dim=sizes.model_dim, num_layers=sizes.layers,
        num_heads=sizes.heads, mlp_dim=4 * sizes.model_dim,
        attention=AttentionSpec(window=sizes.window), router=Router(**router),
    )
    return LanguageModel(config, mode="hard")


def draw_routes(sizes: Sizes) -> np.ndarray:
    """[steps, layer, batch]: the share full, the rest half linear and half local, in any order."""
    size = sizes.steps * sizes.layers * sizes.batch
    full = round(sizes.fraction_full * size)
    linear = (size - full) // 2
    drawn = np.repeat(np.arange(3, dtype=np.int32), [full, linear, size - full - linear])
    shape = (sizes.steps, sizes.layers, sizes.batch)
    return np.random.default_rng(0).permutation(drawn).reshape(shape)


def sides(sizes: Sizes) -> tuple[dict[str, Callable[[], Any]], Any]:
    """("hard" and BASELINES -> a call that decodes `steps` tokens, the parameters they share).

    All sides use one cache of `context` tokens with random content; each call has its buffers back.
    """
    REGISTRY.setdefault("full_dense", dataclasses.replace(REGISTRY["full"], step=decode_dense))
    model = make(sizes)
    hypers = RoutingHypers(
        strength=jnp.float32(2.0), preference=jnp.float32(0.1),
        costs=jnp.array([1.0, 0.15, 0.3]), threshold=jnp.float32(0.0),
    )
    initialise = jax.jit(lambda key, tokens: model.init(key, tokens, hypers=hypers)["params"])
    params = initialise(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

    fill = jax.jit(lambda key, like: jax.random.normal(key, like.shape, like.dtype))
    cache = jax.jit(model.init_cache, static_argnums=(0, 1))(sizes.batch, sizes.context)
    keys, values = fill(jax.random.key(1), cache.k), fill(jax.random.key(2), cache.v)
    held = {"cache": cache.replace(k=keys, v=values), "logits": jnp.zeros((sizes.batch, sizes.vocab))}
    del cache, keys, values  # the loop consumes them
    keys = jax.random.split(jax.random.key(3), sizes.batch)
    start = np.full((sizes.layers, sizes.batch), sizes.context - sizes.steps, np.int32)

    def call(model, route):
        def run():
            cache = held["cache"].replace(length=jnp.asarray(start))
            held["cache"], held["logits"], seen = decode_loop(
                model, params, cache, held["logits"], keys, hypers, steps=sizes.steps, route=route
            )
            return held["cache"].length, seen["tokens"]

        return run

    calls = {"hard": call(model, draw_routes(sizes))}
    for side, name in BASELINES.items():
        calls[side] = call(make(sizes, controller="fixed", mechanisms=(name,), fixed=(name,)), None)
    return calls, params
