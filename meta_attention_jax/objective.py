"""The objective and everything that is always reported.

    J = (1/N) sum_t [ NLL_t + beta sum_layers KL(q_t || p) ]        nats per loss token

with one reparameterised sample of pi per token and layer in training. Controllers to compare with put a penalty of
their own in the place of the KL, or none. What it is, honestly: beta is usually far below 1, and since q sees only
x_{<=t}, E_q[NLL] alone already bounds -log p; the KL is the price of the information about which mechanism.

Sums and normalisation are kept apart: a shard, a micro-batch and an evaluation batch return sums, and `summarise`
divides once, by the global number of loss tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from meta_attention_jax.controller.uncertainty import categorical_entropy
from meta_attention_jax.model import Output
from meta_attention_jax.types import Batch, Routing, RoutingHypers, Scalar

COLLAPSE = 0.99
"""A layer has collapsed when one mechanism takes more than this share of its tokens."""


@flax.struct.dataclass
class Sums:
    """Sums over loss tokens; additive over batches."""

    tokens: Scalar  # N, their number.
    nll: Scalar  # -log p(target), nats.
    fit: Scalar  # What the objective has of the text: the nll, or what a retrofit has in its place; nats.
    num_bytes: Scalar  # Of the targets.
    kl: Float[Array, "layer"]  # KL(q || p), nats.
    penalty: Float[Array, "layer"]  # What the objective adds, times beta; the KL but for some baselines.
    entropy: Float[Array, "layer"]  # H(E pi), nats.
    uncertainty: Float[Array, "layer"]  # u.
    log_uncertainty: Float[Array, "layer"]  # log u, of a measure that has it; else 0.
    hard: Float[Array, "layer"]  # Tokens that used one mechanism only.
    concentration: Float[Array, "layer"]  # Sum of alpha; 0 for controllers without one.
    mean: Float[Array, "layer mechanism"]  # E pi.
    mean_square: Float[Array, "layer mechanism"]  # (E pi)^2.
    kind_tokens: Float[Array, "kind"]
    kind_nll: Float[Array, "kind"]  # Nats.
    kind_correct: Float[Array, "kind"]  # Tokens whose argmax is the target.
    asked: Float[Array, "kind"]  # Windows with a token of the kind.
    exact: Float[Array, "kind"]  # Those of them in which the argmax of every token of the kind is the target.
    routes: Float[Array, "layer kind mechanism"]  # Tokens by k*.


def token_nll(logits: Float[Array, "batch time vocab"], targets: Array) -> Float[Array, "batch time"]:
    """-log softmax(logits)[target], nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def loss_sums(output: Output, batch: Batch, *, num_kinds: int) -> Sums:
    """Sums of all reported quantities over the loss tokens of `batch`."""
    routing = output.routing
    mask = batch.loss_mask.astype(jnp.float32)
    nll = token_nll(output.logits, batch.targets) * mask
    correct = (jnp.argmax(output.logits, axis=-1) == batch.targets).astype(jnp.float32) * mask
    kinds = jax.nn.one_hot(batch.kind, num_kinds, dtype=jnp.float32) * mask[..., None]
    routes = jax.nn.one_hot(routing.route, routing.mean.shape[-1], dtype=jnp.float32)
    asked = jnp.any(kinds > 0, axis=1)  # [batch kind]
    missed = jnp.any(kinds > correct[..., None], axis=1)

    def per_layer(values: Num[Array, "layer batch time"] | Bool[Array, "layer batch time"]) -> Float[Array, "layer"]:
        return jnp.einsum("lbt,bt->l", values.astype(jnp.float32), mask)

    concentration = jnp.zeros_like(routing.uncertainty)
    if routing.concentration is not None:
        concentration = jnp.sum(routing.concentration, axis=-1)
    return Sums(
        tokens=jnp.sum(mask),
        nll=jnp.sum(nll),
        fit=jnp.sum(nll),
        num_bytes=jnp.sum(batch.num_bytes.astype(jnp.float32) * mask),
        kl=per_layer(routing.kl),
        penalty=per_layer(routing.penalty),
        entropy=per_layer(categorical_entropy(routing.mean)),
        uncertainty=per_layer(routing.uncertainty),
        log_uncertainty=(
            jnp.zeros(routing.uncertainty.shape[:1], jnp.float32)
            if routing.log_uncertainty is None
            else per_layer(routing.log_uncertainty)
        ),
        hard=per_layer(routing.hard),
        concentration=per_layer(concentration),
        mean=jnp.einsum("lbtk,bt->lk", routing.mean, mask),
        mean_square=jnp.einsum("lbtk,bt->lk", jnp.square(routing.mean), mask),
        kind_tokens=jnp.sum(kinds, axis=(0, 1)),
        kind_nll=jnp.einsum("bt,btn->n", nll, kinds),
        kind_correct=jnp.einsum("bt,btn->n", correct, kinds),
        asked=jnp.sum(asked, axis=0, dtype=jnp.float32),
        exact=jnp.sum(asked & ~missed, axis=0, dtype=jnp.float32),
        routes=jnp.einsum("lbtk,btn->lnk", routes, kinds),
    )


def distance_to(
    logits: Float[Array, "batch time vocab"], teacher: Float[Array, "batch time vocab"], mask: Array
) -> Scalar:
    """sum_t KL(teacher_t || model_t) over the loss tokens, nats."""
    wanted, got = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1) * mask)


def layers_fit(routing: Routing, mask: Array, tolerance: float) -> Scalar:
    """sum_t sum_l ||o_full - o||^2 / (2 sigma^2 ||x||^2) over the loss tokens: minus the log-likelihood, up to a
    constant, of every layer's own output, sigma the tolerated change of its stream."""
    return jnp.einsum("lbt,bt->", routing.harm, mask.astype(jnp.float32)) / (2.0 * tolerance**2)


def objective(sums: Sums, beta: Scalar) -> Scalar:
    """sum_t NLL_t + beta sum_layers KL_t (or penalty) in nats: *not yet* divided by the number of tokens."""
    return sums.fit + beta * jnp.sum(sums.penalty)


def forward(
    model: nn.Module,
    params: Any,
    batch: Batch,
    hypers: RoutingHypers,
    *,
    keys: Optional[Key[Array, "batch"]] = None,
    route: Optional[Int[Array, "layer batch time"]] = None,
) -> Output:
    """The model on a batch. With `keys`, pi is sampled (training, ELBO); a `route` is forced."""
    return model.apply(
        {"params": params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        hypers=hypers,
        keys=keys,
        route=route,
    )


def apply_sums(
    model: nn.Module,
    params: Any,
    batch: Batch,
    hypers: RoutingHypers,
    *,
    num_kinds: int,
    keys: Optional[Key[Array, "batch"]] = None,
) -> Sums:
    """One forward pass and its sums; `keys` as in `forward`."""
    output = forward(model, params, batch, hypers, keys=keys)
    return loss_sums(output, batch, num_kinds=num_kinds)


def predictive_nll(log_likelihoods: Float[Array, "sample batch time"]) -> Float[Array, "batch time"]:
    """-log (1/S) sum_s p(target | pi_s), nats, from log p(target | pi_s)."""
    samples = log_likelihoods.shape[0]
    return math.log(samples) - jax.nn.logsumexp(log_likelihoods, axis=0)


def _entropy(fractions: np.ndarray) -> np.ndarray:
    """H of the last axis in nats, with 0 log 0 = 0."""
    safe = np.where(fractions > 0, fractions, 1.0)
    return -np.sum(fractions * np.log(safe), axis=-1)


def summarise(
    sums: Sums, *, mechanisms: Sequence[str], costs: Sequence[float] | np.ndarray | Array, beta: float = 0.0
) -> dict[str, Any]:
    """Everything that is reported about a set of tokens, as plain Python numbers.

    In nats per token: loss (at this beta), nll, kl (of all layers), elbo (nll + kl). Of the targets: tokens (their
    number), perplexity, bits_per_byte (None where bytes mean nothing), accuracy. Means over layers: cost (c of k*),
    expected_cost (c . E pi), routing_entropy (H(E pi) / log K), usage_entropy (H(mean route) / log K), hard_fraction,
    uncertainty (u), concentration (sum of alpha), diversity (root of the summed variance of E pi over tokens),
    fraction/<mechanism> (of k*). collapsed_layers is the number of layers above COLLAPSE. "layers" has the routing by
    layer; "kinds", where a corpus tells kinds of tokens apart, has tokens, nll, accuracy and routes by kind, and exact,
    the share of the windows with such tokens in which all of them are right (0 where there are none).
    """
    s = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
    if s.tokens <= 0:
        raise ValueError("loss tokens: expected at least one, got none; the split may be too short.")
    n, num_k = float(s.tokens), len(mechanisms)
    costs = np.asarray(costs, np.float64)
    log_k = math.log(num_k) if num_k > 1 else 1.0
    fractions = s.routes.sum(axis=1) / n  # [layer mechanism]
    mean = s.mean / n
    usage = _entropy(fractions) / log_k
    variance = np.maximum(s.mean_square / n - mean**2, 0.0)
    diversity = np.sqrt(variance.sum(axis=-1))
    nll = float(s.nll) / n
    kl = s.kl / n
    metrics: dict[str, Any] = {
        "tokens": int(n),
        "loss": float(s.fit) / n + beta * float(s.penalty.sum()) / n,
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": float(s.nll / s.num_bytes) / math.log(2) if s.num_bytes > 0 else None,
        "accuracy": float(s.kind_correct.sum()) / n,
        "kl": float(kl.sum()),
        "elbo": nll + float(kl.sum()),
        "cost": float((fractions @ costs).mean()),
        "expected_cost": float((mean @ costs).mean()),
        "routing_entropy": float(s.entropy.mean()) / n / log_k,
        "usage_entropy": float(usage.mean()),
        "hard_fraction": float(s.hard.mean()) / n,
        "uncertainty": float(s.uncertainty.mean()) / n,
        "concentration": float(s.concentration.mean()) / n,
        "diversity": float(diversity.mean()),
        "collapsed_layers": int((fractions.max(axis=-1) > COLLAPSE).sum()),
    }
    for name, fraction in zip(mechanisms, fractions.mean(axis=0)):
        metrics[f"fraction/{name}"] = float(fraction)
    metrics["layers"] = {
        "fractions": fractions.tolist(),
        "mean": mean.tolist(),
        "kl": kl.tolist(),
        "routing_entropy": (s.entropy / n / log_k).tolist(),
        "usage_entropy": usage.tolist(),
        "hard_fraction": (s.hard / n).tolist(),
        "uncertainty": (s.uncertainty / n).tolist(),
        "concentration": (s.concentration / n).tolist(),
        "diversity": diversity.tolist(),
    }
    if len(s.kind_tokens) > 1:
        per_kind = np.maximum(s.kind_tokens, 1.0)
        metrics["kinds"] = {
            "tokens": s.kind_tokens.tolist(),
            "nll": (s.kind_nll / per_kind).tolist(),
            "accuracy": (s.kind_correct / per_kind).tolist(),
            "exact": (s.exact / np.maximum(s.asked, 1.0)).tolist(),
            "fractions": (s.routes / per_kind[None, :, None]).tolist(),
        }
    return metrics


def flatten_scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as `path/to/scalar`: what trackers take. Lists get an index."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten_scalars(value, path + "/"))
        elif isinstance(value, (list, tuple)):
            flat.update(flatten_scalars({str(i): v for i, v in enumerate(value)}, path + "/"))
        elif isinstance(value, (int, float)):
            flat[path] = float(value)
    return flat
