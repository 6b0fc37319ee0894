"""What a mechanism costs: the vector c that shapes the prior, and the FLOPs of a model.

Two kinds of numbers live here and are never mixed:

* *costs* c in (0, 1]^K, dimensionless, divided by the largest. They enter the prior and the
  projected cost of a routing.
* *FLOPs*, 2 per multiply-add, of matrix products only. Softmax, norms and activations are left out,
  as is the usual convention for model FLOPs.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from meta_attention_jax.mechanisms.registry import get_mechanism

NOMINAL = {"full": 1.0, "linear": 0.15, "local": 0.30}
"""Costs of the paper (arXiv 2605.28384)."""

COST_KINDS = ("nominal", "analytic")


def nominal_costs(mechanisms: Sequence[str]) -> np.ndarray:
    """The paper's costs, on the axis `mechanisms`, divided by their largest.

    Raises:
      ValueError: a mechanism without a nominal cost (a custom one needs `costs` as numbers).
    """
    unknown = [name for name in mechanisms if name not in NOMINAL]
    if unknown:
        raise ValueError(
            f"costs: expected numbers, since 'nominal' covers {', '.join(NOMINAL)} only; "
            f"got the mechanism {unknown[0]!r}."
        )
    costs = np.array([NOMINAL[name] for name in mechanisms], np.float32)
    return costs / costs.max()


def analytic_costs(
    mechanisms: Sequence[str], *, time: int, dim: int, window: int, causal: bool = True
) -> np.ndarray:
    """FLOPs of each mechanism on a sequence of `time` tokens, divided by the largest.

    Short sequences can make `linear` the dearest of the three (it costs about 4 d^2 per token
    against 2 d T of causal full attention); that is the truth, not a mistake.
    """
    flops = [
        get_mechanism(name).flops(time, dim, causal=causal, window=window) for name in mechanisms
    ]
    costs = np.array(flops, np.float64)
    return (costs / costs.max()).astype(np.float32)


def resolve_costs(
    costs: str | Sequence[float],
    mechanisms: Sequence[str],
    *,
    time: int,
    dim: int,
    window: int,
    causal: bool = True,
) -> np.ndarray:
    """`costs` as numbers: "nominal", "analytic", or one positive number per mechanism.

    Raises:
      ValueError: unknown kind, wrong length, or a number that is not positive.
    """
    if isinstance(costs, str):
        if costs == "nominal":
            return nominal_costs(mechanisms)
        if costs == "analytic":
            return analytic_costs(mechanisms, time=time, dim=dim, window=window, causal=causal)
        raise ValueError(f"costs: expected one of {COST_KINDS} or numbers, got {costs!r}.")
    values = np.asarray(costs, np.float32)
    if values.shape != (len(mechanisms),) or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(
            f"costs: expected {len(mechanisms)} positive numbers, one per mechanism, got {costs!r}."
        )
    return values / values.max()


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token of a model, split by what spends them.

    Attributes:
      projections: q, k, v and output projections of all layers.
      mlp: gated MLPs of all layers.
      logits: the output head.
      controller: the routing MLPs of all layers.
      mechanisms: attention proper, per mechanism, as if every token of every layer used it.
    """

    projections: float
    mlp: float
    logits: float
    controller: float
    mechanisms: dict[str, float]

    @property
    def trunk(self) -> float:
        """Everything that no route can save."""
        return self.projections + self.mlp + self.logits + self.controller

    @property
    def dense(self) -> float:
        """FLOPs per token when every mechanism runs on every token (soft, and dense select)."""
        return self.trunk + sum(self.mechanisms.values())

    def routed(self, fractions: dict[str, float]) -> float:
        """FLOPs per token if only the chosen mechanism ran, at these route fractions.

        A projection: it holds only where dispatch skips what no token asks for.
        """
        return self.trunk + sum(self.mechanisms[name] * f for name, f in fractions.items())

    @property
    def controller_share(self) -> float:
        """Share of the dense FLOPs that decides rather than attends."""
        return self.controller / self.dense


def count_flops(
    *,
    vocab_size: int,
    model_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    mechanisms: Sequence[str],
    window: int,
    time: int,
    controller_hidden: int,
    controller_outputs: int,
) -> FlopCount:
    """Forward FLOPs per token of the language model at sequences of `time` tokens.

    Per layer: projections 2 D d (2 H + 2 G), gated MLP 6 D F, controller 2 ((D + 2) h + h n) with h
    hidden units and n outputs (0 for a fixed route), mechanisms H flops_k(T) / T; logits 2 D V.
    """
    controller = 0.0
    if controller_outputs:
        controller = 2.0 * controller_hidden * (model_dim + 2 + controller_outputs)
    per_mechanism = {
        name: num_layers * num_heads * get_mechanism(name).flops(time, head_dim, window=window) / time
        for name in mechanisms
    }
    return FlopCount(
        projections=num_layers * 2.0 * model_dim * head_dim * (2 * num_heads + 2 * num_kv_heads),
        mlp=num_layers * 6.0 * model_dim * mlp_dim,
        logits=2.0 * model_dim * vocab_size,
        controller=num_layers * controller,
        mechanisms=per_mechanism,
    )
