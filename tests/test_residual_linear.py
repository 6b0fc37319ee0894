"""The study of a window with residual linear attention: its own forward pass is the model's, its form the equation's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import residual_linear as study
from experiments.studies.pretrained.stream import at_work
from meta_attention_jax import AttentionSpec, LanguageModel, Router, pretrained
from meta_attention_jax.mechanisms.blocks import rotate
from tests.close import assert_close
from tests.test_pretrained import FOLDER, HYPERS

WINDOW, SINKS, TIME = 4, 2, 14


@pytest.fixture(scope="module")
def model():
    config, params, _ = pretrained.load(FOLDER / "smollm2", scan_layers=True)
    config = dataclasses.replace(config, attention=AttentionSpec(window=WINDOW, sinks=SINKS))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, TIME))
    return config, params, tokens


@pytest.mark.slow
@pytest.mark.parametrize("stream, route", [("full", 0), ("form", 1)])
def test_its_forward_pass_is_that_of_the_model(model, stream, route):
    config, params, tokens = model
    routed = LanguageModel(dataclasses.replace(config, router=Router(mechanisms=("full", "local"), hidden=8)))
    init = jax.jit(lambda tokens: routed.init(jax.random.key(0), tokens, hypers=HYPERS))
    whole = init(tokens)["params"]
    controllers = whole["layers"]["attention"]["controller"]
    whole = {**params, "layers": {**params["layers"], "attention": {
        **params["layers"]["attention"], "controller": controllers,
    }}}
    expected = routed.apply({"params": whole}, tokens, hypers=HYPERS, route=np.full((1, TIME), route)).logits[0]
    logits, harm, _ = study.forward(config, params, None, tokens[0], "window", stream=stream)
    assert_close(logits, expected, 1e-5)
    # Up to the window and the sinks, a window is full attention.
    assert np.all(np.abs(harm[0, :WINDOW]) < 1e-10) and np.all(np.asarray(harm)[:, WINDOW + SINKS :] > 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("form", study.FORMS)
def test_its_form_is_the_equation(model, form):
    config, params, _ = model
    rng = np.random.default_rng(1)
    mine = jax.tree.map(lambda leaf: leaf[0], params["layers"]["attention"]["projections"])
    maps = jax.tree.map(
        lambda leaf: leaf[0] + 0.1 * rng.standard_normal(leaf.shape[1:]), study.first_maps(config, form)
    )
    h = jnp.float32(rng.standard_normal((1, TIME, config.model_dim)))
    layer = at_work(config, mine, h[0], h[0], lambda added: added, None, config.rope)
    _, got = study.attention(layer, maps, form)

    places = jnp.arange(TIME)[None]
    project = lambda name: jnp.einsum("btd,dhe->bthe", h, mine[name]["kernel"])  # noqa: E731
    q, k = (np.float64(rotate(project(name), places, config.rope)[0]) for name in ("query", "key"))
    v = np.float64(project("value")[0])
    group = config.num_heads // config.kv_heads
    heads = np.zeros((TIME, config.num_heads, config.head_dim))
    for head in range(config.num_heads):
        own = head // group
        weights = {"query": np.float64(maps["query"])[head], "key": np.float64(maps["key"])[own]}

        def phi(x, name):
            parts = [sign * x @ weights[name] for sign in (1, -1)]
            return np.concatenate([np.exp(z) / (np.exp(z).sum() if form == "softmax" else 1) for z in parts])

        for t in range(TIME):
            total = 0.0
            for s in range(t + 1):
                if t - s < WINDOW or s < SINKS:
                    weight = np.exp(q[t, head] @ k[s, own] / config.head_dim**0.5)
                else:
                    bias = np.exp(study.PER_UNIT * np.float64(maps["bias"])[head])
                    weight = bias * phi(q[t, head], "query") @ phi(k[s, own], "key")
                heads[t, head] += weight * v[s, own]
                total += weight
            heads[t, head] /= total
    expected = np.einsum("the,hed->td", heads, np.float64(mine["out"]["kernel"]))
    assert_close(got, expected, 1e-5)


@pytest.mark.slow
def test_a_layer_learns_by_its_own_distance_alone(model):
    """The gradient of each layer's maps is that of its own mean distance; and a step along it lowers that."""
    config, params, tokens = model
    maps = study.first_maps(config, "softmax")

    def own(maps, layer):
        return study.forward(config, params, maps, tokens[0], "softmax", stream="full")[1][layer].mean()

    slope = study.forward(config, params, maps, tokens[0], "softmax", stream="full")[2]
    for layer in range(config.num_layers):
        of_layer = jax.grad(own)(maps, layer)
        assert_close(jax.tree.map(lambda leaf: leaf[layer], slope), jax.tree.map(lambda leaf: leaf[layer], of_layer), 1e-4)
    before, after = own(maps, 0), own(jax.tree.map(lambda x, d: x - 1e-2 * d / jnp.linalg.norm(d), maps, slope), 0)
    assert after < before
