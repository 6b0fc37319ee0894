"""A GGUF file (llama.cpp) in Hugging Face's words: its config, its tensors dequantised, their names, their layout."""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

import numpy as np

from meta_attention_jax.fields import expect
from meta_attention_jax.pretrained.source import Source

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


LARGEST = ("gemma2", 46), ("gemma3", 62)
"""Architecture and layers of the Gemmas of 27B, whose q . k is divided by (D / H)^1/2, of which files say nothing."""


def open_file(path: pathlib.Path) -> Source:
    """The file, mapped into memory and dequantised a tensor at a time. Its vocabulary takes seconds to read: the file
    that was opened last stays open."""
    stat = path.stat()
    return _open(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open(path: pathlib.Path, size: int, changed: int) -> Source:
    del size, changed  # They say that it is the same file still.
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(f"path: expected the package gguf (pip install gguf) for {str(path)!r}, got none.") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"path: expected a whole GGUF file, got {str(path)!r}: {error}") from None
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kind = said.get("general.architecture")
    expect(kind in KINDS, "general.architecture", f"one of {', '.join(KINDS)}", kind)
    tensors = {_name(tensor.name, kind): tensor for tensor in reader.tensors}
    for tensor in reader.tensors:
        found = tensor.tensor_type.name
        expect(found in TYPES, tensor.name, f"one of {', '.join(TYPES)}", found)
    config = _config(said, kind)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in tensors
    config["mlp_bias"] = "model.layers.0.mlp.down_proj.bias" in tensors
    if "rope_freqs.weight" in tensors:
        factors = np.array(tensors["rope_freqs.weight"].data, np.float32)
        config["rope_parameters"] |= {"rope_type": "factors", "factors": factors.tolist()}
    config["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[1])

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.tensor_type.name in ("F32", "F16"):
            value = np.array(tensor.data, np.float32)
        else:
            data = np.asarray(tensor.data).view(np.ndarray)  # Slices of a memmap cost more than they hold.
            value = np.asarray(gguf.quants.dequantize(data, tensor.tensor_type), np.float32)
        if kind.startswith("gemma") and "norm" in name:
            return value - 1.0  # There a stored norm is the scale itself.
        turned = re.search(r"self_attn\.([qk])_proj", name)
        if kind == "llama" and turned:
            heads = config["num_attention_heads" if turned[1] == "q" else "num_key_value_heads"]
            return _half_split(value, heads)
        return value

    return Source(config, tensors, read, said)


def _config(said: dict[str, Any], kind: str) -> dict[str, Any]:
    config = {theirs: said[f"{kind}.{ours}"] for ours, theirs in FIELDS.items() if f"{kind}.{ours}" in said}
    gemma = kind.startswith("gemma")
    config |= {"model_type": KINDS[kind], "hidden_act": "gelu_pytorch_tanh" if gemma else "silu"}
    if (scale := said.get(f"{kind}.attention.scale")) is not None:
        config["query_pre_attn_scalar"] = scale**-2
    elif (kind, config.get("num_hidden_layers")) in LARGEST:
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    if kind == "gemma2":  # The first files do not say it.
        config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | config
    rope = {"rope_theta": said.get(f"{kind}.rope.freq_base", 10000.0)}
    if said.get(f"{kind}.rope.scaling.type", "none") != "none":
        rope |= {
            "rope_type": said[f"{kind}.rope.scaling.type"],
            "factor": said.get(f"{kind}.rope.scaling.factor"),
            "original_max_position_embeddings": said.get(f"{kind}.rope.scaling.original_context_length"),
        }
    if kind == "gemma3":
        local = {"rope_theta": said.get("gemma3.rope.local.freq_base", 10000.0)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        config["rope_parameters"] = rope
    return config


def _name(name: str, kind: str) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its own."""
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    table = LAYER | GEMMA if kind.startswith("gemma") else LAYER
    return f"model.layers.{found[1]}.{table[found[2]]}.{end}" if found and found[2] in table else name


def _half_split(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from pairs (2 i, 2 i + 1), as llama.cpp turns them, to pairs (i, i + d / 2)."""
    shape = value.shape
    return value.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
