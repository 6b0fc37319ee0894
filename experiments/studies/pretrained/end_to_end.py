"""Routers that are trained through the whole model, from the local solution, by the package's own training loop."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies.pretrained import plan, routers
from experiments.studies.pretrained.arms import Read
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.console import say
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.restore import read_run

Trained = tuple[Point, Any]


def trained(study: Study, arm: str, beta: float, seed: int) -> Trained:
    """A point and its controllers at the last step, trained where that is not done."""
    local_point, start = routers.routers(study)[arm, seed]
    point = dataclasses.replace(local_point, beta=beta)
    path = study.workdir / "end_to_end" / f"{arm}_{beta:g}_{seed}"
    config = study.config.copy_and_resolve_references()
    config.name, config.seed = f"{arm}, end to end", seed
    config.controller.name, config.objective.beta = point.controller, beta
    config.prior.strength, config.prior.preference = point.strength, point.preference
    config.optimizer.learning_rate, config.train.steps = plan.END_TO_END_RATE, plan.END_TO_END_STEPS
    config.train.eval_every = config.train.checkpoint_every = plan.EVERY
    if not (path / "checkpoints" / str(plan.END_TO_END_STEPS)).is_dir():
        study.check_time()
        job = prepare(config, path)
        train(dataclasses.replace(job, initial=jax.device_get(start)), label=f"{arm}, beta {beta:g}, seed {seed}")
    _, _, _, params = read_run(path, plan.END_TO_END_STEPS)
    return point, params


def progress(path: pathlib.Path) -> list[dict[str, Any]]:
    """What validation said on the way: step, nats and share of full attention by kind of token, hard."""
    rows = [row for row in read_metrics(path) if row["event"] == "eval"]
    return [{"step": row["step"], "kinds": row["hard"]["kinds"]} for row in rows]


def reading(study: Study, one: Trained, price: float) -> Callable[[Window], Read]:
    """How trained controllers read a window at a price."""
    point, params = one
    hypers = point.hypers(plan.COSTS, price=price)
    return lambda window: study.reader.routed(window, point.controller, params, hypers)


def price_at(study: Study, name: str, one: Trained, share: float, start: float = 0.0) -> float:
    """lambda at a share, found on validation."""
    return study.threshold(f"{name}@{share}", share, lambda w, price: reading(study, one, price)(w), start)


def gap_left(study: Study, one: Trained, price: float) -> float:
    """Nats above full attention over those of a window, mean over kinds, on validation."""
    parts = []
    for kind in plan.MAIN:
        windows = study.material.windows(kind, "validation", plan.CHOOSING_WINDOWS, skip=10)
        own = [reading(study, one, price)(w) for w in windows]
        every = [np.ones((study.reader.layers, len(w.tokens)), bool) for w in windows]
        full, local = ([study.reader.forced(w, mask == whole) for w, mask in zip(windows, every)]
                       for whole in (True, False))
        nats = lambda reads: np.mean([r.nll[w.counted].mean() for r, w in zip(reads, windows)])  # noqa: B023, E731
        parts.append((nats(own) - nats(full)) / (nats(local) - nats(full)))
    return float(np.mean(parts))


def chosen(study: Study, arm: str) -> float:
    """The weight of KL or penalty of an arm that leaves the least on validation, by seed 0 at a share of 30 %."""
    found = {}
    for beta in plan.END_TO_END[arm]:
        one = trained(study, arm, beta, 0)
        price = price_at(study, f"end to end {arm} {beta:g} 0", one, 0.3)

        def left(beta=beta, one=one, price=price):
            study.check_time()
            return {"left": gap_left(study, one, price), "progress": progress(
                study.workdir / "end_to_end" / f"{arm}_{beta:g}_0"
            )}

        found[beta] = study.record.choose(f"end to end {arm} {beta:g}", left)["left"]
        say(f"{arm}, beta {beta:g}: {found[beta]:.3f} of the gap left on validation")
    return min(found, key=found.get)


def read_all(study: Study, count: int) -> None:
    """Trains what is missing, then reads: every seed reads every window."""
    known: dict[tuple[str, int], Trained] = {}
    for arm in plan.END_TO_END:
        beta = chosen(study, arm)
        for seed in plan.SEEDS:
            known[arm, seed] = trained(study, arm, beta, seed)
    study.forget_pools()
    study.record.choose("digests end to end", lambda: {
        f"{arm} {seed}": routers.digest(params) for (arm, seed), (_, params) in known.items()
    })
    prices = {}
    for (arm, seed), one in known.items():
        start = 0.0
        for share in plan.SHARES_OF[arm]:
            name = f"end to end {arm} {one[0].beta:g} {seed}"
            start = prices[arm, seed, share] = price_at(study, name, one, share, start)
    study.read(plan.KINDS, count, lambda window: jobs(study, known, prices, window))


def jobs(
    study: Study, known: dict[tuple[str, int], Trained], prices: dict[tuple[str, int, float], float], window: Window
) -> Sequence[Job]:
    """Readings of one window: all arms, shares and seeds, and the Bayesian arm's routes in disorder."""
    turn, seen = window.number % len(plan.SEEDS), {}
    found: list[Job] = []
    for (arm, seed, share), price in prices.items():
        read = reading(study, known[arm, seed], price)
        if (arm, seed, share) == ("bayesian", turn, 0.3):
            read = lambda w, read=read: seen.setdefault("routes", read(w))  # noqa: E731
        found.append((f"{arm}@{share}", seed, share, read))
    for how in ("shuffled", "random"):
        def read(w, how=how):
            routes = seen.get("routes") or reading(study, known["bayesian", turn], prices["bayesian", turn, 0.3])(w)
            return routers.disordered(study.reader, w, how, routes)

        found.append((f"bayesian {how}@0.3", turn, 0.3, read))
    return found
