"""Routers that are trained by the local ELBO, the oracle, and routes in disorder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.benchmarks.common import environment
from experiments.studies.pretrained import arms, local, plan
from experiments.studies.pretrained.arms import Read, Reader
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Record, Study
from meta_attention_jax.console import say
from meta_attention_jax.controller.baselines import make_controller


def controller_of(study: Study, point: Point) -> Any:
    """The package's controller of a point."""
    return make_controller(dataclasses.replace(study.reader.model.config.router, controller=point.controller))


def train(study: Study, points: Sequence[Point]) -> list[Any]:
    """Parameters of every point."""
    return local.train(
        points, {"mixture": study.pool("train")}, plan.COSTS, steps=plan.LOCAL_STEPS,
        hidden=study.config.controller.hidden, say=say,
    )


def choose_settings(study: Study) -> list[Any]:
    """Trains the whole grid, notes what harm every point leaves on validation, and keeps the chosen of every arm."""
    points = plan.grid()
    trained = train(study, points)
    held = study.pool("validation")
    rows = []
    for point, params in zip(points, trained):
        z, mean = local.scores(controller_of(study, point), params, held, point, plan.COSTS)
        left = {f"left@{share}": local.left(z, held.harm, share) for share in plan.CHOSEN_AT}
        rows.append({**dataclasses.asdict(point), **left, "share": float(np.mean(z > 0)), "full": float(mean.mean())})
    rows.append({"arm": "oracle", **{f"left@{s}": local.left(held.harm, held.harm, s) for s in plan.CHOSEN_AT}})
    study.record.choose("grid", lambda: rows)
    study.record.choose("environment", environment)
    for point, params in zip(points, trained):
        if plan.setting(point) == chosen(study.record, point.arm):
            save(study.workdir, point, params)
    return rows


def chosen(record: Record, arm: str) -> dict[str, Any]:
    """The setting of an arm that leaves the least harm on validation, mean over seeds and shares."""
    totals: dict[str, list[float]] = {}
    for row in record.choices["grid"]:
        if row["arm"] == arm:
            key = json.dumps({key: row[key] for key in plan.setting(Point(arm, ""))})
            totals.setdefault(key, []).append(sum(row[f"left@{share}"] for share in plan.CHOSEN_AT))
    return json.loads(min(totals, key=lambda key: float(np.mean(totals[key]))))


def save(workdir: pathlib.Path, point: Point, params: Any) -> None:
    """Controllers of one point into the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez(workdir / f"{point.arm}_{point.seed}.npz", **{"/".join(k): v for k, v in flatten_dict(params).items()})


def routers(study: Study) -> dict[tuple[str, int], tuple[Point, Any]]:
    """(arm, seed) -> its point and parameters, trained where they are not there."""
    if "grid" not in study.record.choices:
        choose_settings(study)
    points = [
        Point(seed=seed, **chosen(study.record, arm)) for arm in plan.ARMS for seed in plan.SEEDS
    ]
    missing = [p for p in points if not (study.workdir / f"{p.arm}_{p.seed}.npz").is_file()]
    if missing:
        for point, params in zip(missing, train(study, missing)):
            save(study.workdir, point, params)
    found = {}
    for point in points:
        with np.load(study.workdir / f"{point.arm}_{point.seed}.npz") as file:
            tree = unflatten_dict({tuple(key.split("/")): file[key] for key in file.files})
        found[point.arm, point.seed] = point, {"layers": {"attention": {"controller": tree}}}
    return found


def digest(params: Any) -> str:
    """The first eight digits of the sha256 of trained controllers."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()[:8]


def read_all(study: Study, count: int) -> None:
    """Full attention, a window, the oracle, every router of the local ELBO, and the Bayesian one's routes in
    disorder."""
    reader, trained = study.reader, routers(study)
    study.forget_pools()
    study.record.choose("digests", lambda: {f"{arm} {seed}": digest(p) for (arm, seed), (_, p) in trained.items()})

    def routed(arm: str, seed: int, price: float) -> Callable[[Window], Read]:
        point, params = trained[arm, seed]
        return lambda window: reader.routed(window, point.controller, params, point.hypers(plan.COSTS, price=price))

    prices, levels = {}, {}
    for arm, seed in trained:
        start = 0.0
        for share in plan.SHARES_OF.get(arm, (0.3,)):
            start = prices[arm, seed, share] = study.threshold(
                f"local {arm} {seed}@{share}", share, lambda w, price: routed(arm, seed, price)(w), start  # noqa: B023
            )
    for share in plan.SCORED_SHARES:
        levels[share] = study.threshold(f"oracle@{share}", share, reader.oracle, 0.0064)

    def jobs(window: Window) -> list[Job]:
        every = np.ones((reader.layers, len(window.tokens)), bool)
        found: list[Job] = [
            ("full", 0, 1.0, lambda w: reader.forced(w, every)), ("local", 0, 0.0, lambda w: reader.forced(w, ~every)),
        ]
        for share, level in levels.items():
            found.append((f"oracle@{share}", 0, share, lambda w, level=level: reader.oracle(w, level)))
        turn = window.number % len(plan.SEEDS)
        seen: dict[float, Read] = {}
        for (arm, seed, share), price in prices.items():
            if seed == turn:
                read = routed(arm, seed, price)
                if arm == "bayesian":
                    read = lambda w, read=read, share=share: seen.setdefault(share, read(w))  # noqa: E731
                found.append((f"local {arm}@{share}", seed, share, read))
        for how in ("shuffled", "random"):
            found.append((f"local bayesian {how}@0.3", turn, 0.3, lambda w, how=how: disordered(
                reader, w, how, seen.get(0.3) or routed("bayesian", turn, prices["bayesian", turn, 0.3])(w)
            )))
        return found

    study.read(plan.KINDS, count, jobs)


def disordered(reader: Reader, window: Window, how: str, read: Read) -> Read:
    rng = np.random.default_rng([window.number, len(window.kind), len(how)])
    return reader.forced(window, arms.disordered(read.full, rng, how))
