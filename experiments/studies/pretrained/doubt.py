"""Is a router's uncertainty worth anything on a published model?

Harm of a token: its nats, hard, less those of full attention everywhere ("full"), or less those with all its layers
soft ("soft"). A measure of a token is its mean over layers. `gain`: how much of the way from random order to the order
by harm itself a measure goes (`statistics.risk_coverage`). Calibration: E pi_full of every token and layer, in full
attention's stream, against the oracle's label d >= 0.08^2. Caution: tokens of high uncertainty go to full attention;
what that buys against what a price buys at the same share. With two mechanisms the entropy of E pi falls as E pi_full
leaves 1/2, so caution by entropy is a price; mutual information, vacuity and the Dirichlet's entropy need not be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.pretrained import end_to_end, local, plan, routers
from experiments.studies.pretrained.arms import Read
from experiments.studies.pretrained.local import Point
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.analysis.statistics import calibration, risk_coverage
from meta_attention_jax.console import say
from meta_attention_jax.controller.uncertainty import MEASURES

KINDS = ("prose", "repeat", "code")
CAUTIOUS = (0.05, 0.1)  # Shares of the token-layers that are sent to full attention besides.


def measures(read: Read) -> dict[str, np.ndarray]:
    """u of every layer and token by every measure that the router has: [layer time], rising with doubt."""
    found = {"entropy": MEASURES["entropy"].function(jnp.asarray(read.mean))}
    if read.concentration is not None:
        for name, measure in MEASURES.items():
            if measure.of_posterior:
                found[name] = measure.function(jnp.asarray(read.concentration))
    return {name: np.asarray(u) for name, u in jax.device_get(found).items()}


def tokens_of(study: Study, hard: Callable[[Window], Read], soft: Callable[[Window], Read], window: Window) -> Any:
    """(measures, harms), of the tokens of one window that count."""
    at, every = window.counted, np.ones((study.reader.layers, len(window.tokens)), bool)
    read, mixed, whole = hard(window), soft(window), study.reader.forced(window, every)
    doubt = {name: u.mean(0)[at] for name, u in measures(read).items()}
    return doubt, {"full": (read.nll - whole.nll)[at], "soft": (read.nll - mixed.nll)[at]}


def gains(parts: Sequence[Any], documents: Sequence[int], draws: int = 200) -> list[dict[str, Any]]:
    """Gain over random of every measure by every harm, with the interval of a bootstrap over documents."""
    rows, rng = [], np.random.default_rng(0)
    own = {d: [i for i, document in enumerate(documents) if document == d] for d in dict.fromkeys(documents)}
    for harm in parts[0][1]:
        for measure in parts[0][0]:
            def gain(chosen):
                u, h = (np.concatenate([parts[i][k][name] for i in chosen])  # noqa: B023
                        for k, name in ((0, measure), (1, harm)))  # noqa: B023
                return risk_coverage(u, h)

            whole = gain(range(len(parts)))
            drawn = [
                gain([i for d in rng.choice(list(own), len(own)) for i in own[d]])["gain"] for _ in range(draws)
            ]
            low, high = np.nanquantile(drawn, [0.025, 0.975])
            rows.append({"harm": harm, "measure": measure, "gain": whole["gain"], "low": float(low),
                         "high": float(high), "mean_harm": whole["random"], "curve": whole["risk"][::5]})
    return rows


def calibrated(
    study: Study, point: Point, params: Any, controller: Any, windows: Sequence[Window]
) -> dict[str, Any]:
    """E pi_full in full attention's stream against the oracle's label."""
    pool = local.collect(study.reader.model.config, study.reader.params, windows, (False,), lambda words: None)
    _, mean = local.scores(controller, params, pool, point, plan.COSTS)
    label = pool.harm >= local.TOLERANCE**2
    return {**calibration(mean.ravel(), label.ravel()), "labelled": float(label.mean()), "mean": float(mean.mean())}


def cautious(read: Read, measure: str, share: float) -> np.ndarray:
    """The hard routes, and a share more: of the tokens and layers of the window those most in doubt."""
    u = measures(read)[measure] if measure != "random" else np.random.default_rng(0).random(read.full.shape)
    u = np.where(read.full, -np.inf, u)
    most = np.argsort(-u, axis=None, kind="stable")[: round(share * u.size)]
    added = np.zeros(u.size, bool)
    added[most] = True
    return read.full | (added.reshape(u.shape) & ~read.full)


def read_all(study: Study, count: int) -> None:
    """Gains, calibration and caution of the arms that are there, on a third of the windows."""
    own = max(count // 3, 1)
    for arm, known in routed_arms(study).items():
        study.record.choose(f"doubt {arm}", lambda: gains_of(study, known, own))  # noqa: B023
        study.record.choose(f"calibration {arm}", lambda: calibration_of(study, known))  # noqa: B023
    arms = {arm: known for arm, known in routed_arms(study).items() if arm.endswith("bayesian")}
    study.read(plan.MAIN, own, lambda window: caution_jobs(study, arms, window))


def routed_arms(study: Study) -> dict[str, dict[int, end_to_end.Trained]]:
    """arm -> seed -> point and controllers: those of the local ELBO, and those trained end to end where they are."""
    found: dict[str, dict[int, Any]] = {}
    for (arm, seed), one in routers.routers(study).items():
        if arm in plan.END_TO_END:
            found.setdefault(f"local {arm}", {})[seed] = one
    if "digests end to end" in study.record.choices:
        for arm in plan.END_TO_END:
            beta = end_to_end.chosen(study, arm)
            found[arm] = {seed: end_to_end.trained(study, arm, beta, seed) for seed in plan.SEEDS}
    return found


def price_name(arm: str, point: Point, seed: int, share: float) -> str:
    """What the price of a router at a share was chosen as."""
    name = f"{arm} {seed}" if arm.startswith("local") else f"end to end {arm} {point.beta:g} {seed}"
    return f"{name}@{share}"


def gains_of(study: Study, known: Mapping[int, end_to_end.Trained], count: int) -> list[dict[str, Any]]:
    """`gains` by kind of text, at lambda 0; the seeds in turn."""
    rows = []
    for kind in KINDS:
        windows = study.material.windows(kind, "test", count)
        parts = []
        for window in windows:
            study.check_time()
            point, params = known[window.number % len(known)]
            hard, soft = (functools.partial(
                study.reader.routed, controller=point.controller, own=params, hypers=point.hypers(plan.COSTS), mode=mode
            ) for mode in ("hard", "soft"))
            parts.append(tokens_of(study, hard, soft, window))
        rows += [{"kind": kind, **row} for row in gains(parts, [window.document for window in windows])]
        say(f"gains on {kind}: " + ", ".join(f"{r['measure']} {r['gain']:.2f}" for r in rows if r["kind"] == kind))
    return rows


def calibration_of(study: Study, known: Mapping[int, end_to_end.Trained], count: int = 10) -> list[dict[str, Any]]:
    """`calibrated` by kind and seed."""
    rows = []
    for kind in KINDS:
        windows = study.material.windows(kind, "test", count)
        for seed, (point, params) in known.items():
            study.check_time()
            controllers = params["layers"]["attention"]["controller"]
            found = calibrated(study, point, controllers, routers.controller_of(study, point), windows)
            rows.append({"kind": kind, "seed": seed, **found})
    return rows


def caution_jobs(study: Study, arms: Mapping[str, Mapping[int, end_to_end.Trained]], window: Window) -> list[Job]:
    """From the routes of 20 %: so many token-layers more, by each measure and at random."""
    found: list[Job] = []
    for arm, known in arms.items():
        seed = window.number % len(known)
        point, params = known[seed]
        price = study.record.choices.get(f"threshold {price_name(arm, point, seed, 0.2)}")
        if price is None:
            continue
        hypers = point.hypers(plan.COSTS, price=price)
        base = functools.cache(lambda point=point, params=params, hypers=hypers: study.reader.routed(
            window, point.controller, params, hypers
        ))
        for measure in (*(name for name, m in MEASURES.items() if m.of_posterior), "random"):
            for share in CAUTIOUS:
                def read(w, base=base, measure=measure, share=share):
                    return study.reader.forced(w, cautious(base(), measure, share))

                found.append((f"{arm} and {share:.0%} in doubt by {measure}@0.2", seed, 0.2 + share, read))
    return found
