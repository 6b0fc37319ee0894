"""The decision: which mechanism a token uses, whether it uses that one alone, and the weights.

    soft   sum_k pi_k o^k
    hard   o^{k*},  k* = argmax_k (E[pi_k] - lambda c_k)

lambda, the price, is 0 in the paper: the likeliest mechanism. One trained model gives a whole curve of cost against
loss; a price below 0 is a discount on the dear mechanisms. Both modes are one weighted sum; hard tokens have one-hot
weights, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from meta_attention_jax.fields import expect
from meta_attention_jax.routing.gate import hard_tokens
from meta_attention_jax.types import Costs, Route, Routing, Scalar, Weights

MODES = ("soft", "hard", "gated")


class Decision(NamedTuple):
    """What every token uses."""

    weights: Weights  # Of the mechanisms' outputs; one-hot at hard tokens.
    route: Route  # k*.
    hard: Bool[Array, "batch time"]  # Whether the token uses k* alone.


def decide(
    routing: Routing,
    *,
    mode: str,
    threshold: Scalar,
    prices: Optional[Costs] = None,
    fallback: Optional[int] = None,
    route: Optional[Route] = None,
    training: bool,
) -> Decision:
    """Weights, mechanism and hardness of every token.

    Mode `soft` keeps every token soft in evaluation; `hard` makes every token hard; `gated` makes a token hard iff
    theta > 0 and u_t <= theta. Training in mode `soft` is gated too: that is how the scheduled threshold hardens a
    model. Soft tokens take `routing.weights`, the posterior mean unless the controller was given keys. With a fallback,
    evaluation in mode `gated` sends the tokens that are not certain there, and every token is hard.

    In training a hard token's weights are one_hot(k*) + mean - stop_gradient(mean): the value is the one-hot's, the
    gradient is the mean's (straight-through). A forced route has plain one-hot weights and makes every token hard.
    `prices` are lambda c, None for 0.
    """
    expect(mode in MODES, "mode", f"one of {MODES}", mode)
    mean = routing.mean
    num = mean.shape[-1]
    if route is not None:
        route = checked_route(route, mean.shape[:-1], num)
        one_hot = jax.nn.one_hot(route, num, dtype=mean.dtype)
        return Decision(one_hot, route, jnp.ones(route.shape, bool))

    value = mean if prices is None else mean - jnp.broadcast_to(prices, mean.shape)
    route = jnp.argmax(value, axis=-1).astype(jnp.int32)
    if mode == "hard":
        hard = jnp.ones(route.shape, bool)
    elif mode == "gated" or training:
        hard = hard_tokens(routing.uncertainty, threshold, routing.log_uncertainty)
        if fallback is not None and not training:
            route, hard = jnp.where(hard, route, fallback), jnp.ones_like(hard)
    else:
        hard = jnp.zeros(route.shape, bool)
    one_hot = jax.nn.one_hot(route, num, dtype=mean.dtype)
    if training:
        # The difference is exactly 0; (one_hot + mean) - mean would not be exactly one_hot.
        one_hot = one_hot + (mean - jax.lax.stop_gradient(mean))
    return Decision(jnp.where(hard[..., None], one_hot, routing.weights), route, hard)


def checked_route(route: Route, shape: tuple[int, ...], num: int) -> Route:
    """The forced route as int32, after checking what is known of it."""
    if route.shape != shape or not jnp.issubdtype(route.dtype, jnp.integer):
        raise ValueError(f"route: expected integers of shape {shape}, got {route.dtype} of shape {route.shape}.")
    if not isinstance(route, jax.core.Tracer):
        low, high = (int(f(np.asarray(route), initial=0)) for f in (np.min, np.max))
        if low < 0 or high >= num:
            raise ValueError(f"route: expected indices in [0, {num}), got {low} to {high}.")
    return jnp.asarray(route, jnp.int32)


def mix(
    outputs: Sequence[Float[Array, "batch time heads dim"]], weights: Weights
) -> Float[Array, "batch time heads dim"]:
    """sum_k pi_k o^k, summed in float32, in the outputs' dtype."""
    expect(len(outputs) == weights.shape[-1], "outputs", f"{weights.shape[-1]} arrays, one per weight", len(outputs))
    weights = weights.astype(jnp.float32)[..., None, None, :]
    mixed = sum(weights[..., k] * out.astype(jnp.float32) for k, out in enumerate(outputs))
    return mixed.astype(outputs[0].dtype)
