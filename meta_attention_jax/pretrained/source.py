"""What a published model is on disk, whatever the format: a config, tensors by name, a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np


def json_of(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file of a model's folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: expected JSON in {str(path)!r}, got {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"path: expected a JSON object in {str(path)!r}, got {type(found).__name__}.")
    return found


ROUTING = "routing.safetensors"  # Beside the weights of a model: those of its routers, which are none of its own.


@dataclasses.dataclass(frozen=True)
class Source:
    """In Hugging Face's words."""

    config: Mapping[str, Any]
    names: Collection[str]
    read: Callable[[str], np.ndarray]  # One tensor, from disk.
    said: Mapping[str, Any]  # All that the file says of itself, in its own words.
