"""Controllers to compare with. Layer, schedule, gate and network are shared; only this differs.

Every controller is called as `controller(x, residual=, positions=, segment_ids=, hypers=, keys=)`
and returns a `Routing`; what a controller has no use for, it ignores.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from meta_attention_jax.controller.controller import ControllerMLP, DirichletController
from meta_attention_jax.controller.uncertainty import uncertainty
from meta_attention_jax.types import Positions, Routing, RoutingHypers, SegmentIds


class SoftmaxController(nn.Module):
    """Prior-free router: pi_t = softmax(f_t), deterministic, KL = 0.

    Attributes:
      num_mechanisms: K.
      hidden: width of the network's hidden layer.
      uncertainty: "entropy", the only measure that needs no concentration.
      dtype: of the hidden layer's arithmetic.
    """

    num_mechanisms: int
    hidden: int = 64
    uncertainty: str = "entropy"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time model"],
        *,
        residual: Float[Array, "batch time model"],
        positions: Positions,
        segment_ids: SegmentIds,
        hypers: RoutingHypers,
        keys: Optional[Key[Array, "batch"]] = None,
    ) -> Routing:
        """Routing of every token; raises ValueError for a measure other than "entropy"."""
        del segment_ids, hypers, keys
        logits = ControllerMLP(self.hidden, self.num_mechanisms, self.dtype, name="mlp")(
            x, residual, positions
        )
        mean = jax.nn.softmax(logits, axis=-1)
        return Routing(
            mean=mean,
            weights=mean,
            uncertainty=uncertainty(self.uncertainty, mean, None),
            kl=jnp.zeros(mean.shape[:-1], jnp.float32),
        )


def fixed_routing(fixed: int, num_mechanisms: int, batch: int, time: int) -> Routing:
    """Every token on one mechanism, with certainty: u_t = 0 and KL = 0.

    Raises:
      ValueError: `fixed` is not in [0, num_mechanisms).
    """
    if not 0 <= fixed < num_mechanisms:
        raise ValueError(f"fixed: expected an index in [0, {num_mechanisms}), got {fixed}.")
    row = jax.nn.one_hot(fixed, num_mechanisms, dtype=jnp.float32)
    mean = jnp.broadcast_to(row, (batch, time, num_mechanisms))
    zeros = jnp.zeros((batch, time), jnp.float32)
    return Routing(mean=mean, weights=mean, uncertainty=zeros, kl=zeros)


class FixedController(nn.Module):
    """One mechanism for every token of the layer; no parameters.

    Attributes:
      num_mechanisms: K.
      fixed: index of the mechanism on the mechanism axis.
    """

    num_mechanisms: int
    fixed: int = 0

    def __call__(
        self,
        x: Float[Array, "batch time model"],
        *,
        residual: Float[Array, "batch time model"],
        positions: Positions,
        segment_ids: SegmentIds,
        hypers: RoutingHypers,
        keys: Optional[Key[Array, "batch"]] = None,
    ) -> Routing:
        """Routing of every token; raises ValueError for an index outside [0, K)."""
        del residual, positions, segment_ids, hypers, keys
        return fixed_routing(self.fixed, self.num_mechanisms, *x.shape[:2])


CONTROLLERS: dict[str, type[nn.Module]] = {
    "bayesian": DirichletController,
    "softmax": SoftmaxController,
    "fixed": FixedController,
}
"""Controllers by the name that a config uses."""


def make_controller(controller: str, **fields: Any) -> nn.Module:
    """The named controller, built from one set of fields that serves all of them.

    A caller can pass every field it has: a controller takes those it knows. A field that no
    controller knows is a mistake.

    Raises:
      ValueError: unknown controller, a field unknown to every controller, or fewer than two
        mechanisms to choose from.
    """
    if controller not in CONTROLLERS:
        raise ValueError(f"controller: expected one of {tuple(CONTROLLERS)}, got {controller!r}.")
    known = {name: _field_names(module) for name, module in CONTROLLERS.items()}
    unknown = set(fields).difference(*known.values())
    if unknown:
        raise ValueError(
            f"controller: expected fields among {sorted(set().union(*known.values()))}, "
            f"got {sorted(unknown)}."
        )
    if controller != "fixed" and fields.get("num_mechanisms", 2) < 2:
        raise ValueError(
            "num_mechanisms: expected at least 2 for a controller that chooses, "
            f"got {fields['num_mechanisms']}."
        )
    chosen = {field: value for field, value in fields.items() if field in known[controller]}
    return CONTROLLERS[controller](**chosen)


def _field_names(module: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(module) if field.init}
