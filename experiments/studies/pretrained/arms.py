"""Who sends which tokens to full attention: patterns that are fixed, tables, disorder, the oracle, trained routers.

A fixed pattern is a mask by layer (and head); every other arm gives a token a score z and sends it to full attention
iff z is above a threshold, which is found on validation for an asked share. For a trained router z > lambda is its hard
decision at the price lambda.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.studies.pretrained import stream
from experiments.studies.pretrained.local import Pool, decision
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.stream import Layer, change
from meta_attention_jax.model import LanguageModel, ModelConfig
from meta_attention_jax.objective import forward, token_nll
from meta_attention_jax.training.backbone import merge
from meta_attention_jax.types import RoutingHypers

FULL, LOCAL = 0, 1
SHRUNK = 4
Full = Bool[np.ndarray, "layer time"]
Scores = Float[np.ndarray, "layer time"]


class Read(NamedTuple):
    """What a reading of one window has found."""

    nll: Float[np.ndarray, "time"]
    guess: Int[np.ndarray, "time"]
    full: Full  # What was on full attention; a share of it where only some heads were.
    z: Optional[Scores] = None
    mean: Optional[Float[np.ndarray, "layer time mechanism"]] = None
    concentration: Optional[Float[np.ndarray, "layer time mechanism"]] = None


class Reader:
    """A published model that reads windows, hard, by the package's packed dispatch; masks that no mechanism has by
    `stream.read`."""

    def __init__(self, model: LanguageModel, params: Any, costs: Sequence[float]) -> None:
        self.model, self.params, self.costs = model, params, tuple(costs)
        self._unrouted = model.routed_by(controller="fixed", fixed=("full",)).clone(mode="hard", dispatch="packed")

    @property
    def layers(self) -> int:
        return len(self.model.config.routed)

    def forced(self, window: Window, full: Full) -> Read:
        """By given routes."""
        route = jnp.asarray(np.where(full, FULL, LOCAL)[:, None], jnp.int32)
        nll, guess, _ = _model(self._unrouted, self.params, window.batch(), self._hypers(), route)
        return Read(*jax.device_get((nll, guess)), full=full)

    def routed(
        self, window: Window, controller: str, own: Any, hypers: RoutingHypers, mode: str = "hard", **router: Any
    ) -> Read:
        """By trained controllers, `own` their parameters [layer ...]."""
        model = self.model.routed_by(controller=controller, **router).clone(mode=mode, dispatch="packed")
        params = merge(self.params, placed(self.model.config, own))
        nll, guess, routing = jax.device_get(_model(model, params, window.batch(), hypers, None))
        mean, full = routing.mean[:, 0], routing.route[:, 0] == FULL
        alpha = None if routing.concentration is None else routing.concentration[:, 0]
        return Read(nll, guess, full, decision(mean, self.costs), mean, alpha)

    def heads(self, window: Window, full: Bool[np.ndarray, "layer head"]) -> Read:
        """Some heads of a layer with all their queries on full attention."""
        time = len(window.tokens)
        mask = np.broadcast_to(full[:, :, None], (*full.shape, time))
        nll, guess, _ = _masked(self.model.config, self.params, window.tokens, window.targets, jnp.asarray(mask))
        return Read(*jax.device_get((nll, guess)), full=np.broadcast_to(full.mean(1)[:, None], (len(full), time)))

    def oracle(self, window: Window, threshold: float) -> Read:
        """Full where the output of the layer would change by more, in the stream of these very routes."""
        found = _oracle(self.model.config, self.params, window.tokens, window.targets, jnp.float32(threshold))
        nll, guess, harm = jax.device_get(found)
        return Read(nll, guess, harm > threshold, harm)

    def _hypers(self) -> RoutingHypers:
        one = jnp.float32(1)
        return RoutingHypers(strength=one, preference=one, costs=jnp.asarray(self.costs, jnp.float32), threshold=one)


def placed(config: ModelConfig, own: Any) -> Any:
    """Parameters of controllers, [layer ...] of the routed layers, where a model has them."""
    if config.scan_layers:
        return {"layers": {"attention": {"controller": own}}}
    return {
        f"layer_{i}": {"attention": {"controller": jax.tree.map(lambda leaf: leaf[n], own)}}  # noqa: B023
        for n, i in enumerate(config.routed)
    }


def gathered(config: ModelConfig, params: Any) -> Any:
    """Inverse of `placed`."""
    if config.scan_layers:
        return params["layers"]["attention"]["controller"]
    apart = [params[f"layer_{i}"]["attention"]["controller"] for i in config.routed]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *apart)


@functools.partial(jax.jit, static_argnums=0)
def _model(model: LanguageModel, params: Any, batch: Any, hypers: RoutingHypers, route: Any) -> Any:
    output = forward(model, params, batch, hypers, route=route)
    return token_nll(output.logits, batch.targets)[0], jnp.argmax(output.logits[0], axis=-1), output.routing


def _predicted(config: Any, params: Any, x: Any, targets: Any) -> tuple[Any, Any]:
    logits = stream.logits(config, params, x)
    return token_nll(logits[None], targets[None])[0], jnp.argmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _masked(config: Any, params: Any, tokens: Any, targets: Any, full: Any) -> Any:
    x, _ = stream.read(config, params, tokens, lambda layer, full: (layer.routed(full), None), full)
    return *_predicted(config, params, x, targets), None


@functools.partial(jax.jit, static_argnums=0)
def _oracle(config: Any, params: Any, tokens: Any, targets: Any, threshold: Any) -> Any:
    def attend(layer: Layer, extra: None):
        full, local = layer.attend(layer.past), layer.attend(layer.near)
        harm = change(layer, full, local)
        return jnp.where((harm > threshold)[:, None], full, local), harm

    x, harm = stream.read(config, params, tokens, attend)
    return *_predicted(config, params, x, targets), harm


@functools.partial(jax.jit, static_argnums=0)
def _by_head(config: Any, params: Any, tokens: Any) -> Any:
    """d of every KV head alone, mean over the tokens: what of a layer's output its heads' window would change."""
    group = config.num_heads // config.kv_heads

    def attend(layer: Layer, extra: None):
        full = layer.attend(layer.past)
        tried = []
        for head in range(config.kv_heads):
            others = jnp.arange(config.num_heads) // group != head
            others = jnp.broadcast_to(others[:, None], (config.num_heads, len(layer.x)))
            tried.append(jnp.mean(change(layer, full, layer.routed(others))))
        return full, jnp.stack(tried)

    return stream.read(config, params, tokens, attend)[1]


def rank_heads(reader: Reader, windows: Sequence[Window]) -> Float[np.ndarray, "layer kv_head"]:
    """What windows of attention change by KV head, on training text; the largest matter most."""
    seen = [_by_head(reader.model.config, reader.params, jnp.asarray(window.tokens)) for window in windows]
    return np.mean(jax.device_get(seen), axis=0)


def rank_layers(reader: Reader, windows: Sequence[Window]) -> Float[np.ndarray, "layer"]:
    """Nats that it costs when one layer alone is a window."""
    lost = np.zeros(reader.layers)
    for window in windows:
        every = np.ones((reader.layers, len(window.tokens)), bool)
        whole = reader.forced(window, every).nll[window.counted].mean()
        for layer in range(reader.layers):
            full = every.copy()
            full[layer] = False
            lost[layer] += (reader.forced(window, full).nll[window.counted].mean() - whole) / len(windows)
    return lost


def layer_mask(layers: int, chosen: Sequence[int], time: int) -> Full:
    """Some layers whole."""
    return np.repeat(np.isin(np.arange(layers), list(chosen))[:, None], time, axis=1)


def spread(layers: int, share: float) -> list[int]:
    """Every k-th layer, from the middle of the first k on."""
    count = max(round(share * layers), 1)
    return [int((i + 0.5) * layers / count) for i in range(count)]


def token_table(pool: Pool, tokens: Int[np.ndarray, "token"], vocabulary: int) -> Float[np.ndarray, "layer vocab"]:
    """Mean harm of every token id and layer over training text, with the layer's own mean as four more of each."""
    counts = np.bincount(tokens, minlength=vocabulary)
    table = np.stack([np.bincount(tokens, harm, minlength=vocabulary) for harm in pool.harm])
    return (table + SHRUNK * pool.harm.mean(1, keepdims=True)) / (counts + SHRUNK)


def place_table(pool: Pool) -> Float[np.ndarray, "layer time"]:
    """Mean harm of every position and layer."""
    counts = np.bincount(pool.position)
    return np.stack([np.bincount(pool.position, harm) for harm in pool.harm]) / counts


def disordered(full: Full, rng: np.random.Generator, how: str, begin: int = 0) -> Full:
    """The routes shuffled over the tokens of every layer from `begin` on (before, window and sinks are the whole past),
    or drawn anew there at the rate of every layer."""
    early, late = full[:, :begin], full[:, begin:]
    if how == "shuffled":
        late = np.stack([rng.permuted(row) for row in late])
    else:
        late = rng.random(late.shape) < late.mean(axis=-1, keepdims=True)
    return np.concatenate([early, late], axis=1)


def threshold_at(
    share: float, windows: Sequence[Window], read: Callable[[Window, float], Read], start: float, rounds: int = 2
) -> tuple[float, float]:
    """(the threshold on z at which `share` of the token-layers are on full attention, the share of the last reading),
    mean over kinds of windows. Routes change the streams, so it is read again at what the last reading asked for."""
    kinds: Mapping[str, list[Window]] = {}
    for window in windows:
        kinds.setdefault(window.kind, []).append(window)
    found, seen = start, np.nan
    for _ in range(rounds):
        readings = {kind: [read(window, found) for window in own] for kind, own in kinds.items()}
        seen = float(np.mean([np.mean([one.full.mean() for one in own]) for own in readings.values()]))
        z = np.concatenate([one.z.ravel() for own in readings.values() for one in own])
        weight = np.concatenate([
            np.full(one.z.size, 1.0 / (len(own) * one.z.size)) for own in readings.values() for one in own
        ])
        order = np.argsort(-z, kind="stable")
        above = np.cumsum(weight[order]) / weight.sum()
        at = int(np.searchsorted(above, share))
        found = float(z[order[min(at, len(z) - 1)]])
    return found, seen
