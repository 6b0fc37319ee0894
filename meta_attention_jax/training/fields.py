"""Types and sizes of a config's fields: what neither a ConfigDict nor JSON makes sure of.

A field that none of the lists below has is not checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

SECTIONS = (
    "data", "model", "controller", "prior", "objective", "gate", "optimizer", "train", "parallel",
)
TEXTS = (
    "name", "data.corpus", "data.split", "data.tokenizer", "model.implementation", "model.dtype",
    "controller.name", "controller.posterior", "controller.uncertainty", "prior.family",
    "prior.costs", "gate.kind", "optimizer.name", "train.init_from", "parallel.mode",
)
SWITCHES = ("model.scan_layers", "model.remat", "train.packed")
NAMES = ("model.mechanisms", "controller.fixed")
WHOLE = (
    "seed", "data.vocab_size", "data.sequence_length", "data.batch_size", "data.seed",
    "data.num_keys", "data.num_values", "data.num_pairs", "data.min_distance", "data.num_marks",
    "model.model_dim", "model.num_layers", "model.num_heads", "model.num_kv_heads",
    "model.mlp_dim", "model.window", "controller.hidden", "optimizer.accumulate", "train.steps",
    "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every",
    "train.keep_latest", "train.profile_step", "parallel.devices", "parallel.fsdp",
)
REAL = (
    "data.query_rate", "data.mark_rate", "data.mark_bias", "data.aggregate_rate",
    "controller.entropy_bonus", "controller.temperature", "controller.temperature_start",
    "prior.strength", "prior.preference", "objective.beta", "objective.beta_warmup", "gate.start",
    "gate.end", "gate.threshold", "optimizer.learning_rate", "optimizer.warmup",
    "optimizer.final_fraction", "optimizer.weight_decay", "optimizer.clip",
    "train.packed_dense_rows",
)

LATER = {
    "train.packed": False, "train.packed_dense_rows": 0.0, "train.init_from": "",
    "controller.entropy_bonus": 0.0, "controller.temperature": 1.0,
    "controller.temperature_start": 1.0, "data.query_rate": 0.25, "data.min_distance": 0,
    "data.num_marks": 0, "data.mark_rate": 0.0, "data.mark_bias": 0.5, "data.aggregate_rate": 0.0,
    "data.seed": -1, "data.split": "auto", "parallel.fsdp": 1,
}
"""Fields that runs of earlier versions do not have, with what those runs did; a new field belongs
here too, or no run from before it can be opened."""

SMALLEST, LARGEST = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
SYMBOLS = 2**20
LAYERS = 10_000


def expect(ok: bool, field: str, expected: str, got: Any) -> None:
    """Raises a ValueError of one sentence unless `ok`."""
    if not ok:
        raise ValueError(f"{field}: expected {expected}, got {got!r}.")


def completed(config: ConfigDict) -> ConfigDict:
    """A copy with the fields of `LATER` that are missing."""
    whole = config.copy_and_resolve_references()
    for field, value in LATER.items():
        section, name = field.split(".")
        if name not in whole[section]:
            whole[section][name] = value
    return whole


def check_types(config: ConfigDict) -> None:
    """Checks that every field is of its type, and a number one that the arrays of a run can hold.

    Raises:
      ValueError: one sentence with the field, what was expected, and what it got.
    """
    for section in SECTIONS:
        ok = isinstance(config[section], ConfigDict)
        expect(ok, section, "a section with its fields", config[section])

    def value(field: str) -> Any:
        section, _, name = field.rpartition(".")
        return config[section][name] if section else config[name]

    for field in TEXTS:
        text = value(field)
        expect(isinstance(text, str) and "\0" not in text, field, "text", text)
    for field in SWITCHES:
        expect(isinstance(value(field), bool), field, "True or False", value(field))
    for field in NAMES:
        names = value(field)
        ok = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
        expect(ok, field, "names of mechanisms", names)
    for field in WHOLE:
        number = value(field)
        ok = isinstance(number, int) and not isinstance(number, bool)
        expect(ok, field, "a whole number", number)
        # Of a seed, jax drops the bits that are too many.
        least, most = (0, 2**32) if field == "seed" else (-(2**31), 2**31)
        least = -1 if field == "data.seed" else least
        expect(least <= number < most, field, f"a whole number in [{least}, {most})", number)
    for field in REAL:
        number = value(field)
        ok = isinstance(number, (int, float)) and not isinstance(number, bool)
        expect(ok, field, "a number", number)
        ok = number == 0 or SMALLEST <= abs(number) <= LARGEST
        size = f"0 or a number of {SMALLEST:.1e} to {LARGEST:.1e} in size"
        expect(ok, field, size, number)


def check_sizes(config: ConfigDict) -> None:
    """Checks that no array of the run has 2^31 elements or more.

    Raises:
      ValueError: as `check_types`.
    """
    data, model = config.data, config.model
    tokens = data.batch_size * data.sequence_length
    expect(tokens < 2**31, "data.batch_size", "fewer than 2^31 tokens in a batch", data.batch_size)
    symbols = data.num_keys * data.num_values + 2 * data.num_marks
    expect(
        data.corpus != "recall" or symbols <= SYMBOLS,
        "data.num_keys",
        f"at most {SYMBOLS} pairs of a key and a value, twice the marks included",
        data.num_keys,
    )
    widest = max(model.model_dim, model.mlp_dim, 3 * model.model_dim, config.controller.hidden)
    expect(
        model.model_dim * widest < 2**31,
        "model.model_dim",
        "fewer than 2^31 weights in a matrix, the MLP's and the controller's included",
        model.model_dim,
    )
    expect(model.num_layers <= LAYERS, "model.num_layers", f"at most {LAYERS}", model.num_layers)
