"""Does the prior do what it says? Its strength and preference against share, harm and uncertainty, with the
controllers' data reduced to a few windows; and controllers that were trained on prose, read on code.

A prior should help most where data is scarce. Trained by the local ELBO on n windows of the mixture (drawn anew for
each seed) for as many steps as ever, every point is judged by the harm that it leaves on 20 validation windows at a
share of 20 and 30 %, by its own share at lambda 0, and by its uncertainty; the Bayesian and the cost-penalty arm of
each n also by nats on held-out windows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.studies.pretrained import end_to_end, local, plan, routers
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.console import say
from meta_attention_jax.controller.uncertainty import MEASURES

SIZES = (1, 5, 20, 100)
STRENGTHS, PREFERENCES = (0.5, 2.0, 8.0, 32.0), (0.03, 0.3)
READ = ("bayesian", "cost_penalty")  # By nats, each at its chosen setting.
READ_WINDOWS = 12  # Of each main kind, and of code by the controllers of prose.
PROSE = "prose"


def points(study: Study) -> list[Point]:
    """The chosen settings, and the Bayesian arm over strengths and preferences, for every n and seed; of prose alone
    the arms that read."""
    beta = routers.chosen(study.record, "bayesian")["beta"]
    chosen = [routers.chosen(study.record, arm) for arm in plan.ARMS]
    swept = [
        dict(arm="prior", controller="bayesian", strength=kappa, preference=eta, beta=beta)
        for kappa in STRENGTHS for eta in PREFERENCES
    ]
    of = lambda setting, data, seed: Point(**{**setting, "data": data}, seed=seed)  # noqa: E731
    found = [
        of(setting, f"{size} {seed}", seed) for size in SIZES for seed in plan.SEEDS for setting in chosen + swept
    ]
    return found + [of(s, PROSE, seed) for seed in plan.SEEDS for s in chosen if s["arm"] in READ]


def windows_of(data: str) -> np.ndarray:
    """Numbers of the training windows of a pool's name."""
    if data == PROSE:  # Two of five of the mixture.
        return np.flatnonzero(np.isin(np.arange(plan.TRAINING_WINDOWS) % 5, (0, 3)))
    size, seed = map(int, data.split())
    return np.random.default_rng([size, seed]).permutation(plan.TRAINING_WINDOWS)[:size]


def row_of(study: Study, point: Point, params: Any) -> dict[str, Any]:
    """What a point leaves on validation, and what it is unsure of."""
    held, controller = study.pool("validation"), routers.controller_of(study, point)
    z, _ = local.scores(controller, params, held, point, plan.COSTS)
    some = local.taken(held, np.arange(0, len(held.position), 16))
    found = local.routing(controller, params, some, point.hypers(plan.COSTS), None)
    doubt = {"entropy": float(MEASURES["entropy"].function(found.mean).mean())}
    if found.concentration is not None:
        doubt |= {
            "vacuity": float(MEASURES["vacuity"].function(found.concentration).mean()),
            "counts": float(jnp.sum(found.concentration, axis=-1).mean()),
        }
    left = {f"left@{share}": local.left(z, held.harm, share) for share in plan.CHOSEN_AT}
    return {**dataclasses.asdict(point), **left, "share": float(np.mean(z > 0)), **doubt}


def trained(study: Study) -> dict[tuple[str, str, int], tuple[Point, Any]]:
    """(arm, pool, seed) -> point and controllers of the arms that read; rows of all points are kept."""
    every, pool = points(study), study.pool("train")
    rows, kept = [], {}
    for data in dict.fromkeys(point.data for point in every):
        own = [point for point in every if point.data == data]
        say(f"windows {data}: {len(own)} points")
        study.check_time()
        found = local.train(
            own, {data: pool.of(windows_of(data))}, plan.COSTS, steps=plan.LOCAL_STEPS,
            hidden=study.config.controller.hidden, say=lambda words: None,
        )
        for point, params in zip(own, found):
            rows.append({"windows": len(windows_of(data)), **row_of(study, point, params)})
            if point.arm in READ:
                kept[point.arm, data, point.seed] = point, {"layers": {"attention": {"controller": params}}}
    study.record.choose("scarce", lambda: rows)
    return kept


def read_all(study: Study, count: int) -> None:
    """Trains all points; reads a few windows by some of them."""
    known = trained(study)
    prices = {
        key: end_to_end.price_at(study, f"scarce {' '.join(map(str, key))}", one, 0.3) for key, one in known.items()
    }
    study.forget_pools()

    def jobs(window: Window) -> list[Job]:
        return [
            (f"{key[0]} of {key[1].split()[0]} windows@0.3", key[2], 0.3, end_to_end.reading(study, known[key], price))
            for key, price in prices.items() if window.kind in plan.MAIN or key[1] == PROSE
        ]

    study.read((*plan.MAIN, "code"), min(count, READ_WINDOWS), jobs)
