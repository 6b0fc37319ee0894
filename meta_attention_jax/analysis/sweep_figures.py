"""Lines over a number as pictures: sweeps, and prices of a decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, GREY, drawable, frame, legend, tidy

_HEIGHT = 4.0
ONE = "one model, by lambda"
_FAR = 6.0  # A setting further above the best than so many times the middle one is left out of the picture
_NAMED = 15  # So many marks have a name each; of more those on the front, or nothing could be read

_LEGEND_COLUMNS = 6

_PLACES = [(x, y, side) for y in (5, -12, 16, -23, 27, -34) for x, side in ((5, "left"), (-5, "right"))]
_AGAINST = (
    ("cost", "cost of the hard routes", True),
    ("routing_entropy", "routing entropy, of log K", True),
    ("gap", "gap, hard - soft nats", False),
)


def _half(line: Mapping[str, Any], name: str) -> float:
    """Half-width of the interval; 0 where one seed has none."""
    half = line.get(f"{name}_pm", math.nan)
    return half if math.isfinite(half) else 0.0


def _families(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(lines of the sweep itself, baselines: those whose point has a name)."""
    own = [line for line in lines if "name" not in line["point"]]
    return own, [line for line in lines if "name" in line["point"]]


def _names(lines: Sequence[Mapping[str, Any]], field: Optional[str]) -> list[str]:
    """What stands beside the marks: the value of the field where every line has one of its own, else the setting."""
    values = [line["point"].get(field) for line in lines]
    if all(isinstance(value, (int, float)) for value in values) and len(set(values)) == len(values):
        return [f"{value:g}" for value in values]
    return [str(line["setting"]) for line in lines]


def pareto_figure(
    lines: Sequence[Mapping[str, Any]],
    front: Sequence[str],
    chosen: Optional[str],
    field: Optional[str] = None,
    title: str = "",
    split: str = "validation",
) -> Figure:
    """Held-out hard nats against cost, with the front of what nothing beats in both.

    Args:
      lines: dicts of `setting`, `point`, `nll_hard`, `cost` and their `_pm`, the 95 % half-widths; a point with a
        "name" is a baseline.
      front: settings on the front, by rising cost.
      chosen: the setting that is ringed.
      field: dotted field whose value is written beside a point; None writes the setting.
      title: what was swept.
    """
    if not lines:
        raise ValueError("lines: expected at least one, got none.")
    own, others = _families(lines)
    best, middle = np.quantile([line["nll_hard"] for line in lines], [0.0, 0.5])
    far = [
        line for line in lines
        if line["nll_hard"] > best + _FAR * max(middle - best, 1e-3)
        and line["setting"] != chosen
    ]
    both = bool(own and others)  # Baselines far off would press the sweep together.
    figure, [panels] = frame(
        *((2, 4.9) if both else (1, 9.0)), [_HEIGHT],
        f"{title}: hard nats against cost" if title else "Hard nats against cost",
        f"Means over seeds on the {split} split, bars: 95 % intervals. Down and to the left is better. "
        "The stepped line joins the settings that no other beats in both."
        + (" On the right the sweep alone." if both else "")
        + (f" Numbers: {field}." if own and field and _names(own, field)[0] != own[0]["setting"] else "")
        + (" Above the picture: " + ", ".join(
            f"{line['setting']} ({line['nll_hard']:.3f} nats at {line['cost']:.0%}"
            + (", on the front)" if line["setting"] in front else ")") for line in far
        ) + "." if far else ""),
        gap_x=0.8,
    )
    own = sorted(own, key=lambda line: line["cost"])
    styles = palette.arm_styles([*(["the sweep"] if own else []), *(line["setting"] for line in others)])
    by_name = {line["setting"]: line for line in lines}
    on_front = [by_name[setting] for setting in front]
    for axes, baselines in zip(panels, (others, [])):
        if own:
            _crosses(axes, [line for line in own if line not in far], *styles["the sweep"])
        for line in baselines:
            if line not in far:  # Its bar alone would cross the picture.
                _crosses(axes, [line], *styles[line["setting"]])
        if chosen in [line["setting"] for line in [*own, *baselines]]:
            line = by_name[chosen]
            axes.plot(line["cost"], line["nll_hard"], "o", ms=14, mfc="none", mec=GREY, mew=1.5)
        limits = axes.get_xlim(), axes.get_ylim()
        axes.step(
            [line["cost"] for line in on_front], [line["nll_hard"] for line in on_front],
            where="post", color=GREY, lw=1.2, ls="--", zorder=1,
        )
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        tidy(axes, xlabel="cost of the hard routes, full attention = 100 %")
    # Many baselines alone: their names beside them, for colours would repeat.
    named = [line for line in own or others if line not in far]
    if len(named) > _NAMED:
        named = [line for line in named if line["setting"] in (*front, chosen)]
    _label(panels[-1], named, field)
    tidy(panels[0], ylabel="nats per token, hard")
    handles = [
        Line2D([], [], color=colour, marker=marker, lw=0, label=name)
        for name, (colour, marker) in styles.items()
        if own and (name not in by_name or by_name[name] not in far)
    ]
    handles.append(Line2D([], [], color=GREY, ls="--", lw=1.2, label="front"))
    if chosen is not None:
        handles.append(Line2D([], [], marker="o", ms=11, mfc="none", mec=GREY, lw=0, label="chosen"))
    legend(figure, handles, min(len(handles), _LEGEND_COLUMNS))
    return figure


def _label(axes: Axes, lines: Sequence[Mapping[str, Any]], field: Optional[str]) -> None:
    """Names beside the marks, each at the first place where it lies on no other name and no mark."""
    renderer = axes.figure.canvas.get_renderer()
    marks = [axes.transData.transform((line["cost"], line["nll_hard"])) for line in lines]
    taken: list[Any] = []
    for line, name in zip(lines, _names(lines, field)):
        for x, y, side in _PLACES:
            text = axes.annotate(
                drawable(name), (line["cost"], line["nll_hard"]), fontsize=FONT - 1, ha=side,
                xytext=(x, y), textcoords="offset points", parse_math=False,
            )
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            free = inside and not any(box.overlaps(other) for other in taken)
            if free and not any(box.contains(*mark) for mark in marks):
                break
            if (x, y, side) != _PLACES[-1]:
                text.remove()
        taken.append(box)


def _crosses(axes: Axes, lines: Sequence[Mapping[str, Any]], colour: str, marker: str) -> None:
    axes.errorbar(
        [line["cost"] for line in lines],
        [line["nll_hard"] for line in lines],
        xerr=[_half(line, "cost") for line in lines],
        yerr=[_half(line, "nll_hard") for line in lines],
        color=colour, marker=marker, ms=6, lw=0, elinewidth=0.9, alpha=0.9, zorder=2,
    )


def against_figure(lines: Sequence[Mapping[str, Any]], field: str, chosen: Optional[str], title: str = "") -> Figure:
    """Cost, routing entropy and soft-to-hard gap against the swept number.

    Args:
      lines: as in `pareto_figure`.
      field: dotted field with a number in the points without a name; settings that differ in other fields too make a
        line each.
    """
    own, _ = _families(lines)
    own = [line for line in own if isinstance(line["point"].get(field), (int, float))]
    if not own:
        raise ValueError(f"field: expected a number in some points, got none for {field!r}.")
    series: dict[str, list[Mapping[str, Any]]] = {}
    for line in own:
        rest = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in line["point"].items() if key != field)
        series.setdefault(rest, []).append(line)
    styles = palette.arm_styles(list(series))
    figure, [panels] = frame(
        len(_AGAINST), 3.1, [2.9], f"{title}: what {field} does" if title else f"What {field} does",
        "Means over seeds on the validation split, bands: 95 % intervals. A gap below 0 means that the "
        "model is better with one mechanism per token than with the mixture. Ringed: the chosen setting.",
        gap_x=0.8,
    )
    for axes, (name, label, share) in zip(panels, _AGAINST):
        for rest, group in series.items():
            group = sorted(group, key=lambda line: line["point"][field])
            colour, marker = styles[rest]
            x = np.array([line["point"][field] for line in group], float)
            y = np.array([line[name] for line in group])
            half = np.array([_half(line, name) for line in group])
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.15, lw=0)
            axes.plot(x, y, color=colour, marker=marker, ms=5, lw=1.5, label=rest)
            for line in group:
                if line["setting"] == chosen:
                    axes.plot(line["point"][field], line[name], "o", ms=12, mfc="none", mec=GREY, mew=1.5)
        values = [line["point"][field] for line in own]
        if min(values) > 0 and max(values) / min(values) >= 8:
            axes.set_xscale("log", base=2)
            ticks = sorted(set(values))
            if len(ticks) <= _NAMED:
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if name == "gap":
            axes.axhline(0.0, color=GREY, lw=1.0, ls=":")
        tidy(axes, title=label, xlabel=field)
    if len(series) > 1:
        handles = [Line2D([], [], color=styles[rest][0], marker=styles[rest][1], lw=1.5, label=rest) for rest in series]
        legend(figure, handles, min(len(handles), 4))
    return figure


def prices_figure(
    rows: Sequence[Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]] = (),
    *,
    title: str = "",
    split: str = "validation",
) -> Figure:
    """Hard nats against cost: the curve of one model, and a mark per setting that was trained apart. `rows`: of one
    model by rising price: `price`, `nll`, `cost`; `beside`: as `lines` of `pareto_figure`; `title`: of the model."""
    if not rows:
        raise ValueError("rows: expected at least one price, got none.")
    kinds = dict.fromkeys(line["point"].get("name", "trained apart") for line in beside)
    figure, [[axes]] = frame(
        1, 8.0, [4.0], f"{title}: the price of full attention" if title else "The price of full attention",
        f"A hard token takes argmax E pi - lambda c; numbers are lambda, 0 is the plain argmax. Measured "
        f"on the {split} split. Down and to the left is better."
        + (" Other marks: means over seeds of models trained apart, as their sweep reports them." if beside else ""),
    )
    styles = palette.arm_styles([ONE, *kinds])
    for name in kinds:
        own = [line for line in beside if line["point"].get("name", "trained apart") == name]
        axes.plot([line["cost"] for line in own], [line["nll_hard"] for line in own], lw=0, ms=6,
                  color=styles[name][0], marker=styles[name][1], label=name)
    axes.plot([row["cost"] for row in rows], [row["nll"] for row in rows], lw=1.5, ms=6,
              color=styles[ONE][0], marker=styles[ONE][1], label=ONE)
    told: list[float] = []
    for row in sorted(rows, key=lambda row: abs(row["price"])):  # 0 is told first.
        # Prices that change little would be written on top of each other.
        if all(abs(row["cost"] - cost) > 0.03 for cost in told):
            axes.annotate(f"{row['price']:g}", (row["cost"], row["nll"]), (5, 6),
                          textcoords="offset points", fontsize=FONT - 1)
            told.append(row["cost"])
    tidy(axes, xlabel="projected cost of the hard routes", ylabel="hard nats per token", percent="x")
    legend(figure, axes.get_legend_handles_labels()[0], 5)
    return figure
