"""From a config to the objects of a run: the only place that turns fields into things."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax.architecture import ModelConfig
from meta_attention_jax.controller.baselines import CONTROLLERS
from meta_attention_jax.controller.prior import validate_prior
from meta_attention_jax.cost import CostSetting, FlopCount, count_flops, resolve_costs
from meta_attention_jax.data.pipeline import Dataset, make_dataset
from meta_attention_jax.data.recall import RecallConfig
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import select
from meta_attention_jax.mechanisms.full import resolve_implementation
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.routing.gate import GateSchedule
from meta_attention_jax.sharding import FSDP
from meta_attention_jax.training import backbone, trackers
from meta_attention_jax.training.costs import freeze_costs, read_costs
from meta_attention_jax.training.parallel import Parallel, for_run
from meta_attention_jax.training.rules import final_threshold, validate
from meta_attention_jax.training.step import Hypers, Schedule, StepSpec, make_optimizer, train_step
from meta_attention_jax.types import AttentionSpec, Router, RoutingHypers

PADDED = "padded"
"""Of the segments of the batches of `data.pipeline`: a window lies within one document, and padding behind it."""


def check(config: ConfigDict) -> None:
    """Everything that can be said against a config without reading data. Sizes of a published model are filled in."""
    backbone.complete(config)
    if config.retrofit.backbone and (most := backbone.described(config)[0].context) is not None:
        length = config.data.sequence_length
        expect(length <= most, "data.sequence_length", f"at most the model's context of {most}", length)
    validate_without_devices(config)
    trackers.check(config.train.trackers)
    build_parallel(config)
    try:
        full_attention(config)
        packed_kernel(config)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def validate_without_devices(config: ConfigDict) -> None:
    """`check`, but for the devices that are here."""
    validate(config)
    # Measured costs come last, once there is a directory to freeze them in; any numbers do here.
    measured = config.prior.costs == "measured"
    costs = np.ones(len(config.model.mechanisms)) if measured else build_costs(config)
    try:
        validate_prior(strength=config.prior.strength, preference=config.prior.preference, costs=costs)
    except ValueError as error:
        raise ValueError(f"prior.{error}") from None
    build_schedule(config)


def full_attention(config: ConfigDict) -> str:
    """The implementation of full attention that the config's model uses here."""
    return resolve_implementation(
        config.model.implementation, time=config.data.sequence_length, dtype=config.model.dtype,
        head_dim=head_dim(config), segments=PADDED, softcap=published_spec(config).softcap,
    )


def packed_kernel(config: ConfigDict) -> str:
    """The kernel of packed attention that the config's model uses here."""
    shape = (1, config.data.sequence_length, 1, head_dim(config))
    return select.packed(config.model.kernel, shape, config.model.dtype).name


def head_dim(config: ConfigDict) -> int:
    """d."""
    if config.retrofit.backbone:
        return backbone.described(config)[0].head_dim
    return config.model.model_dim // config.model.num_heads


def build_costs(
    config: ConfigDict, workdir: Optional[str | os.PathLike[str]] = None, *, measure: bool = False
) -> np.ndarray:
    """c on the config's mechanism axis, largest 1. Measured costs are frozen in the run's `workdir`, None refuses them;
    `measure` makes them if they are not there yet, instead of an error."""
    text = config.prior.costs
    if text == "measured" and workdir is not None:
        setting = build_cost_setting(config)
        if not measure:
            return read_costs(workdir, setting)
        devices = len(build_parallel(config).devices)
        share = config.data.batch_size // (devices * config.optimizer.accumulate)
        return freeze_costs(workdir, setting, batch=share)
    try:
        costs = text if text.isalpha() else [float(part) for part in text.split(",")]
        return resolve_costs(
            costs, tuple(config.model.mechanisms), time=config.data.sequence_length,
            dim=head_dim(config), spec=build_attention(config),
        )
    except ValueError as error:
        if "expected" in str(error):
            raise ValueError(f"prior.{error}") from None
        kinds = "'nominal', 'analytic', 'measured' or numbers like '1,0.15,0.3'"
        raise ValueError(f"prior.costs: expected {kinds}, got {text!r}.") from None


def build_cost_setting(config: ConfigDict) -> CostSetting:
    """What measured costs of this config hold for."""
    model = config.model
    return CostSetting(
        mechanisms=tuple(model.mechanisms), time=config.data.sequence_length, window=model.window,
        num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=head_dim(config),
        dtype=model.dtype, implementation=model.implementation, segments=PADDED, sinks=model.sinks,
        kernel=model.kernel,
    )


def build_schedule(config: ConfigDict) -> Schedule:
    """Shapes in time; shares of the run become steps."""
    steps = config.train.steps
    gate = GateSchedule(
        kind=config.gate.kind, start=round(config.gate.start * steps), end=round(config.gate.end * steps),
        measure=config.controller.uncertainty,
    )
    gate.validate()
    return Schedule(
        total_steps=steps, warmup_steps=round(config.optimizer.warmup * steps),
        final_fraction=config.optimizer.final_fraction, beta_warmup_steps=round(config.objective.beta_warmup * steps),
        gate=gate, temperature_ratio=config.controller.temperature_start / config.controller.temperature,
    )


def build_parallel(config: ConfigDict) -> Parallel:
    """The devices of the run."""
    available = for_run()
    wanted = config.parallel.devices or len(available)
    expect(wanted <= len(available), "parallel.devices", f"at most {len(available)} here", wanted)
    expect(wanted == len(available) or jax.process_count() == 1, "parallel.devices",
           f"0 or {len(available)}, all of them, with several processes", wanted)
    return check_parallel(config, available[:wanted])


def check_parallel(config: ConfigDict, devices: Sequence[jax.Device]) -> Parallel:
    """These devices, as the config wants them used."""
    fsdp = config.parallel.fsdp
    parallel = Parallel(config.parallel.mode, devices, fsdp)
    split = {
        "model.model_dim": config.model.model_dim,
        # Not there, a controller has nothing to split.
        "controller.hidden": fsdp if config.controller.name == "fixed" else config.controller.hidden,
    }
    for field, width in split.items():
        expect(width % fsdp == 0, field, f"a multiple of parallel.fsdp = {fsdp}", width)
    parallel.check_batch(config.data.batch_size, config.optimizer.accumulate)
    return parallel


def data_seed(config: ConfigDict) -> int:
    """Seed of the order of the training data: `data.seed`, or the run's where that is -1."""
    return config.seed if config.data.seed < 0 else config.data.seed


def build_dataset(config: ConfigDict, tokenizer_dir: Any = None, rows: Optional[np.ndarray] = None) -> Dataset:
    """The corpus, split and tokenised; `rows` of every batch are this process's, None for all."""
    data, tokenizer = config.data, config.data.tokenizer
    if config.retrofit.backbone:
        tokenizer = backbone.described(config)[1]
        expect(tokenizer is not None, "retrofit.backbone", "a model with its tokenizer.json", "one without")
    recall, window, distance = None, config.model.window, data.min_distance
    if data.corpus == "recall":
        own = {field.name: data[field.name] for field in dataclasses.fields(RecallConfig) if field.name in data}
        recall = RecallConfig(**{**own, "min_distance": distance or max(window, 2)})
        window, distance = 2, 0  # It is said already, and may be less than the window.
    return make_dataset(
        corpus=data.corpus, tokenizer=tokenizer,
        vocab_size=data.vocab_size if data.tokenizer == "bpe" else None, sequence_length=data.sequence_length,
        batch_size=data.batch_size, seed=data_seed(config), recall=recall, tasks=data.tasks, shares=data.shares,
        needles=data.needles, min_distance=distance, window=window, tokenizer_dir=tokenizer_dir,
        rows=slice(None) if rows is None else rows, split=data.split, order=data.order,
    )


def build_attention(config: ConfigDict, segments: str = "any") -> AttentionSpec:
    """Who may attend to whom. An implementation that was chosen for the run's own batches gives way to "auto" where it
    cannot serve the segments; so does a kernel where a run that has one is opened on what cannot run it."""
    model = config.model
    chosen, kernel = model.implementation, model.kernel
    if kernel == "pallas" and segments == "any":
        try:
            packed_kernel(config)
        except ValueError:
            kernel = "auto"
    if chosen == "cudnn" and segments == "any":
        chosen = "auto"
    return dataclasses.replace(
        published_spec(config), window=model.window, sinks=model.sinks, implementation=chosen, segments=segments,
        kernel=kernel,
    )


def published_spec(config: ConfigDict) -> AttentionSpec:
    """What a published model says of its full attention; nothing, without one."""
    return backbone.described(config)[0].attention if config.retrofit.backbone else AttentionSpec()


def build_model(config: ConfigDict, vocab_size: int, segments: str = "any") -> LanguageModel:
    """The language model, in soft mode; `model.clone(mode="hard")` is the same one, hard. `segments`: what is known of
    the batches that it will see, as `AttentionSpec.segments`."""
    model, controller = config.model, config.controller
    router = Router(
        mechanisms=model.mechanisms, controller=controller.name, hidden=controller.hidden,
        prior=config.prior.family, posterior=controller.posterior, network=controller.network,
        uncertainty=controller.uncertainty, fallback=config.gate.fallback, fixed=controller.fixed,
    )
    run = dict(
        attention=build_attention(config, segments), router=router, remat=model.remat, dtype=jnp.dtype(model.dtype)
    )
    if config.retrofit.backbone:
        run["adapter_rank"] = config.retrofit.lora_rank
        return LanguageModel(dataclasses.replace(backbone.described(config)[0], **run))
    return LanguageModel(
        ModelConfig(
            vocab_size=vocab_size, model_dim=model.model_dim, num_layers=model.num_layers, num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads, mlp_dim=model.mlp_dim or None, scan_layers=model.scan_layers, **run,
        )
    )


def build_hypers(
    config: ConfigDict, workdir: Optional[str | os.PathLike[str]] = None, *, measure: bool = False
) -> Hypers:
    """The arrays that a sweep may vary; `workdir` and `measure` as in `build_costs`."""
    return Hypers(
        gate=build_schedule(config).gate.times, learning_rate=jnp.float32(config.optimizer.learning_rate),
        beta=jnp.float32(config.objective.beta),
        routing=RoutingHypers(
            strength=jnp.float32(config.prior.strength), preference=jnp.float32(config.prior.preference),
            costs=jnp.asarray(build_costs(config, workdir, measure=measure)),
            threshold=jnp.float32(final_threshold(config)), price=jnp.float32(config.gate.price),
            entropy_bonus=jnp.float32(config.controller.entropy_bonus),
            temperature=jnp.float32(config.controller.temperature),
        ),
    )


def build_spec(config: ConfigDict, dataset: Dataset) -> StepSpec:
    """The static side of the training step."""
    return spec_for(config, dataset.vocab_size, dataset.num_kinds)


def spec_for(config: ConfigDict, vocab_size: int, num_kinds: int) -> StepSpec:
    """`build_spec` without the data."""
    optimizer = config.optimizer
    shard_axis = FSDP if config.parallel.fsdp > 1 else None
    # Every layer is compared with full attention on all tokens.
    stage = dict(by_layer=True, dispatch="dense") if config.retrofit.stage == "local" else {}
    return StepSpec(
        model=build_model(config, vocab_size, PADDED).clone(shard_axis=shard_axis, **stage),
        optimizer=make_optimizer(optimizer.name, weight_decay=optimizer.weight_decay, clip=optimizer.clip),
        schedule=build_schedule(config), num_kinds=num_kinds, accumulate=optimizer.accumulate,
        frozen=bool(config.retrofit.backbone), loss=config.retrofit.loss, tolerance=config.retrofit.tolerance,
    )


def packed_spec(config: ConfigDict, spec: StepSpec) -> StepSpec:
    """The step once every token is hard."""
    return dataclasses.replace(spec, packed=True, dense_rows=config.train.packed_dense_rows)


def compile_step(parallel: Parallel, spec: StepSpec) -> Any:
    """(state, batch, hypers, frozen) -> (state, metrics) over the devices, `frozen` None or left out without a
    published model; the old state is given up."""
    return parallel.compile(functools.partial(train_step, spec), batch_argument=1, state_argument=0, donate=(0,))


def build_flops(config: ConfigDict, vocab_size: int) -> FlopCount:
    """Forward FLOPs per token of this config's model at its sequence length."""
    return count_flops(
        build_model(config, vocab_size).config, time=config.data.sequence_length,
        controller_outputs=controller_outputs(config),
    )


def controller_outputs(config: ConfigDict) -> int:
    """Numbers that a controller's network gives for a token; 0 of one that decides nothing."""
    outputs = 0 if config.controller.name == "fixed" else len(config.model.mechanisms)
    if CONTROLLERS[config.controller.name].has_posterior:
        outputs += config.controller.posterior == "mean_strength"
    return outputs


def soft_flops(config: ConfigDict, flops: FlopCount) -> float:
    """Forward FLOPs per token of a soft step: all mechanisms, or the fixed one of each layer."""
    if config.controller.name != "fixed":
        return flops.dense
    pattern, layers = config.controller.fixed, config.model.num_layers
    ran = [pattern[i % len(pattern)] for i in range(layers)]
    return flops.routed({name: ran.count(name) / layers for name in set(ran)})
