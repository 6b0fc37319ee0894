"""What a training run carries from step to step, and what a sweep may vary."""

from __future__ import annotations

from typing import Any, Optional

import flax.struct
import jax
from jaxtyping import Array, Int, Key

from meta_attention_jax.routing.gate import GateState, GateTimes
from meta_attention_jax.types import RoutingHypers, Scalar


@flax.struct.dataclass
class Hypers:
    """Hyper-parameters that a sweep varies: array inputs of the step, never compiled in."""

    learning_rate: Scalar  # peak of the warm-up cosine schedule
    beta: Scalar  # final weight of the KL, per nat
    routing: RoutingHypers  # kappa, eta, c, and the *final* threshold theta of the gate
    gate: Optional[GateTimes] = None  # when the gate moves; None leaves it to the schedule


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs besides its config."""

    step: Int[Array, ""]  # optimizer steps done
    params: Any  # parameters
    opt_state: Any  # the optimizer's moments
    gate: GateState  # state of the soft-to-hard gate (an average of past routing entropy)
    key: Key[Array, ""]  # the run's PRNG key; the key of row r at step s is fold_in(fold_in(key, s), r)


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
