"""Controllers trained by the local ELBO: every arm, setting and seed of one kind of controller as one program.

    sum_layers ||o_full - sum_k pi_k o^k||^2 / (2 sigma^2 ||x||^2) + beta penalty,        nats per token

With full attention and a window the first term is (1 - pi_full)^2 d / (2 sigma^2), d = ||o_full - o_local||^2 /
||x||^2, so a layer's two outputs are needed once: d and what the controller sees are read off the streams of the
training windows and kept. Half of the streams are those of full attention, half those of the oracle's routes (full
where d >= 0.08^2), for routes change the streams; neither depends on what is trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.stream import Layer, change, read
from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.model import ModelConfig
from meta_attention_jax.routing.decide import decide
from meta_attention_jax.types import Router, Routing, RoutingHypers

TOLERANCE = 0.08
"""sigma, and the oracle's threshold on the change of a layer's output."""
TOKENS = 512  # Of a step, drawn from all windows at once.
HARDENING = (0.3, 0.7)  # Of the steps: between them theta rises from 0 to 1.


class Pool(NamedTuple):
    """What controllers of all routed layers see of some tokens, and what a window would cost there."""

    h: Float[np.ndarray, "layer token model"]  # Half precision.
    scale: Float[np.ndarray, "layer token"]  # Root mean square of the stream.
    harm: Float[np.ndarray, "layer token"]  # d.
    position: Int[np.ndarray, "token"]
    window: Int[np.ndarray, "token"]  # Number of its window, from 0.

    def of(self, windows: Sequence[int]) -> Pool:
        """Only some windows."""
        return self.at(np.flatnonzero(np.isin(self.window, windows)))

    def at(self, kept: Int[np.ndarray, "kept"]) -> Pool:
        """Only some tokens."""
        return Pool(*(leaf[..., kept, :] if leaf.ndim == 3 else leaf[..., kept] for leaf in self))


@dataclasses.dataclass(frozen=True)
class Point:
    """One controller that is trained."""

    arm: str
    controller: str  # One of `CONTROLLERS`.
    seed: int = 0
    strength: float = 2.0  # kappa.
    preference: float = 0.1  # eta.
    beta: float = 0.0  # Weight of the KL, or of the penalty.
    learning_rate: float = 3e-3
    entropy_bonus: float = 0.0  # rho of the cost penalty.
    data: str = "mixture"  # Name of the pool.

    def hypers(self, costs: Sequence[float], theta: float = 0.0, price: float = 0.0) -> RoutingHypers:
        """As the package's controllers take them."""
        return RoutingHypers(
            strength=jnp.float32(self.strength), preference=jnp.float32(self.preference),
            costs=jnp.asarray(costs, jnp.float32), threshold=jnp.float32(theta), price=jnp.float32(price),
            entropy_bonus=jnp.float32(self.entropy_bonus),
        )


def collect(
    config: ModelConfig, params: Any, windows: Sequence[Window], oracle: Sequence[bool] = (False, True),
    say: Callable[[str], None] = print,
) -> Pool:
    """The tokens of some windows in the stream of full attention, in that of the oracle's routes, or in both."""

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, tokens, oracle):
        return read(config, params, tokens, functools.partial(_look, oracle=oracle))[1]

    length, streams = len(windows[0].tokens), [(i, by) for i in range(len(windows)) for by in oracle]
    layers, tokens = len(config.routed), length * len(streams)
    pool = Pool(
        np.empty((layers, tokens, config.model_dim), np.float16), np.empty((layers, tokens), np.float32),
        np.empty((layers, tokens), np.float32), np.tile(np.arange(length, dtype=np.int32), len(streams)),
        np.repeat([i for i, _ in streams], length),
    )
    for number, (i, by) in enumerate(streams):
        here = np.s_[:, number * length : (number + 1) * length]
        seen = jax.device_get(run(params, jnp.asarray(windows[i].tokens), by))
        for leaf, part in zip(pool, seen):
            leaf[here] = part
        if number % 20 == 19:
            say(f"streams {number + 1}/{len(streams)}")
    return pool


def _look(layer: Layer, extra: None, *, oracle: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    full, local = layer.attend(layer.past), layer.attend(layer.near)
    harm = change(layer, full, local)
    added = jnp.where((harm >= TOLERANCE**2)[:, None], full, local) if oracle else full
    return added, (layer.h.astype(jnp.float16), jnp.sqrt(jnp.mean(jnp.square(layer.x), axis=-1)), harm)


class Tokens(NamedTuple):
    """Some tokens of a pool, on the device."""

    h: Float[Array, "layer token model"]
    scale: Float[Array, "layer token"]
    harm: Float[Array, "layer token"]
    position: Int[Array, "token"]


def drawn(pool: Pool, rng: np.random.Generator, count: int) -> Tokens:
    """Tokens of all windows at random."""
    chosen = np.sort(rng.integers(len(pool.position), size=count))
    return taken(pool, chosen)


def taken(pool: Pool, chosen: Any) -> Tokens:
    """These tokens."""
    return Tokens(
        jnp.asarray(pool.h[:, chosen], jnp.float32), jnp.asarray(pool.scale[:, chosen]),
        jnp.asarray(pool.harm[:, chosen]), jnp.asarray(pool.position[chosen]),
    )


def routing(
    controller: nn.Module, params: Any, tokens: Tokens, hypers: RoutingHypers, keys: Optional[Key[Array, "layer token"]]
) -> Routing:
    """Of all layers, [layer token 1 ...]: every token is a row of its own, and has a key of its own."""

    def layer(params, h, scale, keys):
        residual = jnp.broadcast_to(scale[:, None, None], h[:, None].shape)
        ones = jnp.ones((len(h), 1), jnp.int32)
        return controller.apply(
            {"params": params}, h[:, None], residual=residual, positions=tokens.position[:, None], segment_ids=ones,
            hypers=hypers, keys=keys,
        )

    return jax.vmap(layer)(params, tokens.h, tokens.scale, keys)


def loss(
    controller: nn.Module, params: Any, tokens: Tokens, hypers: RoutingHypers, beta: Any, key: Key[Array, ""]
) -> Array:
    """The local ELBO with its sign turned, nats per token, all layers."""
    layers, count = tokens.harm.shape
    keys = jax.random.split(key, (layers, count))
    found = routing(controller, params, tokens, hypers, keys)
    flat = jax.tree.map(lambda leaf: leaf.reshape(layers * count, *leaf.shape[2:]), found)
    weights = decide(flat, mode="soft", threshold=hypers.threshold, training=True).weights
    local = 1.0 - weights[:, 0, 0].reshape(layers, count)
    fit = jnp.sum(jnp.square(local) * tokens.harm) / (2.0 * TOLERANCE**2)
    return (fit + beta * jnp.sum(found.penalty)) / count


def fresh(controller: nn.Module, seed: int, layers: int, tokens: Tokens, hypers: RoutingHypers) -> Any:
    """Parameters of the controllers of all layers at the start."""

    def one(key, h):
        ones = jnp.ones((1, 1), jnp.int32)
        return controller.init(
            key, h[:1, None], residual=h[:1, None], positions=0 * ones, segment_ids=ones, hypers=hypers
        )["params"]

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), layers), tokens.h)


def train(
    points: Sequence[Point], pools: Any, costs: Sequence[float], *, steps: int, hidden: int = 64,
    say: Callable[[str], None] = print,
) -> list[Any]:
    """Parameters of every point, on the host, [layer ...]. Points of one controller, pool and seed, which says which
    tokens are drawn, are one call of a program, compiled once for all seeds and pools of as many points."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for i, point in enumerate(points):
        groups.setdefault((point.controller, point.data, point.seed), []).append(i)
    trained: list[Any] = [None] * len(points)
    for (name, data, seed), members in groups.items():
        found = _train_group([points[i] for i in members], name, seed, pools[data], costs, steps, hidden, say)
        for place, i in enumerate(members):
            trained[i] = jax.tree.map(lambda leaf: leaf[place], found)  # noqa: B023
    return trained


def _train_group(
    points: Sequence[Point], name: str, seed: int, pool: Pool, costs: Sequence[float], steps: int, hidden: int,
    say: Callable[[str], None],
) -> Any:
    controller = make_controller(Router(mechanisms=("full", "local"), controller=name, hidden=hidden))
    layers = len(pool.harm)
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    hypers = jax.tree.map(stack, *[point.hypers(costs) for point in points])
    betas = jnp.asarray([point.beta for point in points], jnp.float32)
    rates = jnp.asarray([point.learning_rate for point in points], jnp.float32)
    keys = jnp.stack([jax.random.key(point.seed + 1) for point in points])
    first = taken(pool, np.arange(1))
    params = jax.tree.map(stack, *[fresh(controller, p.seed, layers, first, p.hypers(costs)) for p in points])
    init, step = _program(controller, steps)
    state = init(params)
    rng = np.random.default_rng(seed)
    for number in range(steps):
        tokens = drawn(pool, rng, TOKENS)
        params, state, values = step(params, state, tokens, jnp.int32(number), hypers, betas, rates, keys)
        if number % 100 == 99:
            shown = " ".join(f"{value:.2f}" for value in np.asarray(values)[:6])
            say(f"{name}, seed {seed}, {len(points)} points, step {number + 1}/{steps}: {shown}")
    return jax.device_get(params)


@functools.lru_cache(maxsize=None)
def _program(controller: nn.Module, steps: int) -> tuple[Any, Any]:
    """(points' parameters -> states of the optimizer, one step of all points), compiled once for so many points."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 50, 1), steps, 0.1)
    start, end = (part * steps for part in HARDENING)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, number, hypers, betas, rates, keys):
        theta = jnp.clip((number.astype(jnp.float32) - start) / (end - start), 0.0, 1.0)

        def one(params, state, hypers, beta, rate, key):
            hypers = hypers.replace(threshold=theta)
            key = jax.random.fold_in(key, number)
            value, slope = jax.value_and_grad(lambda p: loss(controller, p, tokens, hypers, beta, key))(params)
            with jax.numpy_dtype_promotion("standard"):  # optax divides counts by floats.
                updates, state = optimizer.update(slope, state, params)
                now = rate * schedule(number).astype(jnp.float32)
            moved = jax.tree.map(lambda p, u: p - now * u, params, updates)
            return moved, state, value

        return jax.vmap(one)(params, state, hypers, betas, rates, keys)

    return jax.vmap(optimizer.init), step


def chunks(pool: Pool, size: int = 2048) -> list[Tokens]:
    """All tokens of a pool, on the device."""
    return [taken(pool, np.s_[begin : begin + size]) for begin in range(0, len(pool.position), size)]


def scores(
    controller: nn.Module, params: Any, held: Sequence[Tokens], point: Point, costs: Sequence[float]
) -> tuple[Float[np.ndarray, "layer token"], Float[np.ndarray, "layer token"]]:
    """(z, E pi_full) of the tokens of a pool: a token goes to full attention iff z > lambda."""
    run, hypers = _scorer(controller), point.hypers(costs)
    mean = np.concatenate([np.asarray(run(params, tokens, hypers)) for tokens in held], axis=1)
    return decision(mean, costs), mean[..., 0]


@functools.lru_cache(maxsize=None)
def _scorer(controller: nn.Module) -> Any:
    return jax.jit(lambda params, tokens, hypers: routing(controller, params, tokens, hypers, None).mean[:, :, 0])


def decision(mean: Float[np.ndarray, "*tokens mechanism"], costs: Sequence[float]) -> Float[np.ndarray, "*tokens"]:
    """z with k* = full iff z > lambda, of E pi over full and local: E pi_f - lambda c_f > E pi_l - lambda c_l."""
    return (mean[..., 0] - mean[..., 1]) / np.float32(costs[0] - costs[1])


def left(z: Float[np.ndarray, "layer token"], harm: Float[np.ndarray, "layer token"], share: float) -> float:
    """Of the harm of a window everywhere, what is left when the share of highest z is on full attention; equal z in any
    order."""
    mixed = np.random.default_rng(0).permutation(z.size)
    order = mixed[np.argsort(-z.ravel()[mixed], kind="stable")]
    return float(harm.ravel()[order[round(share * z.size) :]].sum() / harm.sum())
