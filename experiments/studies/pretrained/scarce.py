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

from experiments.studies.pretrained import local, plan, routers
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.routers import Trained
from experiments.studies.pretrained.study import Job, Record, Study
from meta_attention_jax.console import say
from meta_attention_jax.controller.uncertainty import MEASURES

SIZES = (1, 5, 20, 100)
STRENGTHS, PREFERENCES, BETA = (0.5, 2.0, 8.0, 32.0), (0.03, 0.3), 0.1
READ = ("bayesian", "cost_penalty")  # By nats, each at its chosen setting.
READ_WINDOWS = 12  # Of each main kind, and of code by the controllers of prose.
PROSE = "prose"


def points(record: Record, data: str) -> list[Point]:
    """Of one pool: the settings that are chosen at 30 %, and the Bayesian arm over strengths and preferences; of prose
    the arms that read."""
    chosen = {arm: routers.chosen(record, arm, 0.3) for arm in plan.ARMS}
    swept = [
        dict(arm="prior", controller="bayesian", strength=kappa, preference=eta, beta=BETA)
        for kappa in STRENGTHS for eta in PREFERENCES
    ]
    settings = [chosen[arm] for arm in READ] if data.startswith(PROSE) else [*chosen.values(), *swept]
    return [Point(**{**setting, "data": data}, seed=int(data.split()[1])) for setting in settings]


def windows_of(data: str) -> np.ndarray:
    """Numbers of the training windows of a pool's name."""
    if data.startswith(PROSE):  # Two of five of the mixture.
        return np.flatnonzero(np.isin(np.arange(plan.TRAINING_WINDOWS) % 5, (0, 3)))
    size, seed = map(int, data.split())
    return np.random.default_rng([size, seed]).permutation(plan.TRAINING_WINDOWS)[:size]


def row_of(study: Study, point: Point, params: Any) -> dict[str, Any]:
    """What a point leaves on validation, and what it is unsure of."""
    held, controller = study.pool("validation"), routers.controller_of(study, point)
    z, _ = local.scores(controller, params, local.chunks(held), point, plan.COSTS)
    some = local.taken(held, np.arange(0, len(held.position), 16))
    found = local.routing(controller, params, some, point.hypers(plan.COSTS), None)
    doubt = {"entropy": float(MEASURES["entropy"].function(found.mean).mean())}
    if found.concentration is not None:
        doubt |= {
            "vacuity": float(MEASURES["vacuity"].function(found.concentration).mean()),
            "counts": float(jnp.sum(found.concentration, axis=-1).mean()),
        }
    left = {f"left@{share}": local.left(z, held.harm, share) for share in plan.CHOSEN_AT}
    return {"windows": len(windows_of(point.data)), **dataclasses.asdict(point), **left,
            "share": float(np.mean(z > 0)), **doubt}


def trained(study: Study) -> dict[tuple[str, str], Trained]:
    """(arm, pool) -> the routers that read, pool by pool; rows of all points are kept."""
    known: dict[tuple[str, str], Trained] = {}
    for data in [f"{size} {seed}" for size in (*SIZES, PROSE) for seed in plan.SEEDS]:
        own = points(study.record, data)
        reads = [point for point in own if point.arm in READ]
        there = all(routers.file_of(study.workdir, point).is_file() for point in reads)
        if not there or f"scarce {data}" not in study.record.found:
            study.check_time()
            pool = study.pool("train").of(windows_of(data))
            found = local.train(
                own, {data: pool}, plan.COSTS, steps=plan.LOCAL_STEPS, hidden=study.config.controller.hidden,
                say=lambda words: None,
            )
            for point, params in zip(own, found):
                if point in reads:
                    routers.save(study.workdir, point, params)
            rows = [row_of(study, point, params) for point, params in zip(own, found)]
            study.record.find(f"scarce {data}", lambda: rows)  # noqa: B023
            say(f"windows {data}: {len(own)} points")
        known |= {(point.arm, data): routers.load(study.workdir, point) for point in reads}
    return known


def read_all(study: Study, count: int) -> None:
    """Trains all points; reads a few windows by some of them."""
    known = trained(study)
    study.forget_pools()
    prices = {
        key: routers.price_at(study, f"scarce {' '.join(key)}", one, 0.3,
                              routers.first_price(study.record, dataclasses.replace(one.point, data="mixture"), 0.3))
        for key, one in known.items()
    }

    def jobs(window: Window) -> list[Job]:
        return [
            (f"{arm} of {data.split()[0]} windows@0.3", int(data.split()[1]), 0.3,
             routers.reading(study, known[arm, data], price))
            for (arm, data), price in prices.items() if window.kind in plan.MAIN or data.startswith(PROSE)
        ]

    study.read((*plan.MAIN, "code"), min(count, READ_WINDOWS), jobs)
