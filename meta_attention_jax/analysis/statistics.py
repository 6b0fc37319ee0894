"""Numbers about numbers: intervals over seeds, how routing meets the truth, what uncertainty finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

LEVEL = 0.95


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval) by Student's t over independent seeds. One value has no interval: its
    half-width is NaN."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError("values: expected at least one, got none.")
    if x.size == 1:
        return float(x[0]), math.nan
    error = x.std(ddof=1) / math.sqrt(x.size)
    return float(x.mean()), float(stats.t.ppf(0.5 + LEVEL / 2, x.size - 1) * error)


def paired_interval(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float]:
    """`interval` of the differences value - baseline over the seeds that both have."""
    common = sorted(values.keys() & baseline.keys())
    if not common:
        raise ValueError(f"seeds: expected some in common, got {sorted(values)} and {sorted(baseline)}.")
    return interval([values[seed] - baseline[seed] for seed in common])


def bootstrap(
    values: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"], *, groups: Optional[Sequence[Any]] = None,
    draws: int = 10_000, seed: int = 0,
) -> tuple[float, float, float]:
    """(weighted mean, lower and upper end of its 95 % interval) by drawing anew the n values, or the groups (documents)
    that they belong to, which are independent."""
    x, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if x.shape != w.shape or not x.size:
        raise ValueError(f"values: expected at least one, each with a weight, got {x.shape} and {w.shape}.")
    _, group = np.unique(np.arange(x.size) if groups is None else np.asarray(groups), return_inverse=True)
    total, weight = np.bincount(group, x * w), np.bincount(group, w)
    drawn = np.random.default_rng(seed).integers(len(total), size=(draws, len(total)))
    means = total[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.average(x, weights=w)), float(low), float(high)


def auroc(scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2; NaN without either of them. The Mann-Whitney
    statistic, by mid-ranks."""
    positive = np.asarray(positive, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    ranks = stats.rankdata(np.asarray(scores, np.float64))
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def routing_truth(
    mean: Float[np.ndarray, "layer token mechanism"],
    route: Int[np.ndarray, "layer token"],
    kind: Int[np.ndarray, "token"],
    *,
    mechanism: int,
    needed: int,
) -> list[dict[str, float]]:
    """How each layer's use (E pi, k*) of a mechanism meets the tokens of the kind that needs it. Per layer: precision
    P(kind | k* is the mechanism) (NaN if never used), recall P(k* is the mechanism | kind), other P(k* is the mechanism
    | another kind), and auroc of E pi_mechanism for the kind."""
    truth = np.asarray(kind) == needed
    rows = []
    for layer_mean, layer_route in zip(mean, route, strict=True):
        used = np.asarray(layer_route) == mechanism
        both = float((used & truth).sum())
        rows.append({
            "precision": both / used.sum() if used.any() else math.nan,
            "recall": both / truth.sum() if truth.any() else math.nan,
            "other": float(used[~truth].mean()) if not truth.all() else math.nan,
            "auroc": auroc(layer_mean[:, mechanism], truth),
        })
    return rows


def oracle_cost(kind_tokens: Sequence[float], true_costs: Sequence[float], *, cheapest: float, layers: int) -> float:
    """Cost of routing by the truth: one layer gives every kind its mechanism, the others the cheapest.

        (sum_kind share(kind) c(true mechanism) + (L - 1) min c) / L

    Of the routings that give every token what it needs, none is cheaper.
    """
    share = np.asarray(kind_tokens, np.float64) / np.sum(kind_tokens)
    return float((share @ np.asarray(true_costs) + (layers - 1) * cheapest) / layers)


def mutual_information(counts: Float[np.ndarray, "kind mechanism"]) -> float:
    """I(route; kind) in nats from joint counts: 0 if routes know nothing of the kind."""
    joint = np.asarray(counts, np.float64)
    joint = joint / joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


def risk_coverage(
    score: Float[np.ndarray, "token"], harm: Float[np.ndarray, "token"], points: int = 101
) -> dict[str, Any]:
    """Mean harm of the least uncertain share of the tokens, over the share.

    Tokens enter in order of rising score (those of equal score together, at their mean harm), so a measure that knows
    where it hurts keeps the curve low until the end. Random order is flat.

    `score` is u of every token (higher is hardened later), `harm` what hardening it costs (nats). Returns coverage and
    risk [points]; area, the mean of the risk over all coverages; random, the mean harm; best, the area of the order by
    harm itself; gain, how much of the way from random to best the area goes (NaN where all tokens are alike).
    """
    score, harm = np.asarray(score, np.float64), np.asarray(harm, np.float64)
    if score.shape != harm.shape or not score.size:
        raise ValueError(f"score: expected one number per token, like harm {harm.shape}, got {score.shape}.")

    def curve(order_by):
        order = np.argsort(order_by, kind="stable")
        _, group = np.unique(order_by, return_inverse=True)
        tied = np.bincount(group, harm) / np.bincount(group)
        return np.cumsum(tied[group][order]) / np.arange(1, harm.size + 1)

    risk = curve(score)
    at = np.clip(np.round(np.linspace(0, 1, points) * harm.size).astype(int) - 1, 0, None)
    area, random, best = float(risk.mean()), float(harm.mean()), float(curve(harm).mean())
    return {
        "coverage": np.linspace(0, 1, points).tolist(),
        "risk": risk[at].tolist(),
        "area": area,
        "random": random,
        "best": best,
        "gain": (random - area) / (random - best) if random > best else math.nan,
    }


def calibration(
    predicted: Float[np.ndarray, "n"], true: Bool[np.ndarray, "n"], bins: int = 15
) -> dict[str, Any]:
    """How probabilities meet what came true: "ece" = sum_bins (n_bin / n) |mean predicted - rate| over bins of equal
    width (Guo et al., arXiv 1706.04599), "brier" = mean (predicted - true)^2, and of every bin that is not empty its
    mean "predicted", "rate" and "count"."""
    p, y = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if p.shape != y.shape or not p.size:
        raise ValueError(f"predicted: expected one number per label {y.shape}, got {p.shape}.")
    place = np.clip((p * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = count > 0
    mean, rate = (np.bincount(place, x, minlength=bins)[some] / count[some] for x in (p, y))
    return {
        "ece": float(np.sum(count[some] * np.abs(mean - rate)) / p.size), "brier": float(np.mean((p - y) ** 2)),
        "predicted": mean.tolist(), "rate": rate.tolist(), "count": count[some].tolist(),
    }
