"""Families of published models: what their `config.json` says of a `ModelConfig`, and which tensor is which parameter.

All are decoders of one form, norm, rotary attention, norm, gated MLP; a family is a row of what it does otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.fields import expect, whole
from meta_attention_jax.types import AttentionSpec, Rope, Router


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family do that Llama does not."""

    architecture: str  # Its class elsewhere.
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    offset: float = 0.0  # Of norms: a stored w is the scale offset + w.
    scaled_embedding: bool = False  # By sqrt(D).
    tied: bool = False  # Where the config does not say.


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biases=("qkv",)),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma2": Family("Gemma2ForCausalLM", post_norms=True, offset=1.0, scaled_embedding=True, tied=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", qk_norm=True, post_norms=True, offset=1.0, scaled_embedding=True, tied=True
    ),
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
REFUSED = {"quantization_config": None, "use_bidirectional_attention": False, "partial_rotary_factor": 1.0}
FULL, WINDOW = "full_attention", "sliding_attention"
ROPES = {
    "default": (), "factors": ("factors",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
"""What each kind of rope may say besides `rope_theta`, `rope_type` and the original length; the first is needed."""


def family_of(hf: Mapping[str, Any]) -> Family:
    """The row of a `config.json`."""
    kind = hf.get("model_type")
    expect(kind in FAMILIES, "model_type", f"one of {', '.join(FAMILIES)}", kind)
    return FAMILIES[kind]


def config_of(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` (Hugging Face's names) describes: every layer full attention, but for those that
    are windows by nature."""
    family = family_of(hf)
    for name in NEEDED:
        expect(hf.get(name) is not None, name, "a value in config.json", hf.get(name))
    for name, plain in REFUSED.items():
        expect(hf.get(name, plain) in (plain, None), name, f"none or {plain}, which is all that is read", hf.get(name))
    for name in NEEDED[:-1]:
        expect(whole(name, hf[name]) > 0, name, "a number > 0", hf[name])
    heads, model_dim, layers = (hf[name] for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = hf.get("head_dim") or model_dim // heads
    activation = hf.get("hidden_activation") or hf.get("hidden_act")
    expect(activation in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}", activation)
    biases = set(family.biases)
    biases |= {"qkv", "out"} if hf.get("attention_bias") else set()
    biases |= {"mlp"} if hf.get("mlp_bias") else set()
    windows = _windows(hf, layers)
    ropes = {kind: rope_of(_rope(hf, kind), head_dim) for kind in (FULL, WINDOW)}
    scalar = hf.get("query_pre_attn_scalar")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        model_dim=model_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        qkv_features=heads * head_dim,
        mlp_dim=hf["intermediate_size"],
        activation=ACTIVATIONS[activation],
        biases=tuple(sorted(biases)),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        norm_epsilon=hf["rms_norm_eps"],
        attention_scale=None if scalar is None or scalar == head_dim else scalar**-0.5,
        rope=ropes[FULL],
        windows=windows,
        window_rope=ropes[WINDOW] if windows and ropes[WINDOW] != ropes[FULL] else None,
        embedding_scale=None if family.scaled_embedding else 1.0,
        tied=hf.get("tie_word_embeddings", family.tied),
        logit_softcap=hf.get("final_logit_softcapping"),
        context=hf.get("max_position_embeddings"),
        attention=AttentionSpec(softcap=hf.get("attn_logit_softcapping")),
        router=Router(mechanisms=("full",), controller="fixed", fixed=("full",)),
        scan_layers=not windows,
    )


def published(hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model that is written again."""
    kept = {name: value for name, value in hf.items() if name not in ("torch_dtype", "quantization_config")}
    made = {"architectures": [family_of(hf).architecture], "dtype": np.dtype(config.param_dtype).name}
    return {**kept, **made, "tie_word_embeddings": config.tied}


def _windows(hf: Mapping[str, Any], layers: int) -> tuple[Optional[int], ...]:
    """The window of every layer; () where none has one."""
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    kind = hf["model_type"]
    if window is None or (kind.startswith("qwen") and not hf.get("use_sliding_window")):
        return ()
    if kinds is None and kind.startswith("gemma"):
        every = hf.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6}[kind]
        kinds = [WINDOW if (i + 1) % every else FULL for i in range(layers)]
    elif kinds is None and kind.startswith("qwen"):
        kinds = [FULL if i < hf.get("max_window_layers", 28) else WINDOW for i in range(layers)]
    elif kinds is None:
        kinds = [WINDOW] * layers
    for one in kinds:
        expect(one in (FULL, WINDOW), "layer_types", f"{FULL} or {WINDOW}", one)
    expect(FULL in kinds, "sliding_window", "a layer of full attention, or nothing is there to route", window)
    return tuple(window if one == WINDOW else None for one in kinds) if WINDOW in kinds else ()


def _rope(hf: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What a config says of the positions in layers of a kind, in the words of today: older ones spread it."""
    given = hf.get("rope_parameters") or {}
    said = dict(given.get(kind) or given)
    if not given and kind == WINDOW and hf.get("rope_local_base_freq"):
        return {"rope_theta": hf["rope_local_base_freq"]}
    said = said or dict(hf.get("rope_scaling") or {})
    if "type" in said:
        said.setdefault("rope_type", said.pop("type"))
    if said.get("rope_type") == "yarn" and said.get("original_max_position_embeddings") is None:
        said["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    return {"rope_theta": hf.get("rope_theta") or 10000.0, **said}


def rope_of(said: Mapping[str, Any], dim: int) -> Rope:
    """Rotary positions, of which a scaling divides the frequencies base^(-2 i / d).

    linear: all by `factor`. llama3: those that turn less than low_freq_factor times within the original length by
    `factor`, those that turn more than high_freq_factor times not, linearly in turns between. yarn (Peng et al., arXiv
    2309.00071): as much, with beta_slow and beta_fast turns and linear in the index of the pair; turned vectors times
    0.1 log(factor) + 1.
    """
    base, kind = float(said["rope_theta"]), said.get("rope_type", "default")
    expect(kind in ROPES, "rope_type", "default, linear, llama3 or yarn", kind)
    needed = [*ROPES[kind][: 3 if kind == "llama3" else 1]]
    needed += ["original_max_position_embeddings"] if kind in ("llama3", "yarn") else []
    for name in needed:
        expect(said.get(name) is not None, name, f"a value in the rope of type {kind!r}", None)
    plain = {"rope_theta", "rope_type", "original_max_position_embeddings", *ROPES[kind]}
    for name, value in said.items():
        without = value is None or REFUSED.get(name, not value) == value
        expect(name in plain or without, name, f"none in a rope of type {kind!r}, of which it is not read", value)
    if kind == "default":
        return Rope(base)
    if kind == "factors":  # Of a GGUF file: what every frequency is divided by.
        return Rope(base, tuple(float(x) for x in said["factors"]))
    factor, index = float(said["factor"]), np.arange(dim // 2)
    kept, scale = np.zeros(dim // 2), 1.0
    if kind != "linear":
        original = float(said["original_max_position_embeddings"])
        turns = original * base ** (-2.0 * index / dim) / (2 * math.pi)
    if kind == "llama3":
        low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    elif kind == "yarn":
        fast, slow = float(said.get("beta_fast") or 32), float(said.get("beta_slow") or 1)
        low, high = (dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (fast, slow))
        if said.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        kept = 1.0 - np.clip((index - low) / max(high - low, 1e-3), 0.0, 1.0)
        scale = said.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    divisors = 1.0 / (kept + (1.0 - kept) / factor)
    return Rope(base, tuple(float(x) for x in divisors), float(scale))


class Tensor(NamedTuple):
    """A parameter as it is published: its name there, and how it becomes ours and theirs."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


Path = tuple[str, ...]


def tensors_of(config: ModelConfig, family: Family) -> Iterator[tuple[Path, Optional[int], Tensor]]:
    """Every parameter: its path in `LanguageModel`'s tree below a layer or at the top, its layer (None at the top), and
    its tensor."""
    heads, kv_heads, dim, model = config.num_heads, config.kv_heads, config.head_dim, config.model_dim
    vocab, mlp = config.vocab_size, config.mlp_width
    as_is = (lambda x: x, lambda x: x)
    turned = (lambda x: x.T, lambda x: x.T)
    norm = (lambda x: x.astype(np.float32) + np.float32(family.offset), lambda x: x - np.float32(family.offset))

    def into(count):  # [count d, D] <-> [D, count, d]
        return lambda x: x.T.reshape(model, count, dim), lambda x: x.reshape(model, count * dim).T

    def bias(count):
        return lambda x: x.reshape(count, dim), lambda x: x.reshape(count * dim)

    out = (lambda x: x.T.reshape(heads, dim, model), lambda x: x.reshape(heads * dim, model).T)
    yield ("embedding", "embedding"), None, Tensor("model.embed_tokens.weight", (vocab, model), *as_is)
    yield ("final_norm", "scale"), None, Tensor("model.norm.weight", (model,), *norm)
    if not config.tied:
        yield ("head", "kernel"), None, Tensor("lm_head.weight", (vocab, model), *turned)
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
                  "mlp_post_norm": "post_feedforward_layernorm"}
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        for ours, theirs in norms.items():
            yield (ours, "scale"), i, Tensor(f"{at}.{theirs}.weight", (model,), *norm)
        for ours, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
            path, name = ("attention", "projections", ours), f"{at}.self_attn.{ours[0]}"
            yield (*path, "kernel"), i, Tensor(f"{name}_proj.weight", (count * dim, model), *into(count))
            if "qkv" in config.biases:
                yield (*path, "bias"), i, Tensor(f"{name}_proj.bias", (count * dim,), *bias(count))
            if config.qk_norm and ours != "value":
                path = ("attention", "projections", f"{ours}_norm", "scale")
                yield path, i, Tensor(f"{name}_norm.weight", (dim,), *norm)
        path, name = ("attention", "projections", "out"), f"{at}.self_attn.o_proj"
        yield (*path, "kernel"), i, Tensor(f"{name}.weight", (model, heads * dim), *out)
        if "out" in config.biases:
            yield (*path, "bias"), i, Tensor(f"{name}.bias", (model,), *as_is)
        for name, shape in (("gate", (mlp, model)), ("up", (mlp, model)), ("down", (model, mlp))):
            yield (name, "kernel"), i, Tensor(f"{at}.mlp.{name}_proj.weight", shape, *turned)
            if "mlp" in config.biases:
                yield (name, "bias"), i, Tensor(f"{at}.mlp.{name}_proj.bias", shape[:1], *as_is)
