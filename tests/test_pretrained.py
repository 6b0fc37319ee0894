"""Published models: what `transformers` says of them (by experiments/checks/parity.py), written back, routed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax import LanguageModel, Router, RoutingHypers, generate, pretrained
from tests.close import assert_close

FOLDER = pathlib.Path(__file__).parent / "data" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
ROUTER = Router(mechanisms=("full", "local"), hidden=8)
HYPERS = RoutingHypers(
    strength=np.float32(2), preference=np.float32(0.1), costs=np.float32([1, 0.15]), threshold=np.float32(0)
)
UNROUTED = HYPERS.replace(costs=np.ones(1, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_text_are_those_of_transformers(name):
    reference = np.load(FOLDER / name / "reference.npz")
    config, params, _ = pretrained.load(FOLDER / name)
    model, tokens = LanguageModel(config), jnp.asarray(reference["tokens"], jnp.int32)
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens, hypers=UNROUTED).logits)
    assert_close(apply(params), reference["logits"], 1e-5)
    text = generate(model, params, [list(row[:20]) for row in reference["tokens"]], steps=50, hypers=UNROUTED)
    np.testing.assert_array_equal(text.tokens, reference["greedy"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_read(name, tmp_path):
    config, params, _ = pretrained.load(FOLDER / name, dtype=jnp.bfloat16)
    pretrained.save(tmp_path / "again", config, params, source=FOLDER / name)
    again, same, _ = pretrained.load(tmp_path / "again", dtype=jnp.bfloat16)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    with pytest.raises(ValueError, match="^path: expected a folder that is not there"):
        pretrained.save(tmp_path / "again", config, params, source=FOLDER / name)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "gemma3"])
def test_a_routed_model_on_full_attention_is_the_published_one(name):
    """Forced, whatever the controllers say; layers that are windows by nature have none."""
    config, params, _ = pretrained.load(FOLDER / name)
    tokens = jnp.asarray(np.load(FOLDER / name / "reference.npz")["tokens"], jnp.int32)
    routed = dataclasses.replace(
        config, router=ROUTER, attention=dataclasses.replace(config.attention, window=4, sinks=1)
    )
    plain, model = LanguageModel(config), LanguageModel(routed, mode="hard", dispatch="packed")
    whole = jax.jit(lambda params: plain.apply({"params": params}, tokens, hypers=UNROUTED))(params)

    @jax.jit
    def run(params, route):
        started = model.init(jax.random.key(0), tokens, hypers=HYPERS)["params"]
        merged = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if "'controller'" in jax.tree_util.keystr(path) else _at(params, path), started
        )
        return model.apply({"params": merged}, tokens, hypers=HYPERS, route=route)

    assert_close(run(params, jnp.zeros_like(tokens)).logits, whole.logits, 1e-5)
    local = run(params, jnp.ones_like(tokens))
    assert np.linalg.norm(local.logits - whole.logits) > 0.01 * np.linalg.norm(whole.logits)
    layers = 1 if config.windows else 2
    assert local.routing.mean.shape == (layers, *tokens.shape, 2) and config.routed[-1] == 1


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def changed(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "smollm2", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("changes, sentence", [
    (dict(model_type="mamba"), "model_type: expected one of llama, mistral, qwen2, .*, got 'mamba'."),
    (dict(hidden_act="relu"), "hidden_act: expected one of silu, gelu_pytorch_tanh, got 'relu'."),
    (dict(rope_parameters=dict(rope_type="ntk", rope_theta=1.0)), "rope_type: expected default, linear, llama3 or y"),
    (dict(num_hidden_layers=3), "path: expected a tensor 'model.layers.2.input_layernorm.weight' in "),
    (dict(sliding_window=8, model_type="mistral"), "sliding_window: expected a layer of full attention, or nothing"),
    (dict(intermediate_size=47), "model.layers.0.mlp.gate_proj.weight: expected shape"),
])
def test_what_is_not_known_is_one_sentence(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        pretrained.load(changed(tmp_path, **changes))


def test_what_is_not_there_or_cut_short_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="^path: expected a folder with config.json or a GGUF file, got "):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^path: expected config.json in "):
        pretrained.load(tmp_path)
    folder = changed(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="^path: expected whole safetensors, got "):
        pretrained.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"^path: expected \*.safetensors in "):
        pretrained.load(folder)
