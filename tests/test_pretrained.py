"""Published models: what `transformers` says of them (by experiments/checks/parity.py), written back, routed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from meta_attention_jax import LanguageModel, Router, RoutingHypers, generate, pretrained
from meta_attention_jax.data.tokenizer import BPETokenizer
from meta_attention_jax.pretrained import families, gguf_file, read
from meta_attention_jax.pretrained.read import open_source
from meta_attention_jax.pretrained.tokenizer import from_gguf
from meta_attention_jax.sharding import AXES
from tests import making
from tests.close import assert_close

FOLDER = pathlib.Path(__file__).parent / "data" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
ROUTER = Router(mechanisms=("full", "local"), hidden=8)
HYPERS = RoutingHypers(
    strength=np.float32(2), preference=np.float32(0.1), costs=np.float32([1, 0.15]), threshold=np.float32(0)
)
UNROUTED = HYPERS.replace(costs=np.ones(1, np.float32))


SELDOM = "llama2", "llama_linear", "qwen2", "gemma2", "mistral", "qwen3"  # Their rows are in those of others.


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in SELDOM), *making.slow(*SELDOM)])
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
    with pytest.raises(ValueError, match="^params: expected those of the config, "):
        pretrained.save(tmp_path / "other", config, {"embedding": params["embedding"]}, source=FOLDER / name)
    with pytest.raises(ValueError, match="^path: expected a folder that is not there"):
        pretrained.save(tmp_path / "again", config, params, source=FOLDER / name)


@pytest.mark.parametrize("name", ["smollm2", "gemma3", *making.slow("gemma2")])
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
    (dict(num_hidden_layers=1), "path: expected tensors that a llama has, got 'model.layers.1"),
    (dict(hidden_size=None), "hidden_size: expected a value in config.json, got None."),
    (dict(quantization_config={"bits": 4}), "quantization_config: expected none or None, which is all that is read"),
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
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="^path: expected JSON in "):
        pretrained.load(tmp_path)
    with pytest.raises(ValueError, match="^dtype: expected one of float32, bfloat16, float16, got 'int8'."):
        pretrained.load(FOLDER / "smollm2", dtype=jnp.int8)
    folder = changed(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="^path: expected whole safetensors, got "):
        pretrained.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"^path: expected \*.safetensors in "):
        pretrained.load(folder)


def test_a_config_alone_says_what_a_model_is_and_gives_no_weights(tmp_path):
    shutil.copy(FOLDER / "llama3" / "config.json", tmp_path)
    assert read.describe(tmp_path) == (read.describe(FOLDER / "llama3")[0], None)
    with pytest.raises(ValueError, match=r"path: expected \*.safetensors in .*, got 'none'"):
        pretrained.load(tmp_path)


def as_gguf(path, name, kind=None, *, freqs=None, extra=()):
    """A fixture as llama.cpp writes it: its names, pairs of queries and keys side by side."""
    config, params, _ = pretrained.load(FOLDER / name)
    source = open_source(FOLDER / name)
    names = {theirs: ours for ours, theirs in gguf_file.TOP.items()}
    names |= {theirs: ours for ours, theirs in gguf_file.LAYER.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    for ours, theirs in gguf_file.FIELDS.items():
        value = source.config.get(theirs)
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{ours}", value)
    writer.add_float32("llama.rope.freq_base", config.rope.base)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(0x21 + i) for i in range(config.vocab_size - 1)), '!"'])
    writer.add_token_merges(["! \""])
    writer.add_eos_token_id(3)
    for tensor in source.names:
        value = np.asarray(source.read(tensor), np.float32)
        stem, _, end = tensor.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        stem = stem.split(".", 3)[3] if layer else stem
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_heads if stem.endswith("q_proj") else config.kv_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        given = f"blk.{layer}.{names[stem]}.{end}" if layer else f"{names[stem]}.{end}"
        if kind is None or value.ndim == 1 or value.shape[-1] % 32:
            writer.add_tensor(given, value)
        else:
            writer.add_tensor(given, gguf.quants.quantize(value, kind), raw_dtype=kind)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(freqs, np.float32))
    for given in extra:
        writer.add_tensor(given, np.ones(32, np.float32))
    return written(writer, path)


def written(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_a_gguf_file_is_the_folder(name, tmp_path):
    """Parameters of both; llama3 has biases, a head of its own and factors of its frequencies."""
    config, params, _ = pretrained.load(FOLDER / name)
    file = as_gguf(tmp_path / "model.gguf", name, freqs=config.rope.divisors or None)
    found, same, tokenizer = pretrained.load(file)
    assert found.rope.divisors == pytest.approx(config.rope.divisors) and tokenizer.ends == (3,)
    assert dataclasses.replace(found, rope=config.rope, norm_epsilon=config.norm_epsilon) == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    if name == "llama3":
        with pytest.raises(ValueError, match="^source: expected positions that a config.json can state"):
            pretrained.save(tmp_path / "again", found, same, source=file)
    else:
        pretrained.save(tmp_path / "again", found, same, source=file)
        again, _, kept = pretrained.load(tmp_path / "again")
        assert again == found and kept._content() == tokenizer._content()


def test_quantised_tensors_are_near_and_others_are_refused(tmp_path):
    _, exact, _ = pretrained.load(FOLDER / "smollm2")
    kinds = gguf.GGMLQuantizationType
    for kind in (kinds.F16, kinds.BF16, kinds.Q8_0):
        _, near, _ = pretrained.load(as_gguf(tmp_path / kind.name, "smollm2", kind))
        assert_close(near["embedding"]["embedding"], exact["embedding"]["embedding"], 0.02)
    writer = gguf.GGUFWriter(str(tmp_path / "other"), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((61, 54), np.uint8), raw_dtype=kinds.TQ1_0)
    with pytest.raises(ValueError, match="^token_embd.weight: expected one of F32, F16, BF16, .*, got 'TQ1_0'."):
        pretrained.load(written(writer, tmp_path / "other"))


@pytest.mark.parametrize("damage, sentence", [
    (lambda data: data[:200], "path: expected a whole GGUF file"),
    (lambda data: data[:-2000], "path: expected a whole GGUF file"),
    (lambda data: b"nothing" + data, "path: expected a whole GGUF file"),
])
def test_a_damaged_gguf_file_is_one_sentence(damage, sentence, tmp_path):
    file = as_gguf(tmp_path / "model.gguf", "smollm2")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"^{sentence}"):
        pretrained.load(file)


def test_a_tensor_that_nobody_asks_for_is_not_passed_over(tmp_path):
    with pytest.raises(ValueError, match="^path: expected tensors that a llama has, got 'blk.0.attn_sinks.weight'."):
        pretrained.load(as_gguf(tmp_path / "model.gguf", "smollm2", extra=["blk.0.attn_sinks.weight"]))


TEXT = "Fellow citizens, of 1,862: I'm glad \u2014 tr\u00e8s bien!\n  \t<|end|>".encode()


def byte_level():
    trained = BPETokenizer.train([TEXT * 50], 290)
    return trained, json.loads(trained._content())["model"]


def test_a_byte_level_tokenizer_is_rebuilt_from_its_merges():
    trained, model = byte_level()
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*sorted(model["vocab"], key=model["vocab"].get), "<|end|>"],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [1] * 290 + [3],
        "tokenizer.ggml.eos_token_id": 290,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    }
    rebuilt = from_gguf(said)
    cut = TEXT.removesuffix(b"<|end|>")
    assert rebuilt.encode(cut).tolist() == trained.encode(cut).tolist() and rebuilt.decode(rebuilt.encode(cut)) == cut
    assert rebuilt.decode(rebuilt.encode(TEXT)) == TEXT and 290 not in rebuilt.encode(TEXT), "text is text"
    with pytest.raises(ValueError, match="^text: expected UTF-8, got something else at byte 1.$"):
        rebuilt.encode(b"a\xff")
    assert rebuilt.vocab_size == 291 and rebuilt.ends == (290,) and rebuilt.token_bytes[290] == 0
    assert rebuilt.token_bytes[rebuilt.encode(cut)].sum() == len(cut)
    assert rebuilt.chat([{"role": "user", "content": "glad"}]).tolist() == [*rebuilt.encode(b"glad"), 290]
    assert rebuilt.conversation([{"role": "user", "content": "glad "}], answer=False) == "glad ", "to go on with"
    strict = from_gguf(said | {
        "tokenizer.ggml.bos_token_id": 290,
        "tokenizer.chat_template": "{% if not messages %}{{ raise_exception('no words') }}{% endif %}{{ bos_token }}",
    })
    assert strict.chat([{"role": "user", "content": "glad"}]).tolist() == [290]
    with pytest.raises(ValueError, match="^chat: expected messages that the model's template takes, got 'no words'."):
        strict.chat([])
    with pytest.raises(ValueError, match="^chat: expected a template that keeps what the last message says, got "):
        strict.conversation([{"role": "user", "content": "glad"}], answer=False)
    for words in ("smollm", "qwen2", "llama-bpe"):
        other = from_gguf(said | {"tokenizer.ggml.pre": words})
        assert other.decode(other.encode(cut)) == cut
    tokens = [*said["tokenizer.ggml.tokens"], "<think>", "zq", "<|eot|>"]
    more = said | {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 290 + [3, 4, 1, 3],
        "tokenizer.ggml.bos_token_id": 290, "tokenizer.ggml.eot_token_id": 293,
    }
    for words, whole in (("llama-bpe", True), ("qwen2", False)):
        # A word of the vocabulary that no merge makes: Llama 3 takes it, others its pieces.
        named = from_gguf(more | {"tokenizer.ggml.pre": words})
        assert (named.encode(b"zq").tolist() == [292]) == whole and named.begins == whole
        assert named.encode(b"a<think>").tolist()[-1] == 291 and named.ends == (290, 293)
        assert type(named).of_content(json.loads(named._content())).begins == whole
    with pytest.raises(ValueError, match="^tokenizer.ggml.merges: expected two tokens that make a third, got 'a zzz'."):
        from_gguf(said | {"tokenizer.ggml.merges": ["a zzz"]})
    for field, value in (("tokenizer.ggml.pre", "viking"), ("tokenizer.ggml.model", "bert")):
        with pytest.raises(ValueError, match=f"^{field}: expected .* else a folder with tokenizer.json, got '{value}'."):
            from_gguf(said | {field: value})


def test_a_tokenizer_of_scores_merges_the_best_pair_first():
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581ab\u00e9", "ab", "\u2581a", "\u2581ab", "b\u00e9"]
    scores = [0.0] * 261 + [-3.0, -1.0, -2.0, -0.5]
    said = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2] + [6] * 256 + [1] * 8}
    found = from_gguf(said)
    names = [tokens[i] for i in found.encode("ab\u00e9c".encode())]
    assert names == ["\u2581a", "b\u00e9", "<0x63>"], "b\u00e9 has the best score, then \u2581a"
    assert found.decode(found.encode("ab\u00e9c".encode())) == " ab\u00e9c".encode(), "characters are themselves"


def test_the_tokenizer_of_a_folder(tmp_path):
    folder = changed(tmp_path, vocab_size=61)
    trained, _ = byte_level()
    trained.save(folder)
    with pytest.raises(ValueError, match="^tokenizer: expected at most the 61 tokens of the model, got 290."):
        pretrained.load(folder)
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 5}, merges=[("a", "b")]))
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (folder / "chat_template.jinja").write_text("ab")
    _, _, found = pretrained.load(folder)
    assert found.vocab_size == 6 and found.encode(b"abab").tolist() == [5, 5] and found.ends == (1, 5)
    assert found.chat([]).tolist() == [5] and not found.begins
    words.post_processor = tokenizers.processors.TemplateProcessing(single="b $A", special_tokens=[("b", 1)])
    words.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1}))
    assert pretrained.load(folder)[2].begins
    for name, content, sentence in (
        ("generation_config.json", '{"eos_token_id": 99}', "tokenizer: expected ids of the 6 tokens .*, got 99"),
        ("generation_config.json", '{"eos', "path: expected JSON in .*generation_config.json"),
        ("tokenizer.json", '{"version', "path: expected a whole tokenizer in "),
    ):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"^{sentence}"):
            pretrained.load(folder)
        (folder / "generation_config.json").write_text("{}")


def test_a_folder_s_index_says_which_files_are_the_model(tmp_path):
    """Others, such as the same weights in the words of their maker, are passed over."""
    folder = tmp_path / "mistral"
    shutil.copytree(FOLDER / "mistral", folder)
    other = {"layers.0.attention.wq.weight": np.zeros((2, 2), np.float32)}
    save_file(other, str(folder / "consolidated.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], pretrained.load(FOLDER / "mistral")[1])
    os.rename(folder / "model.safetensors", folder / "model-1-of-1.safetensors")
    names = open_source(FOLDER / "mistral").names
    index = {"weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], pretrained.load(FOLDER / "mistral")[1])
    os.remove(folder / "model-1-of-1.safetensors")
    with pytest.raises(ValueError, match="^path: expected whole safetensors, got "):
        pretrained.load(folder)


@pytest.mark.parametrize("rope, sentence", [
    ({"rope_type": "linear"}, "factor: expected a value in the rope of type 'linear', got None"),
    ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale: expected none in a rope of type 'yarn'.*, got 0.7"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected none in a rope of type 'default', .*, got 0.5"),
    ({"type": "dynamic", "factor": 2.0}, "rope_type: expected default, linear, llama3 or yarn, got 'dynamic'"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor: expected a value in the rope of type 'llama3'"),
])
def test_a_rope_that_is_not_known_whole_is_one_sentence(rope, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        pretrained.load(changed(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope}))


def test_older_words_of_a_rope_are_read():
    hf = json.loads((FOLDER / "llama3" / "config.json").read_text())
    plain = {name: value for name, value in hf.items() if name not in ("rope_parameters", "rope_scaling")}
    linear = [
        families.config_of({**plain, "rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        families.config_of({**plain, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ]
    assert linear[0] == linear[1] and set(linear[0].rope.divisors) == {4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    most = {"original_max_position_embeddings": hf["max_position_embeddings"]}
    assert families.config_of({**plain, "rope_parameters": yarn}) == families.config_of(
        {**plain, "rope_parameters": yarn | most}
    )


def test_what_a_gguf_file_of_gemma_leaves_out():
    """llama.cpp knows it by the architecture and the number of layers."""
    said = {"gemma2.block_count": 46, "gemma2.embedding_length": 4608, "gemma2.attention.head_count": 32}
    made = gguf_file._config(said, "gemma2")
    assert made["query_pre_attn_scalar"] == 144
    assert (made["attn_logit_softcapping"], made["final_logit_softcapping"]) == (50.0, 30.0)
    assert gguf_file._config(said | {"gemma2.attn_logit_softcapping": 20.0}, "gemma2")["attn_logit_softcapping"] == 20.0
    small = gguf_file._config(said | {"gemma2.block_count": 26}, "gemma2")
    assert "query_pre_attn_scalar" not in small
    assert gguf_file._config(said | {"gemma2.attention.scale": 0.25}, "gemma2")["query_pre_attn_scalar"] == 16.0


def test_leaves_go_where_a_mesh_has_them():
    config, params, _ = pretrained.load(FOLDER / "smollm2")
    mesh = jax.make_mesh((1, 1), AXES)
    _, placed, _ = pretrained.load(FOLDER / "smollm2", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    kernel = placed["layers"]["attention"]["projections"]["query"]["kernel"]
    assert kernel.sharding.mesh == mesh and tuple(kernel.sharding.spec)[:2] == (None, "fsdp")
    assert set(placed["final_norm"]["scale"].sharding.spec) <= {None}


def test_more_than_the_context_is_one_sentence():
    config, params, _ = pretrained.load(FOLDER / "smollm2")
    with pytest.raises(ValueError, match="^steps: expected prompt . steps within the model's context of 256, got 257."):
        generate(LanguageModel(config), params, [list(range(50))], steps=207, hypers=UNROUTED)
