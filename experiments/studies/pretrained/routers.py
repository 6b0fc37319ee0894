"""Routers that are trained by the local ELBO, the oracle, and routes in disorder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.studies.pretrained import arms, local, plan
from experiments.studies.pretrained.arms import Read, Reader
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Record, Study
from meta_attention_jax.console import say
from meta_attention_jax.controller.baselines import make_controller


class Trained(NamedTuple):
    """A point and the parameters of its controllers, [layer ...]."""

    point: Point
    tree: Any

    @property
    def digest(self) -> str:
        """The first eight digits of the sha256 of the controllers."""
        whole = hashlib.sha256()
        for leaf in jax.tree.leaves(self.tree):
            whole.update(np.asarray(leaf).tobytes())
        return whole.hexdigest()[:8]


def controller_of(study: Study, point: Point) -> Any:
    """The package's controller of a point."""
    return make_controller(dataclasses.replace(study.reader.model.config.router, controller=point.controller))


def train(study: Study, points: Sequence[Point]) -> list[Any]:
    """Parameters of every point."""
    return local.train(
        points, {"mixture": study.pool("train")}, plan.COSTS, steps=plan.LOCAL_STEPS,
        hidden=study.config.controller.hidden, say=say,
    )


def choose_settings(study: Study) -> None:
    """Trains the whole grid, notes what harm every point leaves on validation, and keeps those that are chosen."""
    points = plan.grid()
    trained = train(study, points)
    held, rows = study.pool("validation"), []
    tokens = local.chunks(held)
    for point, params in zip(points, trained):
        z, mean = local.scores(controller_of(study, point), params, tokens, point, plan.COSTS)
        left = {f"left@{share}": local.left(z, held.harm, share) for share in plan.CHOSEN_AT}
        rows.append({**dataclasses.asdict(point), **left, "share": float(np.mean(z > 0)), "full": float(mean.mean()),
                     **{f"z@{share}": float(np.quantile(z, 1 - share)) for share in plan.CHOSEN_AT}})
    rows.append({"arm": "oracle", **{f"left@{s}": local.left(held.harm, held.harm, s) for s in plan.CHOSEN_AT}})
    study.record.choose("grid", lambda: rows)
    wanted = set(points_of(study.record))
    for point, params in zip(points, trained):
        if point in wanted:
            save(study.workdir, point, params)


def chosen(record: Record, arm: str, share: float) -> dict[str, Any]:
    """The setting of an arm that leaves the least harm on validation at a share, mean over seeds."""
    found: dict[str, list[float]] = {}
    for row in record.choices["grid"]:
        if row["arm"] == arm:
            key = json.dumps({key: row[key] for key in plan.setting(Point(arm, ""))})
            found.setdefault(key, []).append(row[f"left@{share}"])
    return json.loads(min(found, key=lambda key: float(np.mean(found[key]))))


def points_of(record: Record) -> dict[Point, None]:
    """The chosen points of all arms, shares and seeds."""
    return dict.fromkeys(
        Point(seed=seed, **chosen(record, arm, share))
        for share in plan.ROUTER_SHARES for arm in plan.ARMS for seed in plan.SEEDS
    )


def file_of(folder: pathlib.Path, point: Point) -> pathlib.Path:
    """Where the controllers of a point lie."""
    numbers = (point.strength, point.preference, point.beta, point.learning_rate, point.entropy_bonus, point.seed)
    name = "_".join([point.arm, point.data.replace(" ", "-"), *(f"{number:g}" for number in numbers)])
    return folder / f"{name}.npz"


def save(folder: pathlib.Path, point: Point, params: Any) -> None:
    """Controllers of one point, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = file_of(folder, point)
    half = file.with_suffix(".tmp.npz")
    np.savez(half, **{"/".join(key): leaf for key, leaf in flatten_dict(params).items()})
    os.replace(half, file)


def load(folder: pathlib.Path, point: Point) -> Trained:
    """What `save` has written."""
    with np.load(file_of(folder, point)) as file:
        tree = unflatten_dict({tuple(key.split("/")): file[key].astype(np.float32) for key in file.files})
    return Trained(point, tree)


def ready(study: Study, points: Sequence[Point]) -> dict[Point, Trained]:
    """These points, trained where they are not there."""
    missing = [point for point in points if not file_of(study.workdir, point).is_file()]
    if missing:
        for point, params in zip(missing, train(study, missing)):
            save(study.workdir, point, params)
    return {point: load(study.workdir, point) for point in points}


def routers(study: Study, wanted: Optional[Sequence[str]] = None) -> dict[tuple[str, int, float], Trained]:
    """(arm, seed, share) -> the router of an arm (None: all) that is chosen for a share."""
    if "grid" not in study.record.choices:
        choose_settings(study)
    keys = [(arm, seed, share) for share in plan.ROUTER_SHARES for arm in wanted or plan.ARMS for seed in study.seeds]
    points = {key: Point(seed=key[1], **chosen(study.record, key[0], key[2])) for key in keys}
    found = ready(study, list(dict.fromkeys(points.values())))
    return {key: found[point] for key, point in points.items()}


def reading(study: Study, one: Trained, price: float, **router: Any) -> Callable[[Window], Read]:
    """How trained controllers read a window at a price; other fields of the router and its mode by name."""
    hypers = one.point.hypers(plan.COSTS, price=price)
    return lambda window: study.reader.routed(window, one.point.controller, one.tree, hypers, **router)


def first_price(record: Record, point: Point, share: float) -> float:
    """Where to look for lambda: at the share of validation streams, if the point is one of the grid."""
    for row in record.choices["grid"]:
        if row["arm"] != "oracle" and all(row[key] == value for key, value in dataclasses.asdict(point).items()):
            return row[f"z@{share}"]
    return 0.0


def price_at(study: Study, name: str, one: Trained, share: float, start: float) -> float:
    """lambda of these very controllers at a share, found on validation."""
    name = f"{name} {one.digest}@{share}"
    return study.threshold(name, share, lambda window, price: reading(study, one, price)(window), start)


def read_bounds(study: Study, count: int) -> None:
    """Full attention, a window, and the oracle: what needs no training."""
    reader = study.reader
    levels = {s: study.threshold(f"oracle@{s}", s, reader.oracle, 0.0064) for s in plan.SCORED_SHARES}

    def jobs(window: Window) -> list[Job]:
        every = np.ones((reader.layers, len(window.tokens)), bool)
        return [
            ("full", -1, 1.0, lambda w: reader.forced(w, every)),
            ("local", -1, 0.0, lambda w: reader.forced(w, ~every)),
            *((f"oracle@{share}", -1, share, lambda w, level=level: reader.oracle(w, level))
              for share, level in levels.items()),
        ]

    study.read(plan.KINDS, count, jobs)


def read_all(study: Study, count: int) -> None:
    """Every router of the local ELBO, and the Bayesian one's routes in disorder."""
    known = routers(study)
    study.forget_pools()
    prices = {
        key: price_at(study, f"local {key[0]} {key[1]}", one, key[2], first_price(study.record, one.point, key[2]))
        for key, one in known.items()
    }

    def jobs(window: Window) -> list[Job]:
        found: list[Job] = []
        turn, seen = window.turn(len(study.seeds)), {}
        for (arm, seed, share), price in prices.items():
            if seed == turn:
                read = reading(study, known[arm, seed, share], price)
                if (arm, share) == ("bayesian", 0.3):
                    read = remembered(read, seen)
                found.append((f"local {arm}@{share}", seed, share, read))
        routes = remembered(reading(study, known["bayesian", turn, 0.3], prices["bayesian", turn, 0.3]), seen)
        return found + in_disorder(study, "local bayesian", turn, routes)

    study.read(plan.KINDS, count, jobs)


def remembered(read: Callable[[Window], Read], seen: dict[str, Read]) -> Callable[[Window], Read]:
    """The same reading, made once."""
    return lambda window: seen["read"] if "read" in seen else seen.setdefault("read", read(window))


def in_disorder(study: Study, arm: str, seed: int, routes: Callable[[Window], Read]) -> list[Job]:
    """The routes of an arm at 30 %, shuffled and drawn at random, where window and sinks are not the whole past."""
    begin = study.config.model.window + study.config.model.sinks

    def disordered(reader: Reader, window: Window, how: str) -> Read:
        rng = np.random.default_rng([window.number, len(window.kind), len(how)])
        return reader.forced(window, arms.disordered(routes(window).full, rng, how, begin))

    return [
        (f"{arm} {how}@0.3", seed, 0.3, lambda window, how=how: disordered(study.reader, window, how))
        for how in ("shuffled", "random")
    ]
