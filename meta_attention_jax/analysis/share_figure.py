"""What a share of full attention buys on a published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, frame, legend, tidy

_LINEAR = 0.05  # Nats below which the axis is linear.
_WORDS = "what a share of full attention buys"
Lines = Sequence[Mapping[str, Any]]


def share_figure(lines: Lines, title: str = "") -> Figure:
    """Nats above full attention against the share of token-layers on it, a panel per task.

    `lines` have `task`, `arm` ("full", "local", "routed <lambda>", "layers <lambda>", ...), `share`, `above` and the
    ends of its interval, `above_low` and `above_high`.
    """
    figure, [panels] = _frame(
        lines, 1, title, "Numbers are lambda. layers: the best fixed layers at the share of that lambda; shuffled and "
        "random: the routes of one lambda in disorder."
    )
    styles = palette.arm_styles(_families(lines, " "))
    handles = _row(panels, lines, styles, " ", numbered="routed")
    legend(figure, handles, 5)
    return figure


def comparison_figure(lines: Lines, rows: Mapping[str, Sequence[str]], title: str = "", caption: str = "") -> Figure:
    """The same of many arms, named "<family>@<asked share>", a row of panels for some families each, up to eight."""
    figure, grid = _frame(lines, len(rows), title, caption)
    for (name, families), panels in zip(rows.items(), grid, strict=True):
        own = [line for line in lines if line["arm"].split("@")[0] in families]
        handles = _row(panels, own, palette.arm_styles(families), "@", name=name)
        panels[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=FONT, frameon=False)
    return figure


def _frame(lines: Lines, rows: int, title: str, caption: str) -> tuple[Figure, list[list[Axes]]]:
    if not lines:
        raise ValueError("lines: expected at least one, got none.")
    tasks = dict.fromkeys(line["task"] for line in lines)
    words = f"{title}: {_WORDS}" if title else _WORDS.capitalize()
    said = ("Nats above full attention on the tokens of each task, held-out windows, with 95 % bootstrap intervals. "
            f"{caption} Linear below {_LINEAR:g}, logarithmic above. Down and to the left is better.")
    columns = len(tasks) + (rows > 1)  # A legend of its own beside each of several rows.
    figure, grid = frame(columns, 4.2 if rows == 1 else 3.4, [3.6] * rows, words, said, gap_x=0.8)
    for spare in [panels.pop() for panels in grid if rows > 1]:
        spare.remove()
    return figure, grid


def _families(lines: Lines, mark: str) -> list[str]:
    return list(dict.fromkeys(line["arm"].split(mark)[0] for line in lines if line["arm"] != "full"))


def _row(
    panels: Sequence[Axes], lines: Lines, styles: Mapping[str, tuple[str, str]], mark: str, *, name: str = "",
    numbered: str = "",
) -> list[Any]:
    """One panel per task; arms of several shares are lines, others one mark each. The handles of a legend."""
    handles: dict[str, Any] = {}
    for task, axes in zip(dict.fromkeys(line["task"] for line in lines), panels):
        seen = [line for line in lines if line["task"] == task and line["arm"] != "full"]
        for family in styles:
            own = [line for line in seen if line["arm"].split(mark)[0] == family]
            own.sort(key=lambda line: line["share"])
            if not own:
                continue
            colour, marker = styles[family]
            x, y = [line["share"] for line in own], [line["above"] for line in own]
            low = [line["above"] - line["above_low"] for line in own]
            high = [line["above_high"] - line["above"] for line in own]
            handles[family] = axes.errorbar(
                x, y, [low, high], color=colour, marker=marker, ms=6, lw=1.6 if len(own) > 1 else 0, elinewidth=1.2,
                capsize=3, label=family,
            )
            for line in own if family == numbered else ():
                axes.annotate(line["arm"].split()[1], (line["share"], line["above"]), (6, -12),
                              textcoords="offset points", fontsize=FONT - 1)
        axes.axhline(0, color=GREY, lw=1, ls=":")
        axes.set_yscale("symlog", linthresh=_LINEAR)
        axes.set_xlim(left=-0.02)
        lows, highs = zip(*((line["above_low"], line["above_high"]) for line in seen))
        axes.set_ylim(min(-0.1 * _LINEAR, 1.3 * min(lows)), 2.0 * max(*highs, _LINEAR))
        first = axes is panels[0]
        tidy(axes, title=f"{name}, {task}" if name and first else task, percent="x", bold=True,
             xlabel="share of token-layers on full attention", ylabel="nats above full attention" if first else "")
    return list(handles.values())
