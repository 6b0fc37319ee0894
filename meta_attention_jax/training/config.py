"""Reading, checking and comparing configs. Every mistake is one sentence."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from ml_collections import ConfigDict

from meta_attention_jax.controller.baselines import CONTROLLERS, WITH_POSTERIOR
from meta_attention_jax.controller.posterior import POSTERIORS
from meta_attention_jax.controller.prior import PRIORS
from meta_attention_jax.data.splits import RULES
from meta_attention_jax.data.tokenizer import TOKENIZERS
from meta_attention_jax.mechanisms.full import IMPLEMENTATIONS
from meta_attention_jax.mechanisms.registry import get_mechanism
from meta_attention_jax.training.fields import LATER, check_sizes, check_types, expect
from meta_attention_jax.training.parallel import PARALLEL_MODES
from meta_attention_jax.types import UNCERTAINTIES

DTYPES = ("float32", "bfloat16")


def validate(config: ConfigDict) -> None:
    """Checks every field that can be checked without reading data.

    Raises:
      ValueError: one sentence with the field, what was expected, and what it got.
    """
    check_types(config)
    data, model, train = config.data, config.model, config.train
    positive = {
        "data.sequence_length": data.sequence_length,
        "data.batch_size": data.batch_size,
        "data.vocab_size": data.vocab_size,
        "data.num_keys": data.num_keys,
        "data.num_values": data.num_values,
        "data.num_pairs": data.num_pairs,
        "model.model_dim": model.model_dim,
        "model.num_layers": model.num_layers,
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.window": model.window,
        "controller.hidden": config.controller.hidden,
        "parallel.fsdp": config.parallel.get("fsdp", 1),
        "controller.temperature": config.controller.temperature,
        "controller.temperature_start": config.controller.temperature_start,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.accumulate": config.optimizer.accumulate,
        "train.steps": train.steps,
        "train.log_every": train.log_every,
        "train.eval_every": train.eval_every,
        "train.eval_batches": train.eval_batches,
        "train.checkpoint_every": train.checkpoint_every,
        "train.keep_latest": train.keep_latest,
    }
    for field, value in positive.items():
        expect(0 < value < math.inf, field, "a number > 0", value)
    expect(data.seed >= -1, "data.seed", "a number >= 0, or -1 for the run's seed", data.seed)
    not_negative = {
        "seed": config.seed,
        "model.mlp_dim": model.mlp_dim,
        "objective.beta": config.objective.beta,
        "controller.entropy_bonus": config.controller.entropy_bonus,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip": config.optimizer.clip,
        "parallel.devices": config.parallel.devices,
    }
    for field, value in not_negative.items():
        expect(0 <= value < math.inf, field, "a number >= 0", value)
    shares = {
        "objective.beta_warmup": config.objective.beta_warmup,
        "gate.start": config.gate.start,
        "gate.end": config.gate.end,
        "optimizer.warmup": config.optimizer.warmup,
        "optimizer.final_fraction": config.optimizer.final_fraction,
        "train.packed_dense_rows": train.packed_dense_rows,
    }
    for field, value in shares.items():
        expect(0 <= value <= 1, field, "a share in [0, 1]", value)
    expect(
        0 <= config.gate.threshold <= 1, "gate.threshold", "theta in [0, 1]", config.gate.threshold
    )
    expect(
        model.model_dim % (2 * model.num_heads) == 0,
        "model.num_heads",
        f"a divisor of model_dim = {model.model_dim} with an even head width",
        model.num_heads,
    )
    expect(
        model.num_heads % model.num_kv_heads == 0,
        "model.num_kv_heads",
        f"a divisor of num_heads = {model.num_heads}",
        model.num_kv_heads,
    )
    check_sizes(config)
    choices = {
        "data.split": (data.split, RULES),
        "data.tokenizer": (data.tokenizer, TOKENIZERS),
        "model.dtype": (model.dtype, DTYPES),
        "model.implementation": (model.implementation, IMPLEMENTATIONS),
        "controller.name": (config.controller.name, tuple(CONTROLLERS)),
        "controller.posterior": (config.controller.posterior, POSTERIORS),
        "controller.uncertainty": (config.controller.uncertainty, UNCERTAINTIES),
        "prior.family": (config.prior.family, PRIORS),
        "optimizer.name": (config.optimizer.name, ("adamw", "sgd")),
        "parallel.mode": (config.parallel.mode, PARALLEL_MODES),
    }
    for field, (value, known) in choices.items():
        expect(value in known, field, f"one of {known}", value)
    mechanisms = tuple(model.mechanisms)
    expect(
        len(mechanisms) > 1 and len(set(mechanisms)) == len(mechanisms),
        "model.mechanisms",
        "two or more distinct names",
        mechanisms,
    )
    for name in mechanisms:
        try:
            get_mechanism(name)
        except ValueError as error:
            raise ValueError(f"model.mechanisms: {error}") from None
    for name in config.controller.fixed:
        expect(name in mechanisms, "controller.fixed", f"mechanisms among {mechanisms}", name)
    expect(len(config.controller.fixed) > 0, "controller.fixed", "at least one mechanism", ())
    if model.scan_layers and config.controller.name == "fixed":
        layers = {config.controller.fixed[i % len(config.controller.fixed)]
                  for i in range(model.num_layers)}
        expect(
            len(layers) == 1, "model.scan_layers", "False with a pattern of several mechanisms", True
        )
    expect(
        -1 <= train.profile_step < train.steps,
        "train.profile_step",
        f"-1 or a step below train.steps = {train.steps}",
        train.profile_step,
    )
    if train.packed:
        expect(
            round(config.gate.end * train.steps) < train.steps,
            "train.packed",
            "False unless gate.end leaves steps after it",
            True,
        )
        expect(
            config.gate.kind in ("linear", "cosine") and config.gate.threshold == 1.0,
            "train.packed",
            "False unless gate.kind is 'linear' or 'cosine' and gate.threshold 1, which make every "
            "token hard at a known step",
            True,
        )
        expect(
            config.controller.name != "fixed",
            "train.packed",
            "False with a fixed controller, which runs one mechanism as it is",
            True,
        )
    if config.controller.name not in WITH_POSTERIOR:
        expect(
            config.controller.uncertainty == "entropy",
            "controller.uncertainty",
            f"'entropy', the only measure without a Dirichlet (controller.name = "
            f"{config.controller.name!r})",
            config.controller.uncertainty,
        )


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested dict, tuples as lists: what JSON holds."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, (tuple, list)) else value

    return plain(config.to_dict())


def read_stored(path: pathlib.Path, what: str = "a config") -> dict[str, Any]:
    """The plain config in a run's `config.json`, or `what` else is a JSON object in a file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):  # JSON of 100,000 brackets is too deep.
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"workdir: expected {what} in {str(path)!r}, got something else.")
    return stored


def dict_to_config(values: dict[str, Any]) -> ConfigDict:
    """Inverse of `config_to_dict`."""
    def rich(value):
        if isinstance(value, dict):
            return {k: rich(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(rich(values))


def config_difference(
    stored: dict[str, Any], given: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(dotted field, stored value, given value) wherever two plain configs differ; a field of `LATER`
    that one of them lacks has the value there."""
    def flat(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    left, right = dict(flat(stored)), dict(flat(given))

    def both(field):
        missing = LATER.get(field.removeprefix("config."))  # As what shares a config has it.
        return left.get(field, missing), right.get(field, missing)

    fields = sorted(left.keys() | right.keys())
    return [(field, *both(field)) for field in fields if both(field)[0] != both(field)[1]]
