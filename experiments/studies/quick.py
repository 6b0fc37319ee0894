"""A run for notebooks: one that is there already, or a small one."""

from __future__ import annotations

import pathlib
from typing import Any, Optional

from configs import quick
from meta_attention_jax.files import local
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train


def quick_run(workdir: str | pathlib.Path, existing: Optional[str | pathlib.Path] = None, **overrides: Any) -> Run:
    """Opens `existing` (such as a run of `make demo`) if it is a run, else the run in `workdir`, trained first
    if it is not finished: `configs/quick.py` with `overrides` of dotted fields."""
    if existing is not None and (local("existing", existing) / "checkpoints").is_dir():
        return load_run(existing)
    config = quick.get_config()
    config.update_from_flattened_dict(overrides)
    train(prepare(config, workdir))
    return load_run(workdir)
