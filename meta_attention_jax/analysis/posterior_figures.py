"""Pictures of posteriors: on the simplex, their entropy split in two, routes by position, and how all of it came about
in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.special import digamma

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, legend, swatches, tidy

_MOST_POINTS = 1500
_CORNERS = np.array([[0.5, math.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])
_ALEATORIC, _EPISTEMIC = "#56b4e9", "#6b4fa0"


def simplex_figure(
    mean: Float[np.ndarray, "layer token mechanism"],
    mechanisms: Sequence[str],
    *,
    prior: Optional[Float[np.ndarray, "mechanism"]] = None,
    title: str = "",
) -> Figure:
    """E[pi] of tokens in a triangle per layer; a corner is all weight on one of three mechanisms, a cross the prior's
    mean."""
    mean = np.asarray(mean, float)
    if len(mechanisms) != 3 or mean.ndim != 3 or mean.shape[2] != 3:
        raise ValueError(
            f"mean: expected [layer, token, 3] and three mechanisms, got {list(mean.shape)} and {tuple(mechanisms)}."
        )
    styles = palette.mechanism_styles(mechanisms)
    figure, [panels] = frame(
        len(mean), 3.6, [3.3], title or "Posterior means on the simplex",
        "Each mark is a token at the mean of its posterior. Near a corner the token is sure of one "
        "mechanism; in the middle it mixes all. Marks are shaped and coloured by the likeliest mechanism."
        + (" The cross is the mean of the prior: where a token lies that has learned nothing."
           if prior is not None else ""),
    )
    # Evenly over the tokens: a picture of thousands of marks shows a blot.
    keep = np.linspace(0, mean.shape[1] - 1, min(mean.shape[1], _MOST_POINTS)).astype(int)
    for layer, axes in enumerate(panels):
        place = mean[layer, keep] @ _CORNERS
        routes = mean[layer].argmax(-1)  # The shares are those of all tokens.
        route = routes[keep]
        axes.plot(*_CORNERS[[0, 1, 2, 0]].T, color=GREY, lw=1.0, zorder=1)
        for k, name in enumerate(mechanisms):
            style, mine = styles[name], route == k
            axes.scatter(
                *place[mine].T, s=16, marker=style.marker, color=style.fill,
                edgecolors=palette.TEXT, linewidths=0.3, alpha=0.6, zorder=2,
            )
            offset = 0.05 if k == 0 else -0.05
            axes.text(
                *(_CORNERS[k] + [0, offset]), f"{name} {np.mean(routes == k):.0%}", ha="center",
                va="bottom" if k == 0 else "top", fontsize=FONT,
            )
        if prior is not None:
            axes.plot(*(np.asarray(prior) @ _CORNERS), "+", ms=14, mew=2.2, color="black", zorder=3)
        axes.set_title(f"layer {layer}", loc="left", fontsize=FONT + 1, weight="bold")
        axes.set_aspect("equal")
        axes.set_xlim(-0.12, 1.12)
        axes.set_ylim(-0.14, 1.0)
        axes.axis("off")
    handles = [
        Line2D([], [], color=style.fill, marker=style.marker, mec=palette.TEXT, mew=0.4, lw=0, label=name)
        for name, style in styles.items()
    ]
    if prior is not None:
        handles.append(Line2D([], [], color="black", marker="+", ms=10, mew=2, lw=0, label="prior"))
    legend(figure, handles, len(handles))
    return figure


def entropy_parts(
    concentration: Float[np.ndarray, "*shape mechanism"],
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """(aleatoric, epistemic) part of H[E pi] under Dir(alpha), as fractions of log K.

        aleatoric = E H[pi] = psi(A + 1) - sum_k (alpha_k / A) psi(alpha_k + 1),    A = sum_k alpha_k
        epistemic = H[E pi] - E H[pi], the mutual information
    """
    alpha = np.asarray(concentration, np.float64)
    total = alpha.sum(-1, keepdims=True)
    mean = alpha / total
    aleatoric = digamma(total[..., 0] + 1) - (mean * digamma(alpha + 1)).sum(-1)
    entropy = -(mean * np.log(np.clip(mean, 1e-30, None))).sum(-1)
    scale = np.log(alpha.shape[-1])
    return aleatoric / scale, (entropy - aleatoric) / scale


def entropy_split_figure(
    concentration: Float[np.ndarray, "layer token mechanism"], mechanisms: Sequence[str], title: str = ""
) -> Figure:
    """Aleatoric and epistemic part of the routing entropy, by layer and likeliest mechanism."""
    alpha = np.asarray(concentration, float)
    if alpha.ndim != 3 or alpha.shape[2] != len(mechanisms):
        raise ValueError(f"concentration: expected [layer, token, {len(mechanisms)}], got {list(alpha.shape)}.")
    aleatoric, epistemic = entropy_parts(alpha)
    route = alpha.argmax(-1)
    figure, [panels] = frame(
        len(alpha), 3.6, [0.5 * len(mechanisms) + 0.4], title or "What the routing entropy is made of",
        "Mean over the tokens whose likeliest mechanism is the one on the left. Aleatoric: the posterior "
        "is sure that the token wants a mixture. Epistemic: it has not made up its mind; the part that "
        "more evidence could remove. As fractions of log K.",
        gap_x=0.6,
    )
    for layer, axes in enumerate(panels):
        for k in range(len(mechanisms)):
            mine = route[layer] == k
            axes.text(
                0.02, k, f"{mine.mean():.0%} of tokens", va="center", fontsize=FONT - 1,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=3,
            )
            if not mine.any():
                continue
            known, unknown = aleatoric[layer, mine].mean(), epistemic[layer, mine].mean()
            edge = dict(edgecolor=palette.TEXT, lw=0.6)
            axes.barh(k, known, 0.55, color=_ALEATORIC, **edge)
            axes.barh(k, unknown, 0.55, left=known, color=_EPISTEMIC, hatch="////", **edge)
        axes.set_yticks(range(len(mechanisms)), mechanisms if not layer else [""] * len(mechanisms))
        axes.set_ylim(len(mechanisms) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        tidy(axes, title=f"layer {layer}", percent="x", bold=True)
    legend(figure, [
        Patch(facecolor=_ALEATORIC, edgecolor=palette.TEXT, lw=0.6, label="aleatoric"),
        Patch(facecolor=_EPISTEMIC, edgecolor=palette.TEXT, hatch="////", lw=0.6, label="epistemic"),
    ], 2)
    return figure


def routing_by_position(
    route: Int[np.ndarray, "layer row time"],
    real: Bool[np.ndarray, "row time"],
    mechanisms: Sequence[str],
    title: str = "",
    bins: int = 32,
) -> Figure:
    """Shares of k* over the position in the sequence, one panel per layer; `real` is False at padding."""
    route, real = np.asarray(route), np.asarray(real, bool)
    if route.ndim != 3 or route.shape[1:] != real.shape:
        raise ValueError(f"route: expected [layer, *{list(real.shape)}], got {list(route.shape)}.")
    time = route.shape[2]
    edges = np.unique(np.linspace(0, time, min(bins, time) + 1).astype(int))
    styles = palette.mechanism_styles(mechanisms)
    figure, [panels] = frame(
        len(route), 4.2, [2.5], title or "Routes by position",
        "Share of the tokens at a position that use each mechanism. A token early in the sequence has "
        "little to look back at, so a first column unlike the rest is no surprise.",
    )
    for layer, axes in enumerate(panels):
        base = np.zeros(len(edges) - 1)
        for k, name in enumerate(mechanisms):
            shares = []
            for low, high in zip(edges, edges[1:]):
                here = route[layer, :, low:high][real[:, low:high]]
                shares.append(np.mean(here == k) if here.size else 0.0)
            axes.bar(
                edges[:-1], shares, np.diff(edges), bottom=base, align="edge",
                color=styles[name].fill, edgecolor=palette.TEXT, lw=0, hatch=styles[name].hatch,
            )
            base = base + shares
        axes.set_xlim(0, time)
        axes.set_ylim(0, 1)
        tidy(axes, title=f"layer {layer}", xlabel="position, tokens", percent="y", bold=True)
        if layer:
            axes.set_yticklabels([])
    legend(figure, swatches(styles), len(mechanisms))
    return figure


def dynamics_figure(records: Sequence[Mapping[str, Any]], mechanisms: Sequence[str], title: str = "") -> Figure:
    """How routing developed in training: shares of k*, loss, and cost, entropy and hardness, of the "train" and "eval"
    records of `read_metrics`."""
    trained = [r for r in records if r["event"] == "train"]
    held_out = [r for r in records if r["event"] == "eval"]
    if not trained:
        raise ValueError("records: expected some of event 'train', got none.")
    steps = np.array([r["step"] for r in trained])
    styles = palette.mechanism_styles(mechanisms)
    figure, [(routes, loss, rest)] = frame(
        3, 3.5, [2.9], title or "Routing over training",
        "Left: share of training tokens by likeliest mechanism, all layers. Middle: nats on training "
        "batches and on validation, soft and hard. Right: projected cost of the routes, routing entropy, "
        "and how many tokens use one mechanism only.",
        gap_x=0.8,
    )
    shares = np.array([[r[f"fraction/{name}"] for r in trained] for name in mechanisms])
    areas = routes.stackplot(
        steps, shares, colors=[styles[name].fill for name in mechanisms], edgecolor=palette.TEXT, lw=0.4
    )
    for area, name in zip(areas, mechanisms):
        area.set_hatch(styles[name].hatch)
    routes.set_ylim(0, 1)
    routes.legend(
        handles=swatches(styles), loc="lower center", fontsize=FONT - 1, ncols=len(mechanisms),
        bbox_to_anchor=(0.5, 1.0), frameon=False, handlelength=1.6, columnspacing=1.0,
    )
    arms = palette.arm_styles(["train", "soft", "hard"])
    loss.plot(steps, [r["nll"] for r in trained], color=GREY, lw=0.9, alpha=0.6, label="training")
    for mode, dashes in (("soft", "-"), ("hard", "--")):
        colour, marker = arms[mode]
        loss.plot(
            [r["step"] for r in held_out], [r[mode]["nll"] for r in held_out], dashes,
            color=colour, marker=marker, ms=5, lw=1.5, label=f"validation, {mode}",
        )
    late = [r["nll"] for r in trained if r["step"] >= 0.1 * steps[-1]]
    late += [r[mode]["nll"] for r in held_out for mode in ("soft", "hard")]
    late = [value for value in late if value is not None]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        loss.set_ylim(min(late) - margin, max(late) + margin)
    loss.legend(frameon=False, fontsize=FONT - 1)
    lines = (("cost", "cost"), ("routing_entropy", "routing entropy"), ("hard_fraction", "hard"))
    for (name, label), (colour, marker) in zip(lines, palette.arm_styles("abc").values()):
        rest.plot(
            steps, [r[name] for r in trained], color=colour, marker=marker, ms=4, lw=1.5,
            markevery=max(len(steps) // 8, 1), label=label,
        )
    rest.set_ylim(-0.02, 1.02)
    rest.legend(
        frameon=False, fontsize=FONT - 1, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        handlelength=1.4, columnspacing=0.9,
    )
    for axes in (routes, loss, rest):
        axes.set_xlim(0, steps[-1])
        tidy(axes, title="nats per token" if axes is loss else "", xlabel="step", percent="" if axes is loss else "y")
    return figure
