"""What the rows say: nats above full attention by arm, differences between arms, and whether the goal is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from jaxtyping import Float

from experiments.studies.pretrained import plan
from meta_attention_jax.analysis.statistics import bootstrap, interval

Rows = Sequence[Mapping[str, Any]]

CONTRASTS = (
    ("bayesian@0.3", "best layers"), ("bayesian@0.2", "best layers"), ("bayesian@0.3", "KV heads"),
    ("bayesian@0.3", "best layers@0.5"), ("bayesian@0.3", "KV heads@0.5"), ("bayesian@0.3", "every k-th@0.5"),
    ("bayesian@0.3", "bayesian shuffled@0.3"), ("bayesian@0.3", "bayesian random@0.3"),
    ("bayesian@0.3", "token table"), ("bayesian@0.3", "position"),
    ("bayesian@0.3", "cost_penalty"), ("bayesian@0.2", "cost_penalty"),
    ("bayesian@0.2", "cost_penalty for 20 %@0.2"), ("bayesian for 20 %@0.2", "cost_penalty for 20 %@0.2"),
    ("bayesian for 20 %@0.2", "cost_penalty@0.2"), ("bayesian@0.3", "local bayesian"),
    ("bayesian@0.3", "oracle"), ("bayesian@0.2", "oracle"),
    ("local bayesian@0.3", "best layers"), ("local bayesian@0.2", "best layers"),
    ("local bayesian@0.3", "KV heads"), ("local bayesian@0.3", "best layers@0.5"),
    ("local bayesian@0.3", "KV heads@0.5"),
    ("local bayesian@0.3", "local bayesian shuffled@0.3"), ("local bayesian@0.3", "local bayesian random@0.3"),
    ("local bayesian@0.3", "token table"), ("local bayesian@0.3", "position"),
    ("local bayesian@0.3", "local cost_penalty"), ("local bayesian@0.2", "local cost_penalty"),
    ("local bayesian@0.3", "local softmax"), ("local bayesian@0.2", "local softmax"),
    ("local bayesian@0.3", "local bayesian_mean"), ("local bayesian@0.2", "local bayesian_mean"),
    ("local bayesian@0.3", "local bayesian_beta0"), ("local bayesian@0.2", "local bayesian_beta0"),
    ("local bayesian@0.3", "oracle"), ("local bayesian@0.2", "oracle"),
    *((f"bayesian of {size} windows@0.3", f"cost_penalty of {size} windows@0.3") for size in (1, 5, 20, 100, "prose")),
    *((f"{arm} cautious by {measure}@0.3", arm) for arm in ("local bayesian", "bayesian")
      for measure in ("vacuity", "mutual_information")),
)
"""(arm, another at its own share, or a family: at the first one's share in every window, between the shares that the
family was read at)."""


def summary(rows: Rows) -> list[dict[str, Any]]:
    """A row per kind and arm: nats above full attention on the same windows with the interval of a bootstrap over
    documents, every window counted once, and over the seeds where there are several; share; exact answers."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        base = {window: own[-1] for window, own in by_window(rows, kind, "full").items()}
        for arm in dict.fromkeys(row["arm"] for row in rows if row["kind"] == kind):
            own = [row for row in rows if row["kind"] == kind and row["arm"] == arm and row["window"] in base]
            if not own:
                continue
            above = np.array([row["nll"] - base[row["window"]]["nll"] for row in own])
            once = one_each([row["window"] for row in own])
            tokens = np.array([row["tokens"] for row in own], float)
            documents = [row["document"] for row in own]
            middle, low, high = bootstrap(above, tokens * once, groups=documents)
            mean = lambda key: float(np.average([row[key] for row in own], weights=once))  # noqa: B023, E731
            line = {
                "task": kind, "arm": arm, "windows": len({row["window"] for row in own}),
                "documents": len(set(documents)), "seeds": len({row["seed"] for row in own}), "share": mean("share"),
                "nll": float(np.average([row["nll"] for row in own], weights=tokens * once)),
                "above": middle, "above_low": low, "above_high": high, "keys": mean("keys"),
                **over_seeds(above, tokens, own),
            }
            if "flops" in own[0]:
                line["flops"] = mean("flops")
            if own[0]["exact"] is not None:
                right = np.array([row["exact"] for row in own], float)
                line["exact"], line["exact_low"], line["exact_high"] = bootstrap(right, once, groups=documents)
            found.append(line)
    return found


def one_each(windows: Sequence[int]) -> Float[np.ndarray, "n"]:
    """Weights of readings by which every window counts once, whether one seed has read it or all."""
    _, own, often = np.unique(windows, return_inverse=True, return_counts=True)
    return 1.0 / often[own]


def over_seeds(
    values: Float[np.ndarray, "n"], tokens: Float[np.ndarray, "n"], rows: Rows
) -> dict[str, Optional[float]]:
    """Mean and half the width of the 95 % interval over seeds, on the windows that all of them have read; None below
    `plan.FOR_SEEDS` of these: seeds that take turns have not read the same. The mean is of these windows too."""
    read: dict[int, set[int]] = {}
    for row in rows:
        read.setdefault(row["seed"], set()).add(row["window"])
    common = set.intersection(*read.values())
    if len(read) < 2 or len(common) < plan.FOR_SEEDS:
        return {"seed_mean": None, "seed_pm": None}
    at = {seed: np.array([row["seed"] == seed and row["window"] in common for row in rows]) for seed in read}
    middle, pm = interval([float(np.average(values[own], weights=tokens[own])) for own in at.values()])
    return {"seed_mean": middle, "seed_pm": pm}


def by_window(rows: Rows, kind: str, arm: str) -> dict[int, dict[int, Mapping[str, Any]]]:
    """window -> seed -> the reading of an arm; -1 is the seed of what has none."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind and row["arm"] == arm:
            found.setdefault(row["window"], {})[row["seed"]] = row
    return found


BEYOND = 0.02
"""Of share, that a window may lie outside of what it is compared with: a curve is not known there."""


def contrast(rows: Rows, kind: str, arm: str, other: str) -> Optional[dict[str, Any]]:
    """Nats of one arm less those of another, in pairs of windows and of seeds where both have some, with the interval
    of a bootstrap over documents, and over seeds on the windows that all of them have read."""
    mine = by_window(rows, kind, arm)
    if "@" in other:
        families = [by_window(rows, kind, other)]
    else:
        shares = sorted({row["arm"] for row in rows if row["kind"] == kind and row["arm"].split("@")[0] == other})
        families = [by_window(rows, kind, name) for name in shares]
    pairs = []
    for window, seeds in mine.items():
        for seed, row in seeds.items():
            knots = [own for own in (_of_seed(family.get(window, {}), seed) for family in families) if own is not None]
            if knots and len(knots) == len(families):
                knots.sort(key=lambda knot: knot[0])
                share, nats = (list(part) for part in zip(*knots))
                at = float(np.clip(row["share"], share[0], share[-1]))
                if "@" in other or abs(at - row["share"]) <= BEYOND:
                    pairs.append((row, row["nll"] - float(np.interp(at, share, nats)), at))
    if not pairs:
        return None
    own, differ, at = ([pair[i] for pair in pairs] for i in range(3))
    tokens, differ = np.array([row["tokens"] for row in own], float), np.array(differ)
    once = one_each([row["window"] for row in own])
    middle, low, high = bootstrap(differ, tokens * once, groups=[row["document"] for row in own])
    return {
        "task": kind, "arm": arm, "other": other, "windows": len({row["window"] for row in own}),
        "difference": middle, "low": low, "high": high, **over_seeds(differ, tokens, own),
        "share": float(np.average([row["share"] for row in own], weights=once)),
        "other_share": float(np.average(at, weights=once)),
    }


def _of_seed(own: Mapping[int, Mapping[str, Any]], seed: int) -> Optional[tuple[float, float]]:
    """(share, nats) of the same seed, or of what has none; for what has none itself, the mean over seeds."""
    rows = [own[each] for each in (seed, -1) if each in own][:1] or (list(own.values()) if seed == -1 else [])
    mean = lambda key: float(np.mean([row[key] for row in rows]))  # noqa: E731
    return (mean("share"), mean("nll")) if rows else None


def contrasts(rows: Rows) -> list[dict[str, Any]]:
    """All of `CONTRASTS` that there are rows for."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = (contrast(rows, kind, *pair) for pair in CONTRASTS for kind in kinds)
    return [one for one in found if one is not None]


def goal(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of `summary`, arms that have read every main kind: is each at most `plan.GOAL` above full attention, all at
    once? "yes" and "no" by intervals over documents, "open" where one lies on both sides; the tightest first."""
    found = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = {line["task"]: line for line in lines if line["arm"] == arm and line["task"] in plan.MAIN}
        if arm in ("full", "local") or len(own) < len(plan.MAIN):
            continue
        says = "yes" if all(line["above_high"] <= plan.GOAL for line in own.values()) else "open"
        says = "no" if any(line["above_low"] > plan.GOAL for line in own.values()) else says
        found.append({
            "arm": arm, "share": float(np.mean([line["share"] for line in own.values()])), "met": says,
            "worst": max(line["above"] for line in own.values()),
            "windows": min(line["windows"] for line in own.values()),
            **{kind: f"{line['above']:+.3f} ({line['above_low']:.3f} to {line['above_high']:.3f})"
               for kind, line in own.items()},
        })
    return sorted(found, key=lambda line: line["worst"])
