"""Empty figures, their frame, and how they become files.

Plain `matplotlib.figure.Figure` objects: no global state, no display needed, nothing to close.
"""

from __future__ import annotations

import io
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

from meta_attention_jax.analysis import palette
from meta_attention_jax.files import write_whole

FONT = 10
GREY = "#595959"


class Shown(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        return render(self, "png", dpi=110)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, white, with its own Agg canvas."""
    figure = Shown(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawable(words: str) -> str:
    """What no font can have (bytes of a name that is not Unicode) becomes "?"."""
    return words.encode("utf-8", "replace").decode("utf-8")


def render(figure: Figure, format: str = "png", dpi: int = 200) -> bytes:
    """The figure as the bytes of a png, pdf or svg file."""
    for text in figure.findobj(Text):
        words = text.get_text()
        # A "$" in a name is a dollar; only the exponents of a logarithmic axis are mathematics.
        if "$" in words and not words.startswith(r"$\mathdefault{"):
            text.set_parse_math(False)
        text.set_text(drawable(words))
    buffer = io.BytesIO()
    with rc_context({"hatch.linewidth": 0.6}):
        figure.savefig(buffer, format=format, dpi=dpi, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 200) -> None:
    """Write a figure, whole or not at all; the ending of `path` is the format. The folder is made if missing."""
    write_whole(path, render(figure, pathlib.Path(path).suffix.lstrip("."), dpi))


def frame(
    columns: int, panel_width: float, heights: Sequence[float], title: str, caption: str, gap_x: float = 0.35
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of panels of the given heights, a title above and a caption below. Measured in inches rather than left to a
    layout engine, so that nothing overlaps or shrinks. Panels with numbers of their own on the left need a `gap_x` of
    about 0.8."""
    left, right, top, gap_y = 0.75, 0.2, 0.96, 0.75
    width = left + columns * panel_width + (columns - 1) * gap_x + right
    caption = textwrap.fill(caption, int(12.8 * (width - left - right)))
    bottom = 0.72 + 0.175 * (caption.count("\n") + 1)
    height = top + sum(heights) + (len(heights) - 1) * gap_y + bottom
    figure = new_figure(width, height)
    x = left / width
    figure.text(x, 1 - 0.14 / height, title, va="top", fontsize=13, weight="bold")
    figure.text(x, 0.1 / height, caption, va="bottom", fontsize=FONT, color=GREY)
    grid, y = [], height - top + gap_y
    for tall in heights:
        y -= gap_y + tall
        corners = [left + column * (panel_width + gap_x) for column in range(columns)]
        grid.append([figure.add_axes((x / width, y / height, panel_width / width, tall / height)) for x in corners])
    return figure, grid


def legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    width, height = figure.get_size_inches()
    box = figure.legend(
        handles=handles,
        labels=["name"] * len(handles),  # Their own come below: one that begins with "_" is left out.
        loc="upper left", bbox_to_anchor=(0.72 / width, 1 - 0.4 / height), ncols=columns, frameon=False, fontsize=FONT,
        borderaxespad=0, borderpad=0, handlelength=2.6, handleheight=1.1, columnspacing=1.6,
    )
    for text, handle in zip(box.get_texts(), handles, strict=True):
        text.set_text(handle.get_label())


def swatches(styles: Mapping[str, palette.Style]) -> list[Patch]:
    """Of mechanisms, for a legend."""
    return [
        Patch(facecolor=style.fill, edgecolor=palette.TEXT, hatch=style.hatch, lw=0.6, label=name)
        for name, style in styles.items()
    ]


def tidy(
    axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "", bold: bool = False, percent: str = ""
) -> None:
    """The words around a panel, its title a point larger if `bold`; no box; and whole per cents of 1 along the axes
    named in `percent`, "x" or "y"."""
    if title:
        size, weight = (FONT + 1, "bold") if bold else (FONT, "normal")
        axes.set_title(title, loc="left", fontsize=size, weight=weight)
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=FONT)
    if ylabel:
        axes.set_ylabel(ylabel, fontsize=FONT)
    for name in percent:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
