"""Routers that are trained through the whole model, from the local solution, by the package's own training loop.

A run takes a quarter of an hour. Those that read lie beside the rows, in `routers/`, 16 bits a number, and it is from
there that they read: a record is gone on with, or checked, without training them again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies.pretrained import arms, plan, routers
from experiments.studies.pretrained.arms import Read
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.routers import Trained
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.console import say
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from meta_attention_jax.training.restore import read_run


def directory(study: Study, arm: str, beta: float, seed: int) -> pathlib.Path:
    """Of a run."""
    return study.workdir / "end_to_end" / f"{arm}_{beta:g}_{seed}"


def trained(study: Study, arm: str, beta: float, seed: int) -> Trained:
    """A point and its controllers at the last step, trained where that is not done."""
    start = routers.routers(study, (arm,))[arm, seed, 0.3]
    point = dataclasses.replace(start.point, beta=beta)
    path = directory(study, arm, beta, seed)
    config = study.config.copy_and_resolve_references()
    config.name, config.seed = f"{arm}, end to end", seed
    config.controller.name, config.objective.beta = point.controller, beta
    config.controller.entropy_bonus = point.entropy_bonus
    config.prior.strength, config.prior.preference = point.strength, point.preference
    config.optimizer.learning_rate, config.train.steps = plan.END_TO_END_RATE, plan.END_TO_END_STEPS
    config.train.eval_every = config.train.checkpoint_every = plan.EVERY
    if not (path / "checkpoints" / str(plan.END_TO_END_STEPS)).is_dir():
        study.check_time()
        job = prepare(config, path)
        first = arms.placed(study.reader.model.config, start.tree)
        train(dataclasses.replace(job, initial=first), label=f"{arm}, beta {beta:g}, seed {seed}")
    params = jax.device_get(read_run(path, plan.END_TO_END_STEPS)[3])
    return Trained(point, arms.gathered(study.reader.model.config, params))


def kept(study: Study, arm: str, beta: float, seed: int) -> Trained:
    """A router as it lies beside the rows, trained where it does not."""
    place = study.record.path.parent / "routers"
    point = dataclasses.replace(Point(seed=seed, **routers.chosen(study.record, arm, 0.3)), beta=beta)
    if not routers.file_of(place, point).is_file():
        own = trained(study, arm, beta, seed).tree
        routers.save(place, point, jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), own))
    return routers.load(place, point)


def progress(path: pathlib.Path) -> list[dict[str, Any]]:
    """What validation said on the way: step, nats and share of full attention by kind of token, hard."""
    rows = [row for row in read_metrics(path) if row["event"] == "eval"]
    return [{"step": row["step"], "kinds": row["hard"]["kinds"]} for row in rows]


def bounds(study: Study) -> dict[str, list[float]]:
    """kind -> nats of full attention and of a window, on the validation windows that weights are chosen by."""
    found = {}
    for kind in plan.MAIN:
        windows = choosing(study, kind)
        every = np.ones((study.reader.layers, len(windows[0].tokens)), bool)
        found[kind] = [_nats(windows, lambda w, full=full: study.reader.forced(w, full)) for full in (every, ~every)]
    return found


def choosing(study: Study, kind: str) -> list[Window]:
    """Validation windows that weights are chosen by; thresholds are found on others."""
    return study.material.windows(kind, "validation", plan.CHOOSING_WINDOWS, skip=10)


def _nats(windows: Sequence[Window], read: Callable[[Window], Read]) -> float:
    return float(np.mean([read(window).nll[window.counted].mean() for window in windows]))


def gap_left(study: Study, one: Trained, price: float) -> float:
    """Nats above full attention over those of a window, mean over kinds, on validation."""
    parts = []
    for kind, (full, local) in study.record.choose("validation nats", lambda: bounds(study)).items():
        own = _nats(choosing(study, kind), routers.reading(study, one, price))
        parts.append((own - full) / (local - full))
    return float(np.mean(parts))


def chosen(study: Study, arm: str, share: float = 0.3) -> float:
    """The weight of KL or penalty of an arm that leaves the least on validation at a share, by seed 0."""
    found = {}
    for beta in plan.END_TO_END[arm]:
        name = f"end to end {arm} {beta:g}"
        key = name if share == 0.3 else f"{name}@{share}"
        if key not in study.record.choices:
            one = trained(study, arm, beta, 0)
            price = routers.price_at(study, f"{name} 0", one, share, 0.0)
            study.check_time()
            study.record.choose(key, lambda: {"left": gap_left(study, one, price)})  # noqa: B023
            study.record.find(f"steps {arm} {beta:g}", lambda: progress(directory(study, arm, beta, 0)))  # noqa: B023
        found[beta] = study.record.choices[key]["left"]
        say(f"{arm}, beta {beta:g}: {found[beta]:.4f} of the gap left on validation at {share:.0%}")
    return min(found, key=found.get)


def known(study: Study, share: float = 0.3) -> dict[tuple[str, int], Trained]:
    """(arm, seed) -> the router at the weight that is chosen for a share."""
    return {
        (arm, seed): kept(study, arm, beta, seed)
        for arm, beta in ((arm, chosen(study, arm, share)) for arm in plan.END_TO_END) for seed in study.seeds
    }


def prices_of(study: Study, routed: dict[tuple[str, int], Trained]) -> dict[tuple[str, int, float], float]:
    """lambda of every router at every share."""
    prices: dict[tuple[str, int, float], float] = {}
    for (arm, seed), one in routed.items():
        start = 0.0
        for share in plan.ROUTER_SHARES + (plan.WIDER_SHARES if arm == "bayesian" else ()):
            name = f"end to end {arm} {one.point.beta:g} {seed}"
            start = prices[arm, seed, share] = routers.price_at(study, name, one, share, start)
    return prices


def read_all(study: Study, count: int) -> None:
    """Trains what is missing, then reads, by every seed where all arms read; the Bayesian arm's routes in disorder
    too. An arm for which validation chooses another weight at 20 % than at 30 has one more row there."""
    routed = known(study)
    other = {key: one for key, one in known(study, 0.2).items() if one.point != routed[key].point}
    study.forget_pools()
    prices = prices_of(study, routed)
    at_20 = {
        (arm, seed): routers.price_at(study, f"end to end {arm} {one.point.beta:g} {seed}", one, 0.2, 0.0)
        for (arm, seed), one in other.items()
    }

    def jobs(window: Window) -> list[Job]:
        turn, seen, found = window.turn(len(study.seeds)), {}, []
        for (arm, seed, share), price in prices.items():
            read = routers.reading(study, routed[arm, seed], price)
            if (arm, seed, share) == ("bayesian", turn, 0.3):
                read = routers.remembered(read, seen)
            found.append((f"{arm}@{share}", seed, share, read))
        for (arm, seed), price in at_20.items():
            found.append((f"{arm} for 20 %@0.2", seed, 0.2, routers.reading(study, other[arm, seed], price)))
        routes = routers.reading(study, routed["bayesian", turn], prices["bayesian", turn, 0.3])
        return found + routers.in_disorder(study, "bayesian", turn, routers.remembered(routes, seen))

    study.read(plan.KINDS, count, jobs)
