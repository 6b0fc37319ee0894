"""Held-out evaluation of a set of parameters, in any mode, at the mean or with samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.fields import expect
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.objective import Sums, apply_sums, forward, loss_sums, predictive_nll, token_nll
from meta_attention_jax.routing.accounting import Accounting, count_layers
from meta_attention_jax.routing.decide import MODES
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.step import Axes, row_keys
from meta_attention_jax.types import Batch, Positions, Routing, RoutingHypers, SegmentIds


class Evaluator:
    """Compiles the evaluation steps of one model, in any mode, once and reuses them; what it is given later is placed
    by `parallel`."""

    def __init__(self, model: nn.Module, dataset: Dataset, parallel: Parallel):
        self.model = model
        self.dataset = dataset
        self.parallel = parallel
        self._compiled: dict[Any, Any] = {}

    def _step(self, step: Callable[..., Any], mode: str, count: int) -> Any:
        """`step` of the model in that mode, compiled; `count`, its second argument, is of kinds or of samples."""
        kind = step, mode, count
        if kind not in self._compiled:
            function = functools.partial(step, self.model.clone(mode=mode), count)
            self._compiled[kind] = self.parallel.compile(function, batch_argument=1)
        return self._compiled[kind]

    def sums(
        self, params: Any, hypers: RoutingHypers, *, split: str, mode: str, max_batches: Optional[int] = None
    ) -> Sums:
        """Sums over the split at the posterior mean; theta counts in mode "gated" only. `max_batches` as in
        `Dataset.eval_batches`."""
        expect(mode in MODES, "mode", f"one of {MODES}", mode)
        return self._total(self._step(eval_step, mode, self.dataset.num_kinds), params, hypers, split, max_batches)

    def accounted(
        self, params: Any, hypers: RoutingHypers, *, split: str, max_batches: Optional[int] = None
    ) -> tuple[Sums, Accounting]:
        """`sums` in mode "hard", and what attention spends on its routes, per token, all layers. Executed numbers are
        those of batches and devices as they are here: a device runs a mechanism without a packed form if one token of
        its rows asks for it."""
        step = self._step(accounted_eval_step, "hard", self.dataset.num_kinds)
        sums, accounting = self._total(step, params, hypers, split, max_batches)
        return sums, accounting.per_token()

    @without_mesh
    def _total(self, step: Any, params: Any, hypers: RoutingHypers, split: str, max_batches: Optional[int]) -> Any:
        batches = self.dataset.eval_batches(split, max_batches=max_batches)
        total = sum_batches(lambda batch: step(params, self.parallel.shard(batch), hypers), batches)
        return jax.device_get(self.parallel.unreplicate(total))

    @without_mesh
    def sampled(
        self,
        params: Any,
        hypers: RoutingHypers,
        *,
        split: str,
        samples: int,
        seed: int = 0,
        max_batches: Optional[int] = None,
    ) -> dict[str, float]:
        """{"predictive", "elbo"} in nats per token, from `samples` soft samples of pi. The gate is off: every token
        mixes its sampled weights."""
        expect(samples > 0, "samples", "a number > 0", samples)
        step = self._step(sampled_eval_step, "soft", samples)
        hypers = hypers.replace(threshold=jnp.zeros_like(hypers.threshold))
        key = self.parallel.make(lambda: jax.random.key(seed))
        total = {"tokens": 0.0, "predictive": 0.0, "elbo": 0.0}
        for index, batch in enumerate(self.dataset.eval_batches(split, max_batches=max_batches)):
            # Rows of different batches must not share noise.
            batch = batch.replace(row=batch.row + index * self.dataset.batch_size)
            sums = step(params, self.parallel.shard(batch), hypers, key)
            sums = jax.device_get(self.parallel.unreplicate(sums))
            total = {name: total[name] + float(sums[name]) for name in total}
        return {name: total[name] / total["tokens"] for name in ("predictive", "elbo")}


def sum_batches(step: Callable[[Batch], Any], batches: Iterable[Batch]) -> Any:
    """The sum of `step` over batches, on the devices."""
    total = None
    for sums in map(step, batches):
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return total


def in_both_modes(fixed: bool, metrics_of: Callable[[str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"soft": metrics, "hard": metrics}, each with hard nats less soft nats: what a log has. With a fixed route both
    are the same thing, and measured once."""
    soft = metrics_of("soft")
    hard = soft if fixed else metrics_of("hard")
    gap = {"hard_minus_soft": hard["nll"] - soft["nll"]}
    return {"soft": {**soft, **gap}, "hard": {**hard, **gap}}


def eval_step(
    model: nn.Module,
    num_kinds: int,
    params: Any,
    batch: Batch,
    hypers: RoutingHypers,
    *,
    axis_name: Optional[Axes] = None,
) -> Sums:
    """Sums at the posterior mean, in the model's mode."""
    sums = apply_sums(model, params, batch, hypers, num_kinds=num_kinds)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def sampled_eval_step(
    model: nn.Module,
    num_samples: int,
    params: Any,
    batch: Batch,
    hypers: RoutingHypers,
    key: Array,
    *,
    axis_name: Optional[Axes] = None,
) -> dict[str, Array]:
    """Sums over S samples of pi per token and layer: "tokens"; "predictive", -log (1/S) sum_s p(target | pi_s); "elbo",
    mean_s NLL_s + KL, beta = 1."""

    def once(sample: Array):
        keys = row_keys(key, sample, batch.row)
        output = forward(model, params, batch, hypers, keys=keys)
        return -token_nll(output.logits, batch.targets), jnp.sum(output.routing.kl, axis=0)

    log_likelihoods, kl = jax.lax.map(once, jnp.arange(num_samples))
    mask = batch.loss_mask.astype(jnp.float32)
    sums = {
        "tokens": jnp.sum(mask),
        "predictive": jnp.sum(predictive_nll(log_likelihoods) * mask),
        "elbo": jnp.sum((jnp.mean(-log_likelihoods, axis=0) + kl[0]) * mask),
    }
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def accounted_eval_step(
    model: LanguageModel,
    num_kinds: int,
    params: Any,
    batch: Batch,
    hypers: RoutingHypers,
    *,
    axis_name: Optional[Axes] = None,
) -> tuple[Sums, Accounting]:
    """Sums at the posterior mean, and FLOPs and bytes of all layers for the routes behind them."""
    output = forward(model, params, batch, hypers)
    accounting = count_layers(output.routing.route, model.config, segment_ids=batch.segment_ids)
    totals = loss_sums(output, batch, num_kinds=num_kinds), accounting
    return totals if axis_name is None else jax.lax.psum(totals, axis_name)


@without_mesh
def token_arrays(
    model: LanguageModel,
    dataset: Dataset,
    params: Any,
    hypers: RoutingHypers,
    *,
    split: str,
    max_batches: Optional[int] = None,
) -> dict[str, np.ndarray]:
    """What a model, in its mode, says of every single loss token, on this process's first device: nll (nats), correct
    and kind [token]; mean [layer token mechanism]; uncertainty, route and hard [layer token]; concentration [layer
    token mechanism] and log_uncertainty [layer token] where there is one."""
    by_token: dict[str, list[np.ndarray]] = {}
    by_layer: dict[str, list[np.ndarray]] = {}
    for batch in dataset.eval_batches(split, max_batches=max_batches):
        tokens, layers = jax.device_get(_token_step(model, params, batch, hypers))
        keep = np.asarray(batch.loss_mask)
        for name, values in {**tokens, "kind": batch.kind}.items():
            by_token.setdefault(name, []).append(np.asarray(values)[keep])
        for name, values in layers.items():
            by_layer.setdefault(name, []).append(values[:, keep])
    return {
        **{name: np.concatenate(parts) for name, parts in by_token.items()},
        **{name: np.concatenate(parts, axis=1) for name, parts in by_layer.items()},
    }


@functools.partial(jax.jit, static_argnames="model")
def logits_and_routing(
    model: LanguageModel,
    params: Any,
    tokens: Int[Array, "batch time"],
    segment_ids: SegmentIds,
    positions: Optional[Positions],
    hypers: RoutingHypers,
) -> tuple[Float[Array, "batch time vocab"], Routing]:
    """One forward pass."""
    output = model.apply({"params": params}, tokens, segment_ids=segment_ids, positions=positions, hypers=hypers)
    return output.logits, output.routing


@functools.partial(jax.jit, static_argnames="model")
def _token_step(
    model: LanguageModel, params: Any, batch: Batch, hypers: RoutingHypers
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(arrays [batch time], arrays [layer batch time ...]) of one batch; theta is an array input."""
    output = forward(model, params, batch, hypers)
    routing = output.routing
    tokens = dict(
        nll=token_nll(output.logits, batch.targets), correct=jnp.argmax(output.logits, axis=-1) == batch.targets
    )
    names = ("mean", "uncertainty", "route", "hard", "log_uncertainty", "concentration")
    layers = {name: getattr(routing, name) for name in names}
    return tokens, {name: values for name, values in layers.items() if values is not None}
