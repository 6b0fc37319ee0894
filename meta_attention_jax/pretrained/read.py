"""A published model on disk: a folder of safetensors, or a GGUF file; read offline, one tensor at a time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.fields import expect
from meta_attention_jax.pretrained import families, gguf_file, tokenizer
from meta_attention_jax.pretrained.source import ROUTING, Source, json_of
from meta_attention_jax.pretrained.tokenizer import PublishedTokenizer
from meta_attention_jax.sharding import FSDP, partition

DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    scan_layers: Optional[bool] = None,
    mesh: Optional[Mesh] = None,
) -> tuple[ModelConfig, dict[str, Any], Optional[PublishedTokenizer]]:
    """The model in a folder (`config.json`, `*.safetensors`) or a GGUF file, its parameters, and its tokenizer (None of
    a folder without `tokenizer.json`).

    Products and the embedding are kept in `dtype`, vectors in float32. Raises ValueError for what is not there, is cut
    short, is of no family that is known, or has a tensor that the family does not.

    Args:
      scan_layers: whether the parameters of all layers are stacked; None: where all layers are alike.
      mesh: where the parameters go, split over its axis "fsdp", if it has one, by `sharding.RULES`; None: to the first
        device. On the host there is never more than the model once and one leaf.
    """
    source = open_source(path)
    config, found = _described(pathlib.Path(path), source, dtype, scan_layers)
    return config, _placed(_params(path, source, config), mesh), found


def _placed(params: dict[str, Any], mesh: Optional[Mesh]) -> dict[str, Any]:
    """The leaves on their devices, each let go of here as it arrives."""
    axis = FSDP if mesh is not None and FSDP in mesh.axis_names else None
    specs, flat = flatten_dict(partition(params, axis)), flatten_dict(params)
    params.clear()
    for name in list(flat):
        leaf = flat.pop(name)
        placed = jnp.asarray(leaf) if mesh is None else jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        flat[name] = jax.block_until_ready(placed)
        del leaf
    return unflatten_dict(flat)


def describe(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, scan_layers: Optional[bool] = None
) -> tuple[ModelConfig, Optional[PublishedTokenizer]]:
    """`load` without the parameters; of a folder `config.json` is enough, as for what is only compiled."""
    return _described(pathlib.Path(path), open_source(path, weights=False), dtype, scan_layers)


def _described(
    path: pathlib.Path, source: Source, dtype: Any, scan_layers: Optional[bool]
) -> tuple[ModelConfig, Optional[PublishedTokenizer]]:
    expect(np.dtype(dtype).name in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", np.dtype(dtype).name)
    config = families.config_of(source.config)
    if config.tied is False and source.names and "lm_head.weight" not in source.names:
        config = dataclasses.replace(config, tied=True)
    config = dataclasses.replace(config, param_dtype=jnp.dtype(dtype), dtype=jnp.dtype(dtype))
    if scan_layers is not None:
        expect(not (scan_layers and config.windows), "scan_layers", "False where layers differ", True)
        config = dataclasses.replace(config, scan_layers=scan_layers)
    return config, _tokenizer(path, source, config)


def _params(path: str | os.PathLike[str], source: Source, config: ModelConfig) -> dict[str, Any]:
    family = families.family_of(source.config)
    params: dict[str, Any] = {}
    left = {name for name in source.names if not _is_derived(name, config)}
    for where, layer, tensor in families.tensors_of(config, family):
        expect(tensor.name in source.names, "path", f"a tensor {tensor.name!r} in {str(path)!r}", "none")
        left.discard(tensor.name)
        found = source.read(tensor.name)
        expect(found.shape == tensor.shape, tensor.name, f"shape {tensor.shape}", found.shape)
        value = tensor.ours(found)
        value = value.astype(np.float32 if value.ndim == 1 else config.param_dtype)
        _put(params, where, layer, value, config)
    expect(not left, "path", f"tensors that a {source.config['model_type']} has", min(left, default=""))
    return params


def _is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a tensor says what is known without it."""
    tied = config.tied and name == "lm_head.weight"
    return tied or name == "rope_freqs.weight" or name.endswith("rotary_emb.inv_freq")


def _tokenizer(path: pathlib.Path, source: Source, config: ModelConfig) -> Optional[PublishedTokenizer]:
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return None
    found = tokenizer.from_folder(path, source.config) if path.is_dir() else tokenizer.from_gguf(source.said)
    size = found.vocab_size  # Embeddings are often padded.
    expect(size <= config.vocab_size, "tokenizer", f"at most the {config.vocab_size} tokens of the model", size)
    return found


def _put(params: dict[str, Any], where: families.Path, layer: Optional[int], value: np.ndarray, config: ModelConfig):
    """Into the tree of `LanguageModel`; layers of a scanned model are stacked."""
    if layer is not None:
        where = ("layers" if config.scan_layers else f"layer_{layer}", *where)
    for name in where[:-1]:
        params = params.setdefault(name, {})
    if layer is None or not config.scan_layers:
        params[where[-1]] = value
        return
    if layer == 0:
        params[where[-1]] = np.empty((config.num_layers, *value.shape), value.dtype)
    params[where[-1]][layer] = value


def weights_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights of the model in a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        listed = json_of(index).get("weight_map")
        expect(isinstance(listed, dict), "path", f"a weight_map in {str(index)!r}", listed)
        return sorted({path / name for name in listed.values()})
    if whole.is_file():  # Some folders hold the same weights a second time, in other words.
        return [whole]
    return sorted(file for file in path.glob("*.safetensors") if file.name != ROUTING)


def open_source(path: str | os.PathLike[str], *, weights: bool = True) -> Source:
    """The folder or the file; `weights`: a folder must have some."""
    path = pathlib.Path(path)
    if path.is_dir():
        return _folder(path, weights)
    expect(path.is_file(), "path", "a folder with config.json or a GGUF file", str(path))
    return gguf_file.open_file(path)


def _folder(path: pathlib.Path, weights: bool) -> Source:
    from safetensors import SafetensorError, safe_open

    expect((path / "config.json").is_file(), "path", f"config.json in {str(path)!r}", "none")
    config = json_of(path / "config.json")
    files = weights_of(path) if weights else []
    expect(files or not weights, "path", f"*.safetensors in {str(path)!r}", "none")
    where, opened = {}, []
    for file in files:
        try:
            opened.append(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: expected whole safetensors, got {str(file)!r}: {error}") from None
        where |= dict.fromkeys(opened[-1].keys(), opened[-1])
    return Source(config, where, lambda name: where[name].get_tensor(name), config)
