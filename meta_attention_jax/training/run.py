"""Opening a run directory: config, data, model and parameters, from the directory alone."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Optional

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from meta_attention_jax.data.pipeline import Dataset, write_manifest
from meta_attention_jax.data.tokenizer import Tokenizer, load_tokenizer
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.config import dict_to_config, read_stored
from meta_attention_jax.training.state import Hypers
from meta_attention_jax.types import RoutingHypers


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model and everything around it.

    Attributes:
      path: the run directory.
      config: as trained.
      step: of the parameters.
      params: on this process's first device.
      model: in soft mode.
      dataset: the run's corpus, possibly at another sequence length.
      hypers: of the config.
    """

    path: pathlib.Path
    config: ConfigDict
    step: int
    params: Any
    model: LanguageModel
    dataset: Dataset
    hypers: Hypers


def open_run(
    workdir: str | pathlib.Path,
    *,
    step: int | str = "latest",
    sequence_length: Optional[int] = None,
    batch_size: Optional[int] = None,
) -> Run:
    """Opens the run in `workdir`; writes nothing.

    Args:
      workdir: a run directory.
      step: "latest", "best" or a saved step.
      sequence_length: of the data; None is as trained.
      batch_size: of the data; None is as trained.

    Raises:
      ValueError: no run there, a config that is not complete, no such step, or parameters or data
        that are not those of the config.
    """
    path = pathlib.Path(workdir).absolute()
    stored = path / "config.json"
    if not stored.is_file():
        raise ValueError(
            f"workdir: expected a run directory with config.json, got {str(workdir)!r}."
        )
    config = dict_to_config(read_stored(stored))
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"workdir: expected checkpoints in {str(workdir)!r}, got none.")
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    try:
        found = checkpoints.resolve(step)
        params = checkpoints.restore_params(found)
    finally:
        checkpoints.close()
    try:
        shape = config.copy_and_resolve_references()
        shape.data.sequence_length = sequence_length or config.data.sequence_length
        shape.data.batch_size = batch_size or config.data.batch_size
        # Costs are those of the length as trained, whatever is evaluated.
        hypers = build.build_hypers(config, path)
        dataset = build.build_dataset(shape, path)
        model = build.build_model(config, dataset.vocab_size)
    except (AttributeError, KeyError) as error:  # What a ConfigDict raises for a missing field.
        raise ValueError(
            f"workdir: expected a complete config in {str(stored)!r}, got none of "
            f"{str(error).splitlines()[0]}."
        ) from None
    write_manifest(dataset, path)  # the same manifest again: no change, or a one-sentence error
    try:
        _check_params(params, model)
    except ValueError as error:
        raise ValueError(f"workdir: {error}") from None
    return Run(
        path=path,
        config=config,
        step=found,
        params=params,
        model=model,
        dataset=dataset,
        hypers=hypers,
    )


def initial_params(
    source: str | pathlib.Path, model: LanguageModel, tokenizer: Tokenizer
) -> Any:
    """The newest parameters of the run in `source`, for another run of the same model to start from.

    Raises:
      ValueError: no run there, parameters of another model, or tokens that mean something else.
    """
    path = pathlib.Path(source).absolute()
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise ValueError(
            f"train.init_from: expected a run directory with checkpoints, got {str(source)!r}."
        )
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    try:
        params = checkpoints.restore_params(checkpoints.resolve("latest"))
        _check_params(params, model)
        _check_tokens(load_tokenizer(path), tokenizer)
    except ValueError as error:
        raise ValueError(f"train.init_from: {str(source)!r}: {error}") from None
    finally:
        checkpoints.close()
    return params


def _check_tokens(theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raises ValueError unless every id stands for the same bytes."""
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(f"expected {ours.vocab_size} tokens, got {theirs.vocab_size}.")
    for token in range(ours.vocab_size):
        got, wanted = theirs.decode([token]), ours.decode([token])
        if got != wanted:
            raise ValueError(f"expected token {token} to be {wanted!r}, got {got!r}.")


def _check_params(params: Any, model: LanguageModel) -> None:
    """Raises ValueError of one sentence unless these are parameters of the model."""
    tokens, one = jnp.zeros((1, 2), jnp.int32), jnp.float32(1.0)
    hypers = RoutingHypers(
        strength=one, preference=one, costs=jnp.ones(len(model.mechanisms)), threshold=one
    )
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, hypers=hypers)["params"])

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}

    wanted, got = shapes(wanted), shapes(params)
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"expected parameters of the config's model, {name} of shape {wanted.get(name)}, "
                f"got {got.get(name)}."
            )
