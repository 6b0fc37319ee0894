"""The price that keeps a budget, found on validation and kept with the run.

k* = argmax_k (E pi_k - lambda c_k): the dearer mechanisms lose tokens as lambda rises, so that projected cost and the
share of full attention fall with it (of one layer strictly; of several nearly, for the routes of one change what the
next sees).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np

from meta_attention_jax.config import read_stored
from meta_attention_jax.fields import LARGEST, expect, real
from meta_attention_jax.files import Place, write_whole

FILE = "budgets.json"
HALVINGS = 16
"""Of the range of prices: the last is some 1e-4 wide."""

KINDS = {"cost": "cost", "share": "fraction/full"}
"""What a budget is of, and the metric that it bounds."""


def check_budget(
    cost: Optional[float], share: Optional[float], costs: Sequence[float], mechanisms: Sequence[str]
) -> tuple[str, float]:
    """(kind, value) of the one budget that is given."""
    given = {kind: value for kind, value in (("cost", cost), ("share", share)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"budget: expected a cost or a share, got {given or 'none'}.")
    [(kind, value)] = given.items()
    value = real(kind, value)
    least = min(map(float, costs)) if kind == "cost" else 0.0
    if not least <= np.float32(value) <= 1.0:  # Costs are float32.
        what = "the cheapest mechanism's" if kind == "cost" else "no token"
        raise ValueError(f"{kind}: expected a budget in [{least:g} ({what}), 1], got {value:g}.")
    if kind == "share":
        expect("full" in mechanisms, "share", "full attention among the mechanisms", tuple(mechanisms))
        full = float(costs[tuple(mechanisms).index("full")])
        if full < max(map(float, costs)):  # A price would send tokens there.
            raise ValueError(f"share: expected full attention to cost most, got {full:g} of 1.")
    return kind, value


def price_range(costs: Sequence[float]) -> tuple[float, float]:
    """Prices at which every token takes the dearest, and the cheapest, mechanism, whatever its E pi."""
    distinct = sorted({float(c) for c in costs})
    if len(distinct) < 2:
        raise ValueError(f"costs: expected two or more that differ for a price, got {tuple(costs)}.")
    return -1.01 / (distinct[-1] - distinct[-2]), 1.01 / (distinct[1] - distinct[0])


def find_price(spent: Callable[[float], float], budget: float, costs: Sequence[float]) -> float:
    """The lowest price, to within the last halving, at which `spent(price)` is at most `budget`.

    0, the plain argmax, is taken only if it is such a price by itself: a budget above what the argmax spends is used up
    by a discount.
    """
    low, high = price_range(costs)
    if spent(low) <= budget:
        return low
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high


def read_budgets(path: Place) -> list[dict[str, Any]]:
    """What was found for the run in `path`; one dict a budget. Raises ValueError for a damaged file."""
    if not (path / FILE).exists():
        return []
    found = read_stored(path / FILE, "budgets").get("budgets")
    ok = isinstance(found, list) and all(
        isinstance(one, dict) and {"kind", "budget", "step", "price"} <= one.keys()
        and isinstance(one["price"], (int, float)) and abs(one["price"]) <= LARGEST
        for one in found
    )
    if not ok:
        raise ValueError(f"workdir: expected budgets in {str(path / FILE)!r}, got something else.")
    return found


def keep_budget(path: Place, found: dict[str, Any]) -> None:
    """Writes a budget beside the others of the run; one of the same kind, value, step and length gives way."""
    same = ("kind", "budget", "step", "length")
    others = [one for one in read_budgets(path) if any(one.get(key) != found[key] for key in same)]
    content = {"budgets": [*others, found]}
    write_whole(path / FILE, (json.dumps(content, indent=1) + "\n").encode())


def stored_price(path: Place, kind: str, budget: float, step: int, length: int) -> float:
    """The price that was found, on sequences of `length` tokens."""
    found = read_budgets(path)
    for one in found:
        same = one["kind"] == kind and np.float32(one["budget"]) == np.float32(budget) and one["step"] == step
        if same and one.get("length", length) == length:  # The first ones were of the trained length.
            return float(one["price"])
    known = ", ".join(
        f"{one['kind']} {one['budget']:g} at step {one['step']}, length {one.get('length', 'as trained')}"
        for one in found
    )
    raise ValueError(
        f"{kind}: expected a budget found for the run (python -m experiments.evaluate "
        f"--budget_{kind}={budget:g}), got {budget:g} at step {step}, length {length}; found are {known or 'none'}."
    )


def at_budget(run: Any, cost: Optional[float], share: Optional[float]) -> Any:
    """See `Run.at_budget`."""
    kind, value = check_budget(cost, share, run.hypers.routing.costs, run.mechanisms)
    return run.at(price=stored_price(run.path, kind, value, run.step, run.sequence_length), mode="hard")


def fit_budget(run: Any, cost: Optional[float], share: Optional[float], max_batches: Optional[int]) -> Any:
    """See `Run.fit_budget`."""
    costs = run.hypers.routing.costs
    kind, value = check_budget(cost, share, costs, run.mechanisms)
    if run.model.config.router.is_fixed:
        raise ValueError(f"{kind}: expected a run that routes, got controller.name = 'fixed'.")
    where = dict(split="validation", mode="hard", max_batches=max_batches)
    run.evaluate(**where)  # What this compiles, its copies at other prices share.
    price = find_price(lambda at: run.at(price=at).evaluate(**where)[KINDS[kind]], value, costs)
    run = run.at(price=price, mode="hard")
    found = run.evaluate(**where)
    keep_budget(run.path, {
        "kind": kind, "budget": value, "step": run.step, "length": run.sequence_length,
        "price": float(run.hypers.routing.price),
        "cost": found["cost"], "share": found.get("fraction/full"), "nll": found["nll"],
        "tokens": found["tokens"],
    })
    return run
