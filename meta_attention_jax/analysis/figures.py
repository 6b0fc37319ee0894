"""Figures: loss curves and routing per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, legend, swatches, tidy

_HARD, _SOFT = 0.46, 0.2  # Heights of a layer's two bars, in layers.
_PANEL_HEIGHT = 3.3  # Inches, of the loss curves.
_CURVES = (("steps", "train_nll"), ("eval_steps", "eval_nll_soft"), ("eval_steps", "eval_nll_hard"))


def _series(run: Mapping[str, Any], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one curve, empty when the run has none; refused if they do not match."""
    steps, values = run.get(x), run.get(y)
    if values is None or len(values) == 0:
        return np.zeros(0), np.zeros(0)
    steps = np.asarray([] if steps is None else steps, float)
    values = np.asarray(values, float)
    if steps.shape != values.shape or steps.ndim != 1:
        raise ValueError(
            f"{y}: expected one value per entry of {x} ({steps.size}), got {values.size} "
            f"(corpus {run['corpus']!r}, arm {run['arm']!r})."
        )
    return steps, values


def _limits(runs: Sequence[Mapping[str, Any]], floor: float | None) -> tuple[float, float] | None:
    """Limits of the loss axis: everything after the first tenth of training, where arms differ. The plunge before it
    would squeeze the differences between arms into a line's width. Curves stay below the legend, which takes a line per
    run in the upper right corner."""
    curves = [(y, *_series(run, x, y)) for run in runs for x, y in _CURVES]
    last = max((steps.max() for _, steps, _ in curves if steps.size), default=0)
    kept = [] if floor is None else [floor]
    late = list(kept)
    for y, steps, values in curves:
        finite = np.isfinite(values)
        for after, found in ((0.1, kept), (0.35, late)):
            part = values[(steps >= after * last) & finite]
            if part.size and y == "train_nll":
                part = np.quantile(part, [0.0, 0.995])  # One noisy batch is no limit.
            found += list(part)
    if not kept:
        return None
    margin = max(0.04 * (max(kept) - min(kept)), 0.01)
    bottom, top = min(kept) - margin, max(kept) + 2 * margin
    legend_height = (0.21 * len(runs) + 0.15) / _PANEL_HEIGHT
    if late:
        top = max(top, bottom + (max(late) + margin - bottom) / (1 - legend_height))
    return bottom, top


def loss_curves(runs: Sequence[Mapping[str, Any]], floor: Mapping[str, float] | None = None) -> Figure:
    """Training and held-out loss (nats per token) against the step, one panel per corpus.

    Args:
      runs: dicts of `corpus`, `arm`, `steps`, `train_nll`, `eval_steps`, `eval_nll_soft`, `eval_nll_hard`; a missing or
        empty curve is not drawn. With `gate_start` and `gate_end` (steps) the period in which tokens turn hard is
        shaded.
      floor: corpus -> nats that no model can beat, where they are known.
    """
    if not runs:
        raise ValueError("runs: expected at least one run, got none.")
    floor = floor or {}
    corpora = list(dict.fromkeys(run["corpus"] for run in runs))
    styles = palette.arm_styles([run["arm"] for run in runs])
    has = {y: any(_series(run, x, y)[0].size for run in runs) for x, y in _CURVES}
    shaded = any(run.get("gate_end") is not None for run in runs)
    figure, grid = frame(
        len(corpora), max(4.4, 9.0 / len(corpora)), [_PANEL_HEIGHT], "Loss of every arm",
        "Validation loss is measured twice: soft (every token mixes the mechanisms) and hard (one "
        "mechanism per token). Where an arm's dashed line leaves its solid line, hardening costs. "
        "The axis begins after the first tenth of training; numbers are the last evaluations, on validation.",
    )
    for axes, corpus in zip(grid[0], corpora):
        _loss_panel(axes, [run for run in runs if run["corpus"] == corpus], styles, floor.get(corpus))
    tidy(grid[0][0], ylabel="nats per token")
    kinds = []
    if has["train_nll"]:
        kinds.append(Line2D([], [], color=GREY, alpha=0.45, lw=1.0, label="training batch"))
    line = {"color": GREY, "lw": 1.6, "marker": "o", "ms": 5}
    if has["eval_nll_soft"]:
        kinds.append(Line2D([], [], label="held out, soft", **line))
    if has["eval_nll_hard"]:
        kinds.append(Line2D([], [], label="held out, hard", ls="--", mfc="white", **line))
    if shaded:
        kinds.append(Patch(color="#ececec", label="tokens turn hard"))
    if any(corpus in floor for corpus in corpora):
        kinds.append(Line2D([], [], color=GREY, ls=":", lw=1.4, label="entropy of the source"))
    legend(figure, kinds, len(kinds))
    return figure


def _loss_panel(
    axes: Axes, runs: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]], floor: float | None
) -> None:
    limits = _limits(runs, floor)
    spans = {(run.get("gate_start") or 0, run["gate_end"]) for run in runs if run.get("gate_end")}
    for start, end in spans:
        axes.axvspan(start, end, color="#ececec", lw=0, zorder=0)
    if floor is not None:
        axes.axhline(floor, color=GREY, ls=":", lw=1.4, zorder=1)
    entries = []
    for i, run in enumerate(runs):
        # Curves that coincide stay visible: the later ones thinner, the markers at other steps.
        width = max(1.3, 2.8 - 0.5 * i)
        colour, marker = styles[run["arm"]]
        axes.plot(*_series(run, "steps", "train_nll"), color=colour, alpha=0.3, lw=0.8, zorder=2)
        numbers = []
        for key, dashes, face in (("soft", "-", colour), ("hard", "--", "white")):
            steps, values = _series(run, "eval_steps", f"eval_nll_{key}")
            if not steps.size:
                continue
            axes.plot(
                steps, values, color=colour, ls=dashes, lw=width, marker=marker, ms=5, mfc=face,
                markevery=(i % steps.size, min(len(runs), steps.size)), zorder=3,
            )
            numbers.append(f"{values[-1]:.3f} {key}")
        label = run["arm"] + (f": {', '.join(numbers)}" if numbers else "")
        entries.append(Line2D([], [], color=colour, marker=marker, ms=5, lw=1.6, label=label))
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(handles=entries, loc="upper right", fontsize=FONT, frameon=True, framealpha=0.9, edgecolor="none")
    tidy(axes, title=runs[0]["corpus"], xlabel="step", bold=True)


def _shares(result: Mapping[str, Any], key: str, mechanisms: Sequence[str]) -> Float[np.ndarray, "layer mechanism"]:
    shares = np.asarray(result[key], float)
    if shares.ndim != 2 or shares.shape[1] != len(mechanisms):
        raise ValueError(
            f"{key}: expected [layer, {len(mechanisms)}], a column per mechanism, "
            f"got {list(shares.shape)} (corpus {result['corpus']!r}, arm {result['arm']!r})."
        )
    if not np.allclose(shares.sum(1), 1, atol=1e-2):
        raise ValueError(f"{key}: expected every layer's shares to add up to 1, got {shares.sum(1)}.")
    return shares


def routing_by_layer(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of the mechanisms per layer: a row of panels per corpus, a column per arm.

    Args:
      results: dicts of `corpus`, `arm`, `mechanisms` (names), `fractions` [layer, mechanism] (share of tokens by hard
        route) and `mean_weights` [layer, mechanism] (mean of E[pi]).
    """
    if not results:
        raise ValueError("results: expected at least one result, got none.")
    corpora = list(dict.fromkeys(result["corpus"] for result in results))
    arms = list(dict.fromkeys(result["arm"] for result in results))
    names = list(dict.fromkeys(name for result in results for name in result["mechanisms"]))
    styles = palette.mechanism_styles(names)
    layers = [max(len(r["fractions"]) for r in results if r["corpus"] == c) for c in corpora]
    width = max(2.7, 8.6 / len(arms))
    figure, grid = frame(
        len(arms), width, [0.5 * max(count, 2) for count in layers], "Where each layer routes its tokens",
        "Thick bars: share of held-out tokens whose hard route is the mechanism. Thin bars below: "
        "mean weight of the mechanism in the soft mixture. Where the two differ, tokens are "
        "undecided between mechanisms. Layer 0 is next to the input.",
    )
    panels = {(r["corpus"], r["arm"]): r for r in results}
    for i, corpus in enumerate(corpora):
        for j, arm in enumerate(arms):
            axes = grid[i][j]
            if (corpus, arm) not in panels:
                axes.remove()
                continue
            _routing_panel(axes, panels[corpus, arm], styles, width)
            last = i == len(corpora) - 1 or (corpora[i + 1], arm) not in panels
            tidy(axes, title=f"{corpus}: {arm}", xlabel="% of tokens / of weight" if last else "", bold=True)
            left = panels.get((corpus, arms[j - 1])) if j else None
            if left and len(left["fractions"]) == len(panels[corpus, arm]["fractions"]):
                axes.set_yticklabels([])  # The panel to the left has them.
    legend(figure, swatches(styles), len(styles))
    return figure


def _routing_panel(axes: Axes, result: Mapping[str, Any], styles: Mapping[str, palette.Style], width: float) -> None:
    mechanisms = result["mechanisms"]
    hard = _shares(result, "fractions", mechanisms)
    soft = _shares(result, "mean_weights", mechanisms)
    if hard.shape != soft.shape:
        raise ValueError(f"mean_weights: expected the shape of fractions {list(hard.shape)}, got {list(soft.shape)}.")
    layer = np.arange(len(hard))
    for shares, height, middle in ((hard, _HARD, layer - 0.14), (soft, _SOFT, layer + 0.23)):
        start = np.zeros(len(layer))
        for k, name in enumerate(mechanisms):
            style = styles[name]
            thick = height == _HARD
            axes.barh(
                middle, shares[:, k], height, left=start, color=style.fill if thick else palette.tint(style.fill, 0.55),
                edgecolor=palette.TEXT, lw=0.6, hatch=style.hatch,
            )
            for y, x, share in zip(middle, start, shares[:, k]):
                if thick and share * width > 0.42:  # Inches that "100 %" needs.
                    axes.text(
                        x + share / 2, y, f"{100 * share:.0f} %", ha="center", va="center", fontsize=FONT,
                        color=palette.TEXT, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                    )
            start = start + shares[:, k]
    axes.set_xlim(0, 1)
    axes.set_ylim(len(hard) - 0.5, -0.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.set_yticks(layer, [f"layer {i}" for i in layer])
    axes.tick_params(axis="y", length=0)
