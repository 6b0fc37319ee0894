"""Configs and parameters out of run directories."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from meta_attention_jax.config import dict_to_config, read_config
from meta_attention_jax.data.tokenizer import Tokenizer, load_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, run_directory
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.training import export
from meta_attention_jax.training.backbone import merge
from meta_attention_jax.training.checkpoint import Checkpoints, Damaged
from meta_attention_jax.types import RoutingHypers

ATTEMPTS = 10  # Times that the checkpoints of a run that trains meanwhile are looked at anew.


def read_run(workdir: str | os.PathLike[str], step: int | str) -> tuple[ConfigDict, int, tuple[int, ...], Any]:
    """(config, step, all saved steps, parameters on this process's first device) of a run."""
    path = run_directory("workdir", workdir)
    if export.is_export(path):
        config, found, params = export.read(path)
        expect(step in ("latest", "best", found), "step", f"{found}, the one that was exported", step)
        return config, found, (found,), jax.device_put(params, jax.local_devices()[0])
    stored = path / "config.json"
    if not stored.is_file():
        raise ValueError(f"workdir: expected a run directory with config.json, got {str(workdir)!r}.")
    config = dict_to_config(read_config(stored))
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"workdir: expected checkpoints in {str(workdir)!r}, got none.")
    return config, *_read(path / "checkpoints", step)


def _read(directory: Place, step: int | str) -> tuple[int, tuple[int, ...], Any]:
    """(step, all saved steps, parameters), also of a run that is being trained. What trains it deletes old checkpoints,
    and may do so between the look at the list and the end of the reading; then it is looked at anew. Only what stays
    where it is and cannot be read is Damaged."""
    for attempt in range(ATTEMPTS):
        before = _listed(directory)
        try:
            checkpoints = Checkpoints(directory, read_only=True)
            try:
                found, steps = checkpoints.resolve(step), checkpoints.steps
                return found, steps, checkpoints.restore_params(found)
            finally:
                checkpoints.close()
        except (ValueError, OSError) as error:
            if attempt == ATTEMPTS - 1 or not _changes(directory, before):
                if isinstance(error, OSError):
                    raise Damaged(f"step: expected checkpoints that stay, got {error}.") from error
                raise
    raise AssertionError("unreachable")


def _listed(directory: Place) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _changes(directory: Place, before: set[str]) -> bool:
    """Whether the list of checkpoints differs from `before`, or does so in a moment: a checkpoint that is being deleted
    loses its files first."""
    for _ in range(20):
        if _listed(directory) != before:
            return True
        time.sleep(0.05)
    return False


def initial_params(
    source: str | os.PathLike[str], model: LanguageModel, tokenizer: Tokenizer, frozen: Optional[Any] = None
) -> Any:
    """The newest parameters of the run in `source`, for another run of the same model to start from; adapters may be
    missing."""
    path = run_directory("train.init_from", source)
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise ValueError(f"train.init_from: expected a run directory with checkpoints, got {str(source)!r}.")
    try:
        _, _, params = _read(path / "checkpoints", "latest")
        if not any("adapter" in name for name in flatten_dict(params)):  # They then begin as nothing.
            model = model.clone(config=dataclasses.replace(model.config, adapter_rank=0))
        check_params(merge(frozen, params), model)
        _check_tokens(load_tokenizer(path), tokenizer)
    except ValueError as error:
        raise ValueError(f"train.init_from: {str(source)!r}: {error}") from None
    return params


def _check_tokens(theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raises ValueError unless every id stands for the same bytes."""
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(f"expected {ours.vocab_size} tokens, got {theirs.vocab_size}.")
    for token in range(ours.vocab_size):
        got, wanted = theirs.decode([token]), ours.decode([token])
        if got != wanted:
            raise ValueError(f"expected token {token} to be {wanted!r}, got {got!r}.")


def check_params(params: Any, model: LanguageModel) -> None:
    """Raises ValueError of one sentence unless these are parameters of the model."""
    tokens, one = jnp.zeros((1, 2), jnp.int32), jnp.float32(1.0)
    hypers = RoutingHypers(
        strength=one, preference=one, costs=jnp.ones(len(model.config.router.mechanisms)), threshold=one
    )
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, hypers=hypers)["params"])

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}

    wanted, got = shapes(wanted), shapes(params)
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"expected parameters of the config's model, {name} of shape {wanted.get(name)}, got {got.get(name)}."
            )
