"""Layers, models and specs from flat fields, since most tests vary one at a time."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from meta_attention_jax import AttentionSpec, LanguageModel, MetaAttention, ModelConfig, Router
from meta_attention_jax.data.tokenizer import byte_alphabet
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.pretrained import families
from meta_attention_jax.routing import dispatch

SPEC = {field.name for field in dataclasses.fields(AttentionSpec)}
ROUTER = {field.name for field in dataclasses.fields(Router)}
MODULE = {"mode", "dispatch", "shard_axis", "name"}


def slow(*cases: Any) -> list[Any]:
    """Cases of a `parametrize` that `make slow` runs alone; others of the same test are in `make test`."""
    return [pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.slow) for case in cases]


def _records(fields: dict[str, Any], window: int = 128) -> tuple[AttentionSpec, Router, dict]:
    spec = AttentionSpec(**{"window": window} | {k: v for k, v in fields.items() if k in SPEC})
    router = Router(**{k: v for k, v in fields.items() if k in ROUTER})
    return spec, router, {k: v for k, v in fields.items() if k not in SPEC | ROUTER}


def layer(**fields: Any) -> MetaAttention:
    """A `MetaAttention` from its own fields, those of its spec, and those of its router."""
    spec, router, rest = _records(fields)
    return MetaAttention(spec=spec, router=router, **rest)


def config(**fields: Any) -> ModelConfig:
    """A `ModelConfig` from its own fields, those of its spec, and those of its router."""
    spec, router, rest = _records(fields)
    return ModelConfig(attention=spec, router=router, **rest)


def model(**fields: Any) -> LanguageModel:
    """A `LanguageModel`: the same, and `mode` or `dispatch`."""
    own = {k: v for k, v in fields.items() if k in MODULE}
    return LanguageModel(config(**{k: v for k, v in fields.items() if k not in MODULE}), **own)


def initial(module: Any, *arguments: Any, **named: Any) -> Any:
    """`module.init` with key 0, as one program: op by op it takes ten times as long."""
    return jax.jit(lambda key: module.init(key, *arguments, **named))(jax.random.key(0))


def attended(name, q, k, v, *, segment_ids=None, **spec: Any):
    """A mechanism on all tokens."""
    return attend(name, q, k, v, spec=AttentionSpec(**spec), segment_ids=segment_ids)


def hard(q, k, v, route, *, mechanisms=("full", "linear", "local"), rotated=None,
         segment_ids=None, **spec: Any):
    """Hard dispatch."""
    return dispatch.hard_attention(
        q, k, v, route, mechanisms=mechanisms, spec=AttentionSpec(**spec), rotated=rotated,
        segment_ids=segment_ids,
    )


def published(path: pathlib.Path, *, layers: int = 2, seed: int = 0, context: int = 256) -> pathlib.Path:
    """A folder as a small Llama is published: random weights, a byte-level tokenizer with an end of text."""
    path.mkdir(parents=True)
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: b for c, b in byte_alphabet().items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    inner.save(str(path / "tokenizer.json"))
    said = dict(
        model_type="llama", vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, hidden_act="silu", rope_theta=1e4,
        tie_word_embeddings=True, eos_token_id=256, max_position_embeddings=context,
    )
    (path / "config.json").write_text(json.dumps(said))
    rng, kept = np.random.default_rng(seed), {}
    for *_, tensor in families.tensors_of(families.config_of(said), families.family_of(said)):
        scale = 1.0 if len(tensor.shape) == 1 else 2 / tensor.shape[-1] ** 0.5
        kept[tensor.name] = (scale * rng.standard_normal(tensor.shape)).astype(np.float32)
    save_file(kept, path / "model.safetensors")
    return path


def light(*, steps, every):
    """Fields of a run that is as small as can be."""
    return {"controller.name": "fixed", "controller.fixed": ("local",), "model.num_layers": 1, "train.steps": steps,
            "train.eval_every": every, "train.checkpoint_every": every, "train.eval_batches": 1, "parallel.devices": 1}


def config_file(fields, rest):
    """The text of a config file for such runs, which ends with the functions in `rest`."""
    return f"""
from configs import smoke
from meta_attention_jax.sweeps.space import *

def get_config():
    config = smoke.get_config()
    config.update_from_flattened_dict({fields!r})
    return config
{rest}"""
