"""The training step, a pure function of arrays, with its state, schedules and optimizer.

Inside a mesh or pmap it runs per device on that device's rows: every device sums over its own tokens, one psum at the
end adds the sums, and only then is anything divided by the global number of tokens. Gradients are therefore those of
the whole batch however uneven its shards are, and no collective stands inside a loop, but for the parameters of scanned
layers where a model's `shard_axis` splits them (see `sharding`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

from meta_attention_jax.controller.uncertainty import MEASURES
from meta_attention_jax.model import Output
from meta_attention_jax.objective import (
    Sums,
    apply_sums,
    distance_to,
    forward,
    layers_fit,
    loss_sums,
    objective,
)
from meta_attention_jax.routing import gate
from meta_attention_jax.routing.gate import GateState, GateTimes
from meta_attention_jax.sharding import global_norm, sum_gradients
from meta_attention_jax.training.backbone import merge, trained
from meta_attention_jax.types import Batch, RoutingHypers, Scalar


@flax.struct.dataclass
class Hypers:
    """Hyper-parameters that a sweep varies: array inputs of the step, never compiled in."""

    learning_rate: Scalar  # Peak of the warm-up cosine schedule.
    beta: Scalar  # Final weight of the KL, per nat.
    routing: RoutingHypers  # kappa, eta, c, and the *final* threshold theta of the gate.
    gate: Optional[GateTimes] = None  # When the gate moves; None leaves it to the schedule.


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs besides its config."""

    step: Int[Array, ""]  # Optimizer steps done.
    params: Any
    opt_state: Any  # The optimizer's moments.
    gate: GateState  # State of the soft-to-hard gate (an average of past routing entropy).
    key: Key[Array, ""]  # The run's PRNG key; the key of row r at step s is fold_in(fold_in(key, s), r).


def row_keys(key: Key[Array, ""], step: Array, row: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """One key per example from (run key, step, global row): sharding changes no sample."""
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(at_step, row)


def in_controller(path: tuple[Any, ...]) -> bool:
    """Whether a path of the parameter tree leads into a controller."""
    return any(getattr(entry, "key", None) == "controller" for entry in path)


def count_parameters(params: Any) -> tuple[int, int]:
    """(all parameters, those of the controllers)."""
    total = controller = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        if in_controller(path):
            controller += leaf.size
    return total, controller


Axes = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Shapes in time; the sizes are in `Hypers`. Compiled in."""

    total_steps: int  # Steps of the whole run.
    warmup_steps: int  # Of the learning rate, linear from 0.
    final_fraction: float  # Of the peak learning rate that the cosine ends at.
    beta_warmup_steps: int  # Over which beta rises linearly from 0.
    gate: gate.GateSchedule
    temperature_ratio: float = 1.0  # Of the `gumbel` controller, first temperature / last.

    def temperature(self, step: Array, end: Array) -> Scalar:
        """Geometric fall to step `end`, the gate's, as a multiple of the last temperature."""
        done = jnp.minimum(step.astype(jnp.float32) / jnp.maximum(end, 1).astype(jnp.float32), 1.0)
        return jnp.float32(self.temperature_ratio) ** (1.0 - done)

    def learning_rate(self, step: Array) -> Scalar:
        """Linear warm-up, then cosine, as a fraction of the peak."""
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if self.warmup_steps else 1.0, peak_value=1.0, warmup_steps=self.warmup_steps,
            decay_steps=max(self.total_steps, self.warmup_steps + 1), end_value=self.final_fraction,
        )
        with jax.numpy_dtype_promotion("standard"):  # optax divides the step by floats.
            return schedule(step).astype(jnp.float32)

    def beta(self, step: Array) -> Scalar:
        """Linear warm-up of the KL weight, as a fraction of its final value."""
        if not self.beta_warmup_steps:
            return jnp.float32(1.0)
        return jnp.minimum(step.astype(jnp.float32) / self.beta_warmup_steps, 1.0)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The static side of a step: model, optimizer, schedules and sizes."""

    model: nn.Module
    # Gives the update direction; the step multiplies it by minus the learning rate.
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Schedule
    num_kinds: int = 1  # Kinds of tokens that the corpus tells apart.
    accumulate: int = 1  # Micro-batches per device that make one step.
    # Train with packed dispatch. Every token is hard and the weight of its mechanism is 1, so the controller has no
    # honest gradient: it is frozen, but for `dense_rows`.
    packed: bool = False
    # Share of the rows (see `num_dense_rows`) that still run all mechanisms with the straight-through gradient and the
    # KL; the controller learns from these alone.
    dense_rows: float = 0.0
    # Parameters that are not the controllers' come from a published model and are not trained.
    frozen: bool = False
    loss: str = "nll"  # One of LOSSES; "kl": to the published model without routes.
    tolerance: float = 0.08  # Of a model `by_layer`, see `objective.layers_fit`.


def num_dense_rows(share: float, rows: int) -> int:
    """Rows of one micro-batch of one device that run all mechanisms: the share, rounded up."""
    return math.ceil(share * rows)


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, with the norm given: what a device holds may be a part."""

    def update(updates, state, params=None, *, norm):
        del params
        scale = lambda u: jax.lax.select(  # noqa: E731
            norm < largest, u, (u / norm.astype(u.dtype)) * largest
        )
        return jax.tree.map(scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    name: str, *, weight_decay: float, clip: float, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW's direction or plain gradients ("sgd"), unscaled. `update` takes `norm`, that
    of the whole gradient. The learning rate is an array input, so it is applied by the step and not in here. Weight
    decay is for matrices (kernels, embeddings) alone, by name: scanned layers stack the norm scales and biases of all
    layers, which then have two axes too."""

    def decays(path, _):
        return getattr(path[-1], "key", None) in ("kernel", "embedding")

    clipping = _clip(clip) if clip else optax.with_extra_args_support(optax.identity())
    if name == "sgd":
        return clipping
    if name == "adamw":
        decay = optax.add_decayed_weights(
            weight_decay, mask=lambda params: jax.tree_util.tree_map_with_path(decays, params)
        )
        return optax.chain(clipping, optax.scale_by_adam(b1=b1, b2=b2), decay)
    raise ValueError(f"optimizer.name: expected one of ('adamw', 'sgd'), got {name!r}.")


def init_state(spec: StepSpec, key: Array, batch: Batch, hypers: Hypers) -> TrainState:
    """Fresh parameters from `key`, whole, or those that are trained; `batch` gives shapes only."""
    model = spec.model.clone(shard_axis=None)
    init_key, run_key = jax.random.split(key)
    # Compiled as one program: op by op, initialisation takes longer than many a short run.
    own = trained if spec.frozen else lambda params: params
    initialise = jax.jit(lambda key, tokens: own(model.init(key, tokens, hypers=hypers.routing)["params"]))
    params = initialise(init_key, jnp.asarray(batch.tokens[:1]))
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=spec.optimizer.init(params), gate=spec.schedule.gate.init_state(),
        key=run_key,
    )


def routing_hypers(spec: StepSpec, state: TrainState, hypers: Hypers) -> RoutingHypers:
    """The routing hypers in force at `state.step`: theta follows the gate's schedule, tau falls."""
    times = hypers.gate or spec.schedule.gate.times
    threshold = gate.threshold(spec.schedule.gate, state.gate, state.step, hypers.routing.threshold, times)
    temperature = hypers.routing.temperature * spec.schedule.temperature(state.step, times.end)
    return hypers.routing.replace(threshold=threshold, temperature=temperature)


def _fit(spec: StepSpec, output: Output, rows: Batch, routing: RoutingHypers, frozen: Any) -> Optional[Scalar]:
    """What the objective has in the place of the nll; None for the nll."""
    if spec.model.by_layer:
        return layers_fit(output.routing, rows.loss_mask, spec.tolerance)
    if spec.loss == "nll":
        return None
    unrouted = spec.model.routed_by(controller="fixed", fixed=("full",))
    unrouted = unrouted.clone(config=dataclasses.replace(unrouted.config, adapter_rank=0))
    teacher = jax.lax.stop_gradient(forward(unrouted, frozen, rows, routing).logits)
    return distance_to(output.logits, teacher, rows.loss_mask)


def gradient_sums(
    spec: StepSpec, state: TrainState, batch: Batch, hypers: Hypers, frozen: Optional[Any] = None
) -> tuple[Any, Sums]:
    """Gradients and sums over this device's rows, in `accumulate` micro-batches; not normalised."""
    beta = hypers.beta * spec.schedule.beta(state.step)
    routing = routing_hypers(spec, state, hypers)

    def dense_loss(params, rows: Batch):
        keys = row_keys(state.key, state.step, rows.row)
        output = forward(spec.model, merge(frozen, params), rows, routing, keys=keys)
        sums, fit = loss_sums(output, rows, num_kinds=spec.num_kinds), _fit(spec, output, rows, routing, frozen)
        sums = sums if fit is None else sums.replace(fit=fit)
        return objective(sums, beta), sums

    def packed_loss(params, rows: Batch):
        model = spec.model.clone(mode="hard", dispatch="packed")
        count = num_dense_rows(spec.dense_rows, len(rows.row))
        if count == len(rows.row):
            return dense_loss(params, rows)
        rest = jax.tree.map(lambda leaf: leaf[count:], rows)
        sums = apply_sums(model, merge(frozen, params), rest, routing, num_kinds=spec.num_kinds)
        if not count:
            return sums.nll, sums
        value, dense = dense_loss(params, jax.tree.map(lambda leaf: leaf[:count], rows))
        return sums.nll + value, jax.tree.map(jnp.add, sums, dense)

    loss = packed_loss if spec.packed else dense_loss

    gradient = jax.grad(loss, has_aux=True)
    if spec.accumulate == 1:
        return gradient(state.params, batch)
    micro = jax.tree.map(lambda leaf: leaf.reshape(spec.accumulate, -1, *leaf.shape[1:]), batch)
    add = lambda total, new: jax.tree.map(jnp.add, total, new)  # noqa: E731
    first = jax.tree.map(lambda leaf: leaf[0], micro)
    rest = jax.tree.map(lambda leaf: leaf[1:], micro)
    total, _ = jax.lax.scan(
        lambda total, rows: (add(total, gradient(state.params, rows)), None), gradient(state.params, first), rest
    )
    return total


STACKED = "layers"  # The module whose parameters have a leading axis of layers, where layers are scanned.

Finite = dict[str, Any]


def finite_parts(sums: Sums, gradients: Any, norm: Array, params: Any) -> Finite:
    """What of a step is finite; of penalty and routing by layer, of gradients and parameters by module, and by layer
    where a module stacks them."""

    def of(tree: Any) -> dict[str, Bool[Array, "..."]]:
        found = {}
        for name, module in tree.items():
            first = 1 if name == STACKED else 0
            flags = [
                jnp.all(jnp.isfinite(leaf), axis=tuple(range(first, leaf.ndim))) for leaf in jax.tree.leaves(module)
            ]
            found[name] = jnp.all(jnp.stack(flags), axis=0)
        return found

    return {
        "loss": jnp.isfinite(sums.nll),
        "penalty": jnp.isfinite(sums.penalty),
        "routing": jnp.isfinite(sums.entropy),
        "gradients": of(gradients),
        "norm": jnp.isfinite(norm),
        "parameters": of(params),
    }


def train_step(
    spec: StepSpec,
    state: TrainState,
    batch: Batch,
    hypers: Hypers,
    frozen: Optional[Any] = None,
    *,
    axis_name: Optional[Axes] = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step: (state, batch, hypers) -> (state, metrics). `frozen`: parameters of the published model, if
    there is one.

    `axis_name`: the axes over which rows are split. Where the model has a `shard_axis`, one of them, the state holds
    this device's shards, and so does the new one.

    Metrics: "sums" (a `Sums`, over the global batch), "gradient_norm" (before clipping), "threshold", "beta",
    "learning_rate", "finite" (of `finite_parts`: loss, routing, gradients, new parameters).
    """
    shard_axis = spec.model.shard_axis
    gradients, sums = gradient_sums(spec, state, batch, hypers, frozen)
    if axis_name is not None:
        gradients = sum_gradients(gradients, axis_name, shard_axis)
        sums = jax.lax.psum(sums, axis_name)
    tokens = jnp.maximum(sums.tokens, 1.0)
    gradients = jax.tree.map(lambda g: g / tokens.astype(g.dtype), gradients)

    norm = global_norm(gradients, shard_axis)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts with floats.
        direction, opt_state = spec.optimizer.update(gradients, state.opt_state, state.params, norm=norm)
    if spec.packed and not spec.dense_rows:
        # Without gradients, momentum and weight decay would still move the controller.
        direction = jax.tree_util.tree_map_with_path(
            lambda path, d: jnp.zeros_like(d) if in_controller(path) else d, direction
        )
    learning_rate = hypers.learning_rate * spec.schedule.learning_rate(state.step)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
    threshold = routing_hypers(spec, state, hypers).threshold
    if MEASURES[spec.schedule.gate.measure].log:
        entropy = jnp.mean(sums.log_uncertainty) / tokens
    else:  # As a fraction of log K, the largest entropy of K mechanisms.
        entropy = jnp.mean(sums.entropy) / tokens / jnp.log(jnp.float32(sums.mean.shape[-1]))
    finite = finite_parts(sums, gradients, norm, params)
    if shard_axis is not None:
        bad = jax.lax.psum(jax.tree.map(lambda ok: (~ok).astype(jnp.int32), finite), shard_axis)
        finite = jax.tree.map(lambda count: count == 0, bad)
    new_state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state,
        gate=gate.update(spec.schedule.gate, state.gate, state.step, entropy, hypers.gate),
    )
    return new_state, {
        "sums": sums,
        "gradient_norm": norm,
        "threshold": threshold,
        "beta": hypers.beta * spec.schedule.beta(state.step),
        "learning_rate": learning_rate,
        "finite": finite,
    }
