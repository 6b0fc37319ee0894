"""Opening a run directory: config, data, model and parameters, from the directory alone."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Optional

from ml_collections import ConfigDict

from meta_attention_jax.data.pipeline import Dataset, write_manifest
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.training import build
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.config import dict_to_config, read_stored
from meta_attention_jax.training.state import Hypers


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
      ValueError: no run there, no such step, or data that are not those of the run.
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
    shape = config.copy_and_resolve_references()
    shape.data.sequence_length = sequence_length or config.data.sequence_length
    shape.data.batch_size = batch_size or config.data.batch_size
    # Costs are those of the length as trained, whatever is evaluated.
    hypers = build.build_hypers(config, path)
    dataset = build.build_dataset(shape, path)
    write_manifest(dataset, path)  # the same manifest again: no change, or a one-sentence error
    return Run(
        path=path,
        config=config,
        step=found,
        params=params,
        model=build.build_model(config, dataset.vocab_size),
        dataset=dataset,
        hypers=hypers,
    )
