"""Opening a run directory anywhere, from the directory alone. Whatever trained it, one device is enough."""

from __future__ import annotations

import os
from typing import Optional

from ml_collections import ConfigDict

from meta_attention_jax.controller.prior import validate_prior
from meta_attention_jax.data.tokenizer import load_tokenizer
from meta_attention_jax.fields import expect, plain, whole
from meta_attention_jax.files import Place, run_directory
from meta_attention_jax.run import Run
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training import backbone as published
from meta_attention_jax.training import build, export
from meta_attention_jax.training.restore import check_params, read_run
from meta_attention_jax.training.rules import validate


def _check_config(config: ConfigDict, path: Place) -> None:
    """Checks a config as it is stored: somebody may have edited it."""
    try:
        validate(config)
        validate_prior(strength=config.prior.strength, preference=config.prior.preference)
    except ValueError as error:
        place = repr(str(path / "config.json"))
        lacks = str(error).removeprefix("config: expected a value of the field ")
        if lacks != str(error):
            raise ValueError(f"workdir: expected a complete config in {place}, with {lacks}") from None
        raise ValueError(f"workdir: {place}: {error}") from None


def _size(name: str, given: Optional[int]) -> Optional[int]:
    if given is None:
        return None
    size = whole(name, given)
    expect(size > 0, name, "a number > 0", size)
    return size


@without_mesh
def load_run(
    path: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    sequence_length: Optional[int] = None,
    batch_size: Optional[int] = None,
    corpus: Optional[str] = None,
    data_split: Optional[str] = None,
    backbone: Optional[str] = None,
) -> Run:
    """Opens the run in `path`; writes nothing. What is None is as trained.

    Args:
      step: "latest", "best" or a saved step.
      sequence_length, batch_size: of the data.
      corpus: where the data are now, if files have moved: "path:FILE_OR_FOLDER" or "tokens:FOLDER". They have to be
        the same, whatever they are called.
      data_split: `data.split`.
      backbone: where the published model is now that the run has routed, if it has moved; it has to be the same.

    Raises:
      ValueError: no run there, a config that is not complete, no such step, or parameters of another config.
    """
    path = run_directory("workdir", path)
    sequence_length, batch_size = _size("sequence_length", sequence_length), _size("batch_size", batch_size)
    config, found, steps, params = read_run(path, plain(step))
    _check_config(config, path)
    if corpus is not None:
        config.data.corpus = corpus
    if data_split is not None:
        config.data.split = data_split
    if backbone is not None:
        expect(config.retrofit.backbone, "backbone", "None for a run that has routed no published model", backbone)
        config.retrofit.backbone = backbone
    if config.retrofit.backbone:
        kept = export.described(path)["backbone"] if export.is_export(path) else published.stored(path)
        published.check_same(published.identity(config), kept)
        params = published.merge(published.load(config), params)
    asked_mode = export.described(path).get("mode") if export.is_export(path) else None
    length, rows = sequence_length or config.data.sequence_length, batch_size or config.data.batch_size
    expect(length * rows < 2**31, "sequence_length", "fewer than 2^31 tokens in a batch", sequence_length)
    if export.is_export(path):
        tokenizer = published.described(config)[1]
        expect(tokenizer is not None, "retrofit.backbone", "a model with its tokenizer.json", "one without")
    else:
        tokenizer = load_tokenizer(path)
    model = build.build_model(config, tokenizer.vocab_size)
    run = Run(
        path=path,
        config=config,
        step=found,
        steps=steps,
        params=params,
        model=model,
        tokenizer=tokenizer,
        # Costs are those of the length as trained, whatever is evaluated.
        hypers=build.build_hypers(config, path),
        sequence_length=length,
        batch_size=rows,
        asked_mode=asked_mode,
    )
    try:
        check_params(params, model)
    except ValueError as error:
        raise ValueError(f"workdir: {error}") from None
    return run
