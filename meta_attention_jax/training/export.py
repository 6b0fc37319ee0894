"""The routers of a published model in a small folder, to be sent about: what they were trained as, and their weights.

`routing.json` has the format, the config, the step and the sha256 of the published model and of the weights, which are
in `routing.safetensors`; with the run's manifest of its data and its budgets, if it has them. `load_run` opens the
folder like that of a run. Where the published model is saved beside them (`model=True`), the folder is also one that
other libraries open, and the model is found there.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.config import completed, config_to_dict, dict_to_config, read_stored
from meta_attention_jax.data.manifest import MANIFEST
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place
from meta_attention_jax.pretrained import save
from meta_attention_jax.pretrained.source import ROUTING
from meta_attention_jax.training import backbone
from meta_attention_jax.training.rules import final_threshold
from meta_attention_jax.training.step import Hypers

FILE = "routing.json"
FORMAT = 1
KEPT = (MANIFEST, "budgets.json")
HERE = "."
KEYS = {"format", "step", "backbone", "sha256", "note", "config"}


def write(
    path: pathlib.Path,
    run: Place,
    config: ConfigDict,
    params: Any,
    step: int,
    hypers: Hypers,
    *,
    mode: str,
    model: Optional[ModelConfig],
    note: Mapping[str, Any],
) -> None:
    """Makes the folder `path`, whole or not at all, of the run in `run`. `params`: of the whole model; `mode`: what it
    is asked in; `model`: its config where it is saved as well; `note`: what else is to be kept, such as the command."""
    from safetensors.numpy import save as to_bytes

    expect(config.retrofit.backbone, "retrofit.backbone", "a run that has routed a published model", "none")
    expect(not path.exists(), "path", "a folder that is not there", str(path))
    weights = to_bytes({
        "/".join(name): np.asarray(leaf) for name, leaf in flatten_dict(backbone.trained(params)).items()
    })
    kept = config_to_dict(config)
    # Measured costs are frozen in the run.
    kept["prior"]["costs"] = ",".join(f"{cost:.9g}" for cost in np.asarray(hypers.routing.costs))
    # Where the run is asked at another price or theta than it was trained to.
    kept["gate"]["price"] = float(hypers.routing.price)
    if np.float32(final_threshold(config)) != np.float32(hypers.routing.threshold):
        kept["gate"] |= {"threshold": float(hypers.routing.threshold), "unit": "theta"}
    kept["train"]["init_from"] = ""  # A place on the machine that trained it.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = pathlib.Path(folder) / path.name
        known = backbone.identity(config)
        if model is None:
            made.mkdir()
        else:
            save(made, model, params, source=backbone.locate(config.retrofit.backbone))
            known = {**backbone.identity_of(made), "path": HERE}
        said = {
            "format": FORMAT, "step": step, "mode": mode, "backbone": known,
            "sha256": hashlib.sha256(weights).hexdigest(), "note": dict(note), "config": kept,
        }
        (made / ROUTING).write_bytes(weights)
        (made / FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        for name in KEPT:
            if (run / name).is_file():
                (made / name).write_bytes((run / name).read_bytes())
        os.replace(made, path)


def is_export(path: Place) -> bool:
    """Whether a folder is one of these, and no run directory."""
    return (path / FILE).is_file()


def described(path: Place) -> dict[str, Any]:
    """What an export says of itself."""
    said = read_stored(path / FILE, "what was exported")
    expect(said.get("format") == FORMAT, "format", f"{FORMAT} in {str(path / FILE)!r}", said.get("format"))
    lacks = sorted(KEYS - said.keys())
    expect(not lacks, "workdir", f"{', '.join(sorted(KEYS))} in {str(path / FILE)!r}", f"none of {', '.join(lacks)}")
    return said


def read(path: Place) -> tuple[ConfigDict, int, Any]:
    """(config, step, the parameters that were trained) of a folder that `write` made."""
    from safetensors.numpy import load

    said = described(path)
    expect((path / ROUTING).is_file(), "workdir", f"{ROUTING} in {str(path)!r}", "none")
    weights = (path / ROUTING).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    expect(digest == said["sha256"], "workdir", f"{ROUTING} of sha256 {said['sha256']}", digest)
    config = dict_to_config(completed(said["config"]))
    if said["backbone"]["path"] == HERE:
        config.retrofit.backbone = str(path)
    params = unflatten_dict({tuple(name.split("/")): leaf for name, leaf in load(weights).items()})
    return config, int(said["step"]), params
