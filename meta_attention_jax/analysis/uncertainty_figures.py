"""Two questions about uncertainty as pictures: does it find the harm, and what does it buy?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, tidy

_HEIGHT = 3.6


def risk_coverage_figure(curves: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """Mean harm of the tokens hardened so far, over their share; one line per measure.

    Args:
      curves: name -> `statistics.risk_coverage`.
      title: of the figure.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none.")
    figure, [[axes]] = frame(
        1, 7.2, [_HEIGHT], title or "Does uncertainty find the tokens that hardening hurts?",
        "Tokens are hardened in order of rising uncertainty. A measure that knows where it hurts "
        "keeps its line low until the end; one that knows nothing lies on its dotted line, the mean over "
        "all tokens, from the start. In brackets: the share of the possible gain over random order.",
    )
    styles = palette.arm_styles(list(curves))
    for name, curve in curves.items():
        colour, marker = styles[name]
        axes.plot(
            curve["coverage"][1:], curve["risk"][1:], color=colour, marker=marker, markevery=20,
            ms=5, lw=1.8, label=f"{name} ({curve['gain']:.0%})",
        )
        axes.axhline(curve["random"], color=colour, ls=":", lw=1.2)
    axes.set_xlabel("share of tokens hardened", fontsize=FONT)
    axes.set_title("hard - soft, nats per hardened token", loc="left", fontsize=FONT)
    axes.legend(frameon=False, fontsize=FONT, loc="best")
    axes.set_xlim(0, 1)
    tidy(axes)
    return figure


def frontier_figure(curves: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> Figure:
    """Nats against cost in gated mode as theta rises, one line per measure or arm.

    Args:
      curves: name -> points with `cost` and `nll`, in order of theta.
      title: of the figure.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none.")
    figure, [[axes]] = frame(
        1, 7.2, [_HEIGHT], title or "What does it cost to leave the uncertain tokens soft?",
        "Gated mode, theta from 0 (right end, all soft: every mechanism is paid for) to 1 (left end, "
        "all hard, ringed). Down and to the left is better; a line that falls to the left means "
        "that soft tokens only cost.",
    )
    styles = palette.arm_styles(list(curves))
    for name, points in curves.items():
        colour, marker = styles[name]
        cost, nll = (np.array([p[key] for p in points]) for key in ("cost", "nll"))
        axes.plot(cost, nll, color=colour, marker=marker, ms=5, lw=1.6, label=name)
        axes.plot(cost[-1], nll[-1], marker="o", ms=11, mfc="none", mec=GREY, lw=0)
    axes.set_xlabel("cost of the mechanisms that run, full attention = 1", fontsize=FONT)
    axes.set_title("nats per token", loc="left", fontsize=FONT)
    axes.legend(frameon=False, fontsize=FONT, loc="best")
    tidy(axes)
    return figure
