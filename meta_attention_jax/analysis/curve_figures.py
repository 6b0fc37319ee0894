"""What uncertainty and probabilities are worth, as curves on one panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, tidy


def _curves(
    curves: Mapping[str, Any], title: str, caption: str
) -> tuple[Figure, Axes, list[tuple[str, Any, str, str]]]:
    """One panel, and (name, curve, colour, marker) of all that it is to show."""
    if not curves:
        raise ValueError("curves: expected at least one, got none.")
    figure, [[axes]] = frame(1, 7.2, [3.6], title, caption)
    styles = palette.arm_styles(list(curves))
    return figure, axes, [(name, curve, *styles[name]) for name, curve in curves.items()]


def risk_coverage_figure(
    curves: Mapping[str, Mapping[str, Any]], title: str = "", harm: str = "hard - soft"
) -> Figure:
    """Mean harm of the tokens hardened so far, over their share; one `statistics.risk_coverage` per measure."""
    figure, axes, lines = _curves(
        curves, title or "Does uncertainty find the tokens that hardening hurts?",
        "Tokens are hardened in order of rising uncertainty. A measure that knows where it hurts "
        "keeps its line low until the end; one that knows nothing lies on its dotted line, the mean over "
        "all tokens, from the start. In brackets: the share of the possible gain over random order.",
    )
    for name, curve, colour, marker in lines:
        axes.plot(
            curve["coverage"][1:], curve["risk"][1:], color=colour, marker=marker, markevery=20, ms=5, lw=1.8,
            label=f"{name} ({curve['gain']:.0%})",
        )
        axes.axhline(curve["random"], color=colour, ls=":", lw=1.2)
    axes.legend(frameon=False, fontsize=FONT, loc="best")
    axes.set_xlim(0, 1)
    tidy(axes, title=f"{harm}, nats per hardened token", xlabel="share of tokens hardened")
    return figure


def frontier_figure(curves: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> Figure:
    """Nats against cost in gated mode as theta rises, one line per measure or arm: points with `cost` and `nll`, in
    order of theta."""
    figure, axes, lines = _curves(
        curves, title or "What does it cost to leave the uncertain tokens soft?",
        "Gated mode, theta from 0 (right end, all soft: every mechanism is paid for) to 1 (left end, "
        "all hard, ringed). Down and to the left is better; a line that falls to the left means "
        "that soft tokens only cost.",
    )
    for name, points, colour, marker in lines:
        cost, nll = (np.array([p[key] for p in points]) for key in ("cost", "nll"))
        axes.plot(cost, nll, color=colour, marker=marker, ms=5, lw=1.6, label=name)
        axes.plot(cost[-1], nll[-1], marker="o", ms=11, mfc="none", mec=GREY, lw=0)
    axes.legend(frameon=False, fontsize=FONT, loc="best")
    tidy(axes, title="nats per token", xlabel="cost of the mechanisms that run, full attention = 1")
    return figure


def reliability_figure(curves: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """How often what was said to be likely came true, by how likely it was said to be; one `statistics.calibration`
    per line."""
    figure, axes, lines = _curves(
        curves, title or "Do probabilities of full attention mean what they say?",
        "Tokens and layers in bins of the probability that they were given: the mean of a bin against how many of it "
        "are what it is about. On the dotted line the two agree; above it the probability was too low. A mark is the "
        "larger the more there are. In brackets: the expected calibration error.",
    )
    axes.plot([0, 1], [0, 1], color=GREY, ls=":", lw=1.2)
    for name, curve, colour, marker in lines:
        share = np.array(curve["count"]) / np.sum(curve["count"])
        axes.plot(curve["predicted"], curve["rate"], color=colour, lw=1.6)
        axes.scatter(curve["predicted"], curve["rate"], s=12 + 300 * share, color=colour, marker=marker,
                     label=f"{name} ({curve['ece']:.3f})", zorder=3)
    legend = axes.legend(frameon=False, fontsize=FONT, loc="best")
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    tidy(axes, title="share for which it is true", xlabel="probability that was given", percent="xy")
    return figure
