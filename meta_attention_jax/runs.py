"""Opening a run directory anywhere, from the directory alone.

    run = load_run("runs/recall")
    run.evaluate("test")            and all else that a `Run` answers

Whatever trained it, one device is enough.
"""

from __future__ import annotations

import pathlib
from typing import Optional

from ml_collections import ConfigDict

from meta_attention_jax.controller.prior import validate_prior
from meta_attention_jax.data.tokenizer import load_tokenizer
from meta_attention_jax.fields import expect, plain, whole
from meta_attention_jax.files import run_directory
from meta_attention_jax.run import Run
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training import build
from meta_attention_jax.training.restore import check_params, read_run
from meta_attention_jax.training.rules import validate


def _check_config(config: ConfigDict, path: pathlib.Path) -> None:
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


@without_mesh
def load_run(
    path: str | pathlib.Path,
    *,
    step: int | str = "latest",
    sequence_length: Optional[int] = None,
    batch_size: Optional[int] = None,
    corpus: Optional[str] = None,
    data_split: Optional[str] = None,
) -> Run:
    """Opens the run in `path`; writes nothing.

    Args:
      path: a run directory.
      step: "latest", "best" or a saved step.
      sequence_length: of the data; None is as trained.
      batch_size: of the data; None is as trained.
      corpus: where the data are now, if files have moved: "path:FILE_OR_FOLDER"; None is as trained.
      data_split: `data.split`; None is as trained. The data have to be the same, whatever they are
        called.

    Raises:
      ValueError: no run there, a config that is not complete, no such step, or parameters that are
        not those of the config; one sentence.
    """
    path = run_directory("workdir", path)
    if sequence_length is not None:
        sequence_length = whole("sequence_length", sequence_length)
        expect(sequence_length > 0, "sequence_length", "a number > 0", sequence_length)
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size)
        expect(batch_size > 0, "batch_size", "a number > 0", batch_size)
    config, found, steps, params = read_run(path, plain(step))
    _check_config(config, path)
    if corpus is not None:
        config.data.corpus = corpus
    if data_split is not None:
        config.data.split = data_split
    tokens = (sequence_length or config.data.sequence_length) * (batch_size or config.data.batch_size)
    fewer = "fewer than 2^31 tokens in a batch"
    expect(tokens < 2**31, "sequence_length", fewer, sequence_length)
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
        sequence_length=sequence_length or config.data.sequence_length,
        batch_size=batch_size or config.data.batch_size,
    )
    try:
        check_params(params, model)
    except ValueError as error:
        raise ValueError(f"workdir: {error}") from None
    return run
