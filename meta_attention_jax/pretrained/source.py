"""What a published model is on disk, whatever the format: a config, tensors by name, a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

ROUTING = "routing.safetensors"  # Beside the weights of a model: those of its routers, which are none of its own.


@dataclasses.dataclass(frozen=True)
class Source:
    """In Hugging Face's words."""

    config: Mapping[str, Any]
    names: Collection[str]
    read: Callable[[str], np.ndarray]  # One tensor, from disk.
    said: Mapping[str, Any]  # All that the file says of itself, in its own words.
