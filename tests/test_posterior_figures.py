"""Entropy in two parts, and the figures of posteriors: what they say and what they refuse."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from meta_attention_jax import analysis

NAMES = ("full", "linear", "local")


def test_entropy_parts_are_those_of_samples():
    rng = np.random.default_rng(0)
    for alpha in ([0.3, 1.0, 4.0], [20.0, 20.0, 20.0], [0.05, 0.05, 50.0]):
        weights = rng.dirichlet(alpha, 200_000)
        sampled = stats.entropy(weights, axis=1).mean() / np.log(3)
        aleatoric, epistemic = analysis.entropy_parts(np.array(alpha))
        assert aleatoric == pytest.approx(sampled, abs=3e-3)
        total = stats.entropy(np.array(alpha) / np.sum(alpha)) / np.log(3)
        assert aleatoric + epistemic == pytest.approx(total, abs=1e-9)
        assert epistemic >= 0


def test_more_evidence_takes_the_epistemic_part_away():
    parts = [analysis.entropy_parts(np.array([1.0, 2.0, 3.0]) * k) for k in (1, 10, 1000)]
    assert parts[0][1] > parts[1][1] > parts[2][1] and parts[2][1] < 1e-3


def alphas(layers=2, tokens=40):
    return np.random.default_rng(1).gamma(2.0, size=(layers, tokens, 3)) + 0.05


def texts(figure):
    return [t.get_text() for axes in figure.axes for t in axes.texts]


def test_shares_in_the_pictures_are_those_of_the_tokens():
    alpha = alphas()
    mean = alpha / alpha.sum(-1, keepdims=True)
    shares = [[np.mean(layer.argmax(-1) == k) for k in range(3)] for layer in mean]
    simplex = analysis.simplex_figure(mean, NAMES, prior=np.ones(3) / 3)
    assert texts(simplex) == [f"{n} {s:.0%}" for row in shares for n, s in zip(NAMES, row)]
    split = analysis.entropy_split_figure(alpha, NAMES)
    assert texts(split) == [f"{s:.0%} of tokens" for row in shares for s in row]
    assert all(isinstance(f, Figure) and f._repr_png_().startswith(b"\x89PNG") for f in (simplex, split))


def test_routes_by_position_leave_padding_out():
    route = np.zeros((1, 2, 8), int)
    route[0, :, 4:] = 2
    route[0, 1, 6:] = 1  # Padding.
    real = np.ones((2, 8), bool)
    real[1, 6:] = False
    figure = analysis.routing_by_position(route, real, NAMES, bins=2)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]  # full, linear, local in both halves


def test_dynamics_takes_what_training_logs():
    shares = {"fraction/full": 0.2, "fraction/linear": 0.3, "fraction/local": 0.5}
    train = dict(nll=2.0, cost=0.3, routing_entropy=0.9, hard_fraction=0.0, **shares)
    records = [{"event": "start", "step": 0}]
    records += [{"event": "train", "step": step, **train, "nll": 2.0 - step / 100} for step in (10, 20, 30)]
    records += [{"event": "eval", "step": 30, "soft": {"nll": 1.8}, "hard": {"nll": 1.9}}]
    assert len(analysis.dynamics_figure(records, NAMES).axes) == 3
    with pytest.raises(ValueError, match="records: expected some"):
        analysis.dynamics_figure(records[:1], NAMES)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: analysis.simplex_figure(np.ones((1, 4, 2)), ("a", "b")), "mean: expected"),
        (lambda: analysis.entropy_split_figure(np.ones((4, 3)), NAMES), "concentration: expected"),
        (lambda: analysis.routing_by_position(np.zeros((1, 2, 8)), np.ones((2, 7)), NAMES),
         "route: expected"),
        (lambda: analysis.pareto_figure([], [], None), "lines: expected at least one"),
        (lambda: analysis.against_figure([], "x", None), "field: expected a number"),
    ],
)
def test_figures_refuse_what_does_not_fit(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
