"""A model back into the form that it was published in: a folder of safetensors that other libraries open."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.data.published import PublishedTokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole
from meta_attention_jax.pretrained import families, read
from meta_attention_jax.pretrained.read import open_source

BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike[str],
) -> None:
    """Writes `config.json`, `model.safetensors` and the tokenizer into a new folder, all or nothing.

    Args:
      config: of `load`; routers and controllers are left out.
      params: of the model, controllers or not; their dtype is kept.
      source: where the model was loaded from, which knows its config and tokenizer.
    """
    from safetensors.numpy import save_file

    path, opened = pathlib.Path(path), open_source(source)
    expect(not path.exists(), "path", "a folder that is not there", str(path))
    rope = opened.config.get("rope_parameters") or {}
    stated = rope.get("rope_type") != "factors"
    expect(stated, "source", "positions that a config.json can state", "factors of a GGUF file")
    family = families.family_of(opened.config)
    tensors = {}
    for where, layer, tensor in families.tensors_of(config, family):
        value = np.asarray(jax.device_get(_get(params, where, layer, config)))
        tensors[tensor.name] = np.ascontiguousarray(tensor.theirs(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = pathlib.Path(folder) / path.name
        made.mkdir()
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        write_whole(made / "config.json", json.dumps(families.published(opened.config, config), indent=2))
        if not pathlib.Path(source).is_dir():
            _write_tokenizer(made, read.describe(source)[1])
        for name in BESIDE:
            if (pathlib.Path(source) / name).is_file():
                shutil.copy(pathlib.Path(source) / name, made / name)
        os.replace(made, path)


def _write_tokenizer(folder: pathlib.Path, tokenizer: PublishedTokenizer) -> None:
    """What a folder says of a tokenizer, of one that a GGUF file has said."""
    ends = {"bos_token_id": tokenizer.start, "eos_token_id": list(tokenizer.ends)}
    write_whole(folder / "tokenizer.json", tokenizer.serialized)
    write_whole(folder / "generation_config.json", json.dumps(ends))
    if tokenizer.template is not None:
        write_whole(folder / "chat_template.jinja", tokenizer.template)


def _get(params: Mapping[str, Any], where: families.Path, layer: int | None, config: ModelConfig) -> Any:
    """One parameter of `LanguageModel`'s tree."""
    if layer is not None:
        where = ("layers" if config.scan_layers else f"layer_{layer}", *where)
    for name in where:
        expect(name in params, "params", f"those of the config, {'/'.join(where)}", f"none of {name!r}")
        params = params[name]
    return params if layer is None or not config.scan_layers else params[layer]
