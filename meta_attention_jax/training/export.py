"""The routers of a published model in two files, to be sent about: what they were trained as, and their weights.

`routing.json` has the format, the config, the step and the sha256 of the published model and of the weights, which are
in `routing.safetensors`. `load_run` opens the folder like that of a run. Where the published model is saved beside them
(`model=True`), the folder is also one that other libraries open, and the model is found there.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from meta_attention_jax import files
from meta_attention_jax.config import completed, config_to_dict, dict_to_config, read_stored
from meta_attention_jax.fields import expect
from meta_attention_jax.pretrained import save
from meta_attention_jax.pretrained.source import ROUTING
from meta_attention_jax.training import backbone

FILE = "routing.json"
FORMAT = 1


def write(
    path: pathlib.Path, config: ConfigDict, params: Any, step: int, model: Any, note: Mapping[str, Any]
) -> None:
    """Makes the folder `path`. `params`: of the whole model; `model`: its `ModelConfig` where it is saved as well, else
    None; `note`: more to be kept, such as the command."""
    from safetensors.numpy import save as to_bytes

    expect(config.retrofit.backbone, "retrofit.backbone", "a run that has routed a published model", "none")
    expect(not path.exists(), "path", "a folder that is not there", str(path))
    own = {"/".join(name): np.asarray(leaf) for name, leaf in flatten_dict(backbone.trained(params)).items()}
    weights = to_bytes(own)
    said = {
        "format": FORMAT,
        "step": step,
        "backbone": backbone.identity(config),
        "sha256": hashlib.sha256(weights).hexdigest(),
        **note,
        "config": config_to_dict(config),
    }
    if model is not None:
        save(path, model, params, source=backbone.locate(config.retrofit.backbone))
        digest = backbone.identity_of(path)
        said["backbone"] = {**digest, "path": "."}
    files.write_whole(path / ROUTING, weights)
    files.write_whole(path / FILE, json.dumps(said, indent=1) + "\n")


def is_export(path: pathlib.Path) -> bool:
    """Whether a folder is one of these, and no run directory."""
    return (path / FILE).is_file()


def read(path: pathlib.Path) -> tuple[ConfigDict, int, Any]:
    """(config, step, the parameters that were trained) of a folder that `write` made."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    said = read_stored(path / FILE, "what was exported")
    expect(said.get("format") == FORMAT, "format", f"{FORMAT} in {str(path / FILE)!r}", said.get("format"))
    expect((path / ROUTING).is_file(), "workdir", f"{ROUTING} in {str(path)!r}", "none")
    weights = (path / ROUTING).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    expect(digest == said.get("sha256"), "workdir", f"{ROUTING} of sha256 {said.get('sha256')}", digest)
    try:
        flat = load(weights)
    except SafetensorError as error:
        raise ValueError(f"workdir: expected weights in {str(path / ROUTING)!r}, got {error}.") from None
    config = dict_to_config(completed(said["config"]))
    if said["backbone"].get("path") == ".":
        config.retrofit.backbone = str(path)
    return config, int(said["step"]), unflatten_dict({tuple(name.split("/")): leaf for name, leaf in flat.items()})


def backbone_of(path: pathlib.Path) -> dict[str, Any]:
    """What is known of the published model of an export."""
    return read_stored(path / FILE, "what was exported")["backbone"]
