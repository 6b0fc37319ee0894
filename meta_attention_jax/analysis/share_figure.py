"""What a share of full attention buys on a published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, legend, tidy

_LINES = ("routed", "layers")  # Arms of several shares; the others are one mark each.
_LINEAR = 0.05  # Nats below which the axis is linear.


def share_figure(lines: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Nats above full attention against the share of token-layers on it, a panel per task.

    `lines` have `task`, `arm` ("full", "local", "routed <lambda>", "layers <lambda>", ...), `share`, `above` and the
    ends of its interval, `above_low` and `above_high`.
    """
    if not lines:
        raise ValueError("lines: expected at least one, got none.")
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    kinds = list(dict.fromkeys(line["arm"].split()[0] for line in lines if line["arm"] != "full"))
    figure, [panels] = frame(
        len(tasks), 4.2, [3.6], f"{title}: what a share of full attention buys" if title else
        "What a share of full attention buys",
        "Nats above full attention on the tokens of each task, held-out windows, with 95 % bootstrap intervals. "
        "Numbers are lambda. layers: the best fixed layers at the share of that lambda; shuffled and random: the "
        f"routes of one lambda in disorder. Linear below {_LINEAR:g}, logarithmic above. Down and to the left is better.",
        gap_x=0.8,
    )
    styles = palette.arm_styles(kinds)
    for task, axes in zip(tasks, panels, strict=True):
        for kind in kinds:
            own = [line for line in lines if line["task"] == task and line["arm"].split()[0] == kind]
            own.sort(key=lambda line: line["share"])
            colour, marker = styles[kind]
            x, y = [line["share"] for line in own], [line["above"] for line in own]
            low = [line["above"] - line["above_low"] for line in own]
            high = [line["above_high"] - line["above"] for line in own]
            axes.errorbar(x, y, [low, high], color=colour, marker=marker, ms=6, lw=1.6 if kind in _LINES else 0,
                          elinewidth=1.2, capsize=3, label=kind)
            if kind == "routed":
                for line in own:
                    axes.annotate(line["arm"].split()[1], (line["share"], line["above"]), (6, -12),
                                  textcoords="offset points", fontsize=FONT - 1)
        axes.axhline(0, color=GREY, lw=1, ls=":")
        axes.set_yscale("symlog", linthresh=_LINEAR)
        axes.set_xlim(left=-0.02)
        lows, highs = zip(*((line["above_low"], line["above_high"]) for line in lines if line["task"] == task))
        axes.set_ylim(min(-0.1 * _LINEAR, 1.3 * min(lows)), 2.0 * max(*highs, _LINEAR))
        tidy(axes, title=task, xlabel="share of token-layers on full attention", percent="x", bold=True,
             ylabel="nats above full attention" if task == tasks[0] else "")
    legend(figure, panels[0].get_legend_handles_labels()[0], 5)
    return figure
