"""Layers, models and specs from flat fields, since most tests vary one at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from meta_attention_jax import AttentionSpec, LanguageModel, MetaAttention, ModelConfig, Router
from meta_attention_jax.mechanisms.registry import attend
from meta_attention_jax.routing import dispatch

SPEC = {field.name for field in dataclasses.fields(AttentionSpec)}
ROUTER = {field.name for field in dataclasses.fields(Router)}
MODULE = {"mode", "dispatch", "shard_axis", "name"}


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
