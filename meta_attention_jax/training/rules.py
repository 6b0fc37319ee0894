"""What the fields of a config have to be to each other. Every mistake is one sentence."""

from __future__ import annotations

from ml_collections import ConfigDict

from meta_attention_jax.config import check_fields
from meta_attention_jax.controller.baselines import measures_of
from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.fields import expect
from meta_attention_jax.mechanisms.registry import get_mechanism
from meta_attention_jax.routing.gate import threshold_of_nats

SYMBOLS = 2**20
LAYERS = 10_000


def validate(config: ConfigDict) -> None:
    """Checks every field that can be checked without reading data; fills in what `check_fields` does."""
    check_fields(config)
    model, train = config.model, config.train
    if not config.retrofit.backbone:
        expect(model.model_dim % (2 * model.num_heads) == 0, "model.num_heads",
               f"a divisor of model_dim = {model.model_dim} with an even head width", model.num_heads)
        expect(model.num_heads % model.num_kv_heads == 0, "model.num_kv_heads",
               f"a divisor of num_heads = {model.num_heads}", model.num_kv_heads)
    check_sizes(config)
    mechanisms = tuple(model.mechanisms)
    expect(len(mechanisms) > 1 and len(set(mechanisms)) == len(mechanisms), "model.mechanisms",
           "two or more distinct names", mechanisms)
    for name in mechanisms:
        try:
            get_mechanism(name)
        except ValueError as error:
            raise ValueError(f"model.mechanisms: {error}") from None
    final_threshold(config)
    expect(config.gate.fallback == "soft" or "full" in mechanisms, "gate.fallback",
           f"'soft' without full attention among {mechanisms}", config.gate.fallback)
    for name in config.controller.fixed:
        expect(name in mechanisms, "controller.fixed", f"mechanisms among {mechanisms}", name)
    expect(len(config.controller.fixed) > 0, "controller.fixed", "at least one mechanism", ())
    if model.scan_layers and config.controller.name == "fixed":
        layers = {config.controller.fixed[i % len(config.controller.fixed)] for i in range(model.num_layers)}
        expect(len(layers) == 1, "model.scan_layers", "False with a pattern of several mechanisms", True)
    expect(-1 <= train.profile_step < train.steps, "train.profile_step",
           f"-1 or a step below train.steps = {train.steps}", train.profile_step)
    if train.packed:
        expect(round(config.gate.end * train.steps) < train.steps, "train.packed",
               "False unless gate.end leaves steps after it", True)
        expect(config.gate.kind in ("linear", "cosine") and final_threshold(config) == 1.0, "train.packed",
               "False unless gate.kind is 'linear' or 'cosine' and gate.threshold 1, which make every "
               "token hard at a known step", True)
        expect(config.controller.name != "fixed", "train.packed",
               "False with a fixed controller, which runs one mechanism as it is", True)
    check_retrofit(config)
    known = measures_of(config.controller.name)
    expect(config.controller.uncertainty in known, "controller.uncertainty",
           f"one of {known}, the measures with controller.name = {config.controller.name!r}",
           config.controller.uncertainty)


def check_retrofit(config: ConfigDict) -> None:
    """Checks what a published model asks for, and what asks for one."""
    retrofit, tokenizer = config.retrofit, config.data.tokenizer
    if retrofit.backbone:
        expect(tokenizer == "model", "data.tokenizer", "'model', the backbone's own", tokenizer)
        width = config.model.model_dim
        expect(retrofit.lora_rank <= width, "retrofit.lora_rank", f"at most D = {width}", retrofit.lora_rank)
    else:
        expect(tokenizer != "model", "data.tokenizer", "another than 'model' without retrofit.backbone", tokenizer)
        expected = "'end_to_end' without retrofit.backbone"
        expect(retrofit.stage == "end_to_end", "retrofit.stage", expected, retrofit.stage)
        expect(not retrofit.lora_rank, "retrofit.lora_rank", "0 without retrofit.backbone", retrofit.lora_rank)
        expect(retrofit.loss == "nll", "retrofit.loss", "'nll' without retrofit.backbone", retrofit.loss)
    learns = retrofit.lora_rank or config.train.packed_dense_rows
    expect(not retrofit.backbone or not config.train.packed or learns, "train.packed_dense_rows",
           "some rows that the controllers of a published model learn from", config.train.packed_dense_rows)
    if retrofit.stage == "local" or retrofit.loss == "kl":
        names = tuple(config.model.mechanisms)
        expect("full" in names, "model.mechanisms", "full attention among them, to be compared with", names)
        expect(not config.train.packed, "train.packed", "False for what is compared with full attention", True)
    if retrofit.stage == "local":
        name = config.controller.name
        expect(name != "fixed", "controller.name", "a controller that learns for retrofit.stage = 'local'", name)
        expect(not retrofit.lora_rank, "retrofit.lora_rank", "0 for retrofit.stage = 'local'", retrofit.lora_rank)


def final_threshold(config: ConfigDict) -> float:
    """The last theta of the gate, in [0, 1], whatever its unit."""
    gate, measure = config.gate, config.controller.uncertainty
    if gate.unit == "theta":
        expect(0 <= gate.threshold <= 1, "gate.threshold", "theta in [0, 1]", gate.threshold)
        return float(gate.threshold)
    expect(MEASURES[measure].log, "gate.unit", f"'theta' for controller.uncertainty = {measure!r}", "nats")
    try:
        return threshold_of_nats(gate.threshold, len(config.model.mechanisms))
    except ValueError as error:
        raise ValueError(f"gate.{error}") from None


def last_mode(config: ConfigDict) -> str:
    """The mode that training ends in: "soft" where the gate stays closed, "gated" where its last theta is below 1, else
    "hard". A `settled` gate is taken to have opened."""
    if config.gate.kind == "none":
        return "soft"
    return "gated" if final_threshold(config) < 1 else "hard"


def check_sizes(config: ConfigDict) -> None:
    """Checks that no array of the run has 2^31 elements or more."""
    data, model = config.data, config.model
    tokens = data.batch_size * data.sequence_length
    expect(tokens < 2**31, "data.batch_size", "fewer than 2^31 tokens in a batch", data.batch_size)
    symbols = data.num_keys * data.num_values + 2 * data.num_marks
    expect(data.corpus != "recall" or symbols <= SYMBOLS, "data.num_keys",
           f"at most {SYMBOLS} pairs of a key and a value, twice the marks included", data.num_keys)
    widest = max(model.model_dim, model.mlp_dim, 3 * model.model_dim, config.controller.hidden)
    expect(model.model_dim * widest < 2**31, "model.model_dim",
           "fewer than 2^31 weights in a matrix, the MLP's and the controller's included", model.model_dim)
    expect(model.num_layers <= LAYERS, "model.num_layers", f"at most {LAYERS}", model.num_layers)
