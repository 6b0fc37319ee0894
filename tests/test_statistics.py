"""Statistics against closed forms and naive counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from meta_attention_jax.analysis import statistics


def test_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, half = statistics.interval(values)
    expected = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected)
    assert statistics.interval([3.0])[0] == 3.0 and math.isnan(statistics.interval([3.0])[1])
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        statistics.interval([])


def test_paired_interval_takes_out_what_seeds_share():
    baseline = {seed: 10.0 * seed for seed in range(5)}
    values = {seed: baseline[seed] + 1 + 0.01 * seed for seed in range(1, 6) if seed in baseline}
    mean, half = statistics.paired_interval(values, baseline)
    assert mean == pytest.approx(1.025) and half < 0.05
    with pytest.raises(ValueError, match=r"seeds: expected some in common, got \[7\] and"):
        statistics.paired_interval({7: 1.0}, baseline)


def test_intervals_cover():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        mean, half = statistics.interval(rng.normal(2.0, 3.0, size=5))
        covered += abs(mean - 2.0) <= half
    assert 920 <= covered <= 975


def test_auroc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert statistics.auroc(scores, positive) == pytest.approx(np.mean(pairs))
    assert statistics.auroc(positive.astype(float), positive) == 1.0
    assert math.isnan(statistics.auroc(scores, np.zeros(60, bool)))


def test_routing_truth_by_counting():
    kind = np.array([0, 1, 1, 0, 0, 2])
    route = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mean = np.zeros((2, 6, 2))
    mean[0, :, 0] = [0.3, 0.9, 0.6, 0.1, 0.2, 0.2]
    first, second = statistics.routing_truth(mean, route, kind, mechanism=0, needed=1)
    assert first == {"precision": 0.5, "recall": 0.5, "other": 0.25, "auroc": 1.0}
    assert math.isnan(second["precision"]) and second["recall"] == 0.0 and second["auroc"] == 0.5


def test_oracle_cost():
    cost = statistics.oracle_cost([80, 15, 5], [0.3, 1.0, 0.15], cheapest=0.15, layers=2)
    assert cost == pytest.approx((0.8 * 0.3 + 0.15 + 0.05 * 0.15 + 0.15) / 2)


def test_mutual_information():
    assert statistics.mutual_information(np.outer([3, 7], [1, 2, 5])) == pytest.approx(0.0)
    assert statistics.mutual_information(np.diag([5, 5])) == pytest.approx(math.log(2))


def test_risk_coverage():
    harm = np.array([0.0, 1.0, 0.0, 3.0])
    known = statistics.risk_coverage(harm, harm)
    assert known["area"] == known["best"] == pytest.approx((0 + 0 + 1 / 3 + 1) / 4)
    assert known["random"] == 1.0 and known["risk"][-1] == 1.0 and known["gain"] == 1.0
    blind = statistics.risk_coverage(np.zeros(4), harm)
    np.testing.assert_allclose(blind["risk"], 1.0)
    assert blind["gain"] == pytest.approx(0.0)
    assert math.isnan(statistics.risk_coverage(np.arange(3.0), np.ones(3))["gain"])
    wrong = statistics.risk_coverage(-harm, harm)
    assert wrong["area"] > 1.0
    with pytest.raises(ValueError, match="score: expected one number per token"):
        statistics.risk_coverage(np.zeros(0), np.zeros(0))


def test_a_bootstrap_covers_the_mean_of_its_values():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        middle, low, high = statistics.bootstrap(rng.normal(1.0, 1.0, 60), np.ones(60), draws=400)
        assert low < middle < high
        inside += low < 1.0 < high
    assert 180 <= inside <= 198
    assert statistics.bootstrap(np.array([1.0, 3.0]), np.array([3.0, 1.0]))[0] == 1.5
    # Of windows of one document the document is what is drawn.
    groups = np.arange(200) % 10
    together = rng.normal(size=10)[groups] + 0.01 * rng.normal(size=200)
    wide, narrow = (statistics.bootstrap(together, np.ones(200), groups=g) for g in (groups, None))
    assert wide[0] == narrow[0] and wide[2] - wide[1] > 3 * (narrow[2] - narrow[1])
    with pytest.raises(ValueError, match="^values: expected at least one"):
        statistics.bootstrap(np.zeros(0), np.zeros(0))


def test_calibration_is_zero_for_the_truth_and_known_for_a_constant():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    honest = statistics.calibration(p, rng.random(p.size) < p)
    assert honest["ece"] < 0.01 and honest["brier"] == pytest.approx(1 / 6, abs=3e-3)
    assert np.allclose(honest["predicted"], honest["rate"], atol=0.02) and sum(honest["count"]) == p.size
    constant = statistics.calibration(np.full(1000, 0.9), np.arange(1000) < 300)
    assert constant["ece"] == pytest.approx(0.6) and constant["brier"] == pytest.approx(0.3 * 0.01 + 0.7 * 0.81)
    assert statistics.calibration(np.array([0.0, 1.0]), np.array([False, True]))["ece"] == 0
    with pytest.raises(ValueError, match="^predicted: expected one number per label"):
        statistics.calibration(np.zeros(0), np.zeros(0, bool))
