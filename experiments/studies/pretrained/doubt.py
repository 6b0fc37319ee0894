"""Is a router's uncertainty worth anything on a published model?

Harm of a token: its nats, hard, less those of full attention everywhere ("full"), or less those with all its layers
soft ("soft"). A measure of a token is its mean over layers. `gain`: how much of the way from random order to the order
by harm itself a measure goes (`statistics.risk_coverage`). Calibration: E pi_full of every token and layer, in full
attention's stream, against the oracle's label d >= 0.08^2. Caution: tokens of high uncertainty go to full attention;
from the routes of 20 % to 30, what that buys against what a price buys at the same share. With two mechanisms the
entropy of E pi falls as E pi_full leaves 1/2, so caution by entropy is a price; mutual information and vacuity need not
be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.pretrained import end_to_end, local, plan, routers
from experiments.studies.pretrained.arms import Read
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.routers import Trained
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.analysis.statistics import calibration, risk_coverage
from meta_attention_jax.console import say
from meta_attention_jax.controller.uncertainty import MEASURES

KINDS = ("prose", "repeat", "code")
CAUTIOUS, CAUTIOUS_SHARES = ("mutual_information", "vacuity"), (0.3,)  # From the price of 20 %.


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
                         "high": float(high), "mean_harm": whole["random"], "coverage": whole["coverage"],
                         "risk": [round(value, 6) for value in whole["risk"]]})
    return rows


def caution(read: Read, measure: str, price: float) -> Read:
    """The same reading, its score one that a threshold on doubt is found by: what is on full attention by the price is
    so at any threshold."""
    return read._replace(z=np.where(read.z > price, np.inf, measures(read)[measure]))


def read_all(study: Study, count: int) -> None:
    """Caution, calibration and gains of the arms that are there, on a third of the windows."""
    own = max(count // 3, 1)
    known = routed_arms(study)
    bayesian = [arm for arm in dict.fromkeys(arm for arm, *_ in known) if arm.endswith("bayesian")]
    thetas = {
        (arm, seed, measure, share): threshold_of(study, arm, seed, known[arm, seed, 0.2], measure, share)
        for arm in bayesian for seed in study.seeds if (arm, seed, 0.2) in known
        for measure in CAUTIOUS for share in CAUTIOUS_SHARES
    }

    def jobs(window: Window) -> list[Job]:
        turn = window.turn(len(study.seeds))
        found: list[Job] = []
        for (arm, seed, measure, share), theta in thetas.items():
            if seed == turn:
                one = known[arm, seed, 0.2]
                read = cautious(study, one, price(study, arm, seed, one, 0.2), measure, theta)
                found.append((f"{arm} cautious by {measure}@{share}", seed, share, read))
        return found

    study.read(plan.MAIN, own, jobs)
    study.record.find("calibration", lambda: calibration_of(study, known))
    arms = dict.fromkeys(arm for arm, _, share in known if share == 0.3)
    for arm in sorted(arms, key=lambda arm: arm.startswith("local ")):  # Those that read best come first.
        mine = {seed: known[arm, seed, 0.3] for seed in study.seeds if (arm, seed, 0.3) in known}
        for kind in KINDS:
            rows = study.record.found.get(f"doubt {arm}", [])
            if min((row["windows"] for row in rows if row["kind"] == kind), default=0) < own:
                found = gains_of(study, arm, mine, kind, own)
                study.record.note(f"doubt {arm}", [row for row in rows if row["kind"] != kind] + found)


def price(study: Study, arm: str, seed: int, one: Trained, share: float) -> float:
    """lambda of a router at a share, found before."""
    name = f"{arm} {seed}" if arm.startswith("local ") else f"end to end {arm} {one.point.beta:g} {seed}"
    return routers.price_at(study, name, one, share, 0.0)


def cautious(study: Study, one: Trained, at: float, measure: str, theta: float) -> Callable[[Window], Read]:
    """The package's gated mode: hard where u <= theta, else on full attention. A decision of the token alone."""
    hypers = one.point.hypers(plan.COSTS, theta=theta, price=at)
    return lambda window: study.reader.routed(
        window, one.point.controller, one.tree, hypers, mode="gated", uncertainty=measure, fallback="full"
    )


def threshold_of(study: Study, arm: str, seed: int, one: Trained, measure: str, share: float) -> float:
    """theta at which the cautious router has a share on full attention, found on validation."""
    at = price(study, arm, seed, one, 0.2)

    def read(window: Window, threshold: float) -> Read:
        theta = float(np.exp(threshold)) if MEASURES[measure].log else threshold
        # At a theta of 0 nothing is hard.
        theta = float(np.clip(theta, 1e-9, 1.0))
        return caution(cautious(study, one, at, measure, theta)(window), measure, at)

    found = study.threshold(f"caution {arm} {seed} {one.digest} {measure}@{share}", share, read,
                            0.0 if MEASURES[measure].log else 1.0)
    return float(np.clip(np.exp(found) if MEASURES[measure].log else found, 1e-9, 1.0))


def routed_arms(study: Study) -> dict[tuple[str, int, float], Trained]:
    """(arm, seed, share) -> the router: those of the local ELBO, and those trained end to end where they have read."""
    local_ones = routers.routers(study, tuple(plan.END_TO_END))
    found = {(f"local {arm}", seed, share): one for (arm, seed, share), one in local_ones.items()}
    if any(row["arm"] == "bayesian@0.3" for row in study.record.rows):
        for (arm, seed), one in end_to_end.known(study).items():
            found |= {(arm, seed, share): one for share in plan.ROUTER_SHARES}
    return found


def gains_of(study: Study, arm: str, known: Mapping[int, Trained], kind: str, count: int) -> list[dict[str, Any]]:
    """`gains` on a kind of text, at the price of 30 %; the seeds in turn."""
    windows, parts = study.material.windows(kind, "test", count), []
    for window in windows:
        study.check_time()
        seed = window.turn(len(known))
        at = price(study, arm, seed, known[seed], 0.3)
        hard, soft = (routers.reading(study, known[seed], at, mode=mode) for mode in ("hard", "soft"))
        parts.append(tokens_of(study, hard, soft, window))
    rows = gains(parts, [window.document for window in windows])
    say(f"gains of {arm} on {kind}: " + ", ".join(f"{row['measure']} {row['gain']:.2f}" for row in rows))
    return [{"kind": kind, "windows": count, **row} for row in rows]


def calibration_of(
    study: Study, known: Mapping[tuple[str, int, float], Trained], count: int = 10
) -> list[dict[str, Any]]:
    """E pi_full in full attention's stream against the oracle's label, by kind, arm and seed, where window and sinks
    are not the whole past."""
    rows, begin = [], study.config.model.window + study.config.model.sinks
    for kind in KINDS:
        windows = study.material.windows(kind, "test", count)
        pool = local.collect(study.reader.model.config, study.reader.params, windows, (False,), lambda words: None)
        pool = pool.at(np.flatnonzero(pool.position >= begin))
        label, tokens = pool.harm >= local.TOLERANCE**2, local.chunks(pool)
        for (arm, seed, share), one in known.items():
            if share == 0.3:
                study.check_time()
                controller = routers.controller_of(study, one.point)
                _, mean = local.scores(controller, one.tree, tokens, one.point, plan.COSTS)
                found = calibration(mean.ravel(), label.ravel())
                rows.append({"kind": kind, "arm": arm, "seed": seed, **found, "labelled": float(label.mean()),
                             "mean": float(mean.mean())})
    return rows
