"""The picture of coloured text: a monospace grid with a coloured cell per character."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import new_figure
from meta_attention_jax.analysis.text import DEPTHS, UNDECODABLE, RoutedText, depth_labels, layer_headings, routed_text

Cell = tuple[str, int]  # A character and the token it belongs to.
Run = tuple[str, palette.Style | None, int]  # Letters, style (None: no colour), depth.


def wrap_cells(pieces: Sequence[str], columns: int) -> list[list[Cell]]:
    """Lines of at most `columns` cells, broken at line breaks, else after a space if possible."""
    lines: list[list[Cell]] = [[]]
    for token, piece in enumerate(pieces):
        for character in piece:
            if character == "\n":
                lines.append([])
                continue
            if len(lines[-1]) == columns:
                line = lines[-1]
                spaces = [i for i, cell in enumerate(line) if cell[0] == " "]
                cut = spaces[-1] + 1 if spaces and spaces[-1] > columns // 2 else columns
                lines[-1] = line[:cut]
                lines.append(line[cut:])
            lines[-1].append((character, token))
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


_MONO = FontProperties(family="DejaVu Sans Mono")  # Comes with matplotlib: the same everywhere.
_SIZE, _LINE = 12.0, 1.62  # Letters in points, line height in em.
_EM = _SIZE / 72
_WIDTH = 0.602 * _EM  # The font's advance, in inches like all lengths here.
_DASHES = {
    "solid": "solid",
    "dotted": (0, (1, 1)),
    "dashed": (0, (2.6, 1.3)),
    "double": (0, (5, 1, 1, 1)),
    "wavy": (0, (4, 2)),
}


def coloured_figure(
    pieces: Sequence[str | bytes],
    route: Int[np.ndarray, "*layer time"],
    uncertainty: Float[np.ndarray, "*layer time"],
    mechanisms: Sequence[str],
    *,
    title: str,
    caption: str = "",
    layer_names: Sequence[str] | None = None,
    columns: int = 90,
) -> Figure:
    """The picture of `coloured_html`: a monospace grid `columns` wide, one block per layer."""
    if columns < 40:
        raise ValueError(f"columns: expected at least 40, got {columns}.")
    routed = routed_text(pieces, route, uncertainty, mechanisms, layer_names)
    lines = wrap_cells(routed.pieces, columns)
    margin, heading = 0.25, 0.45
    width = columns * _WIDTH + 2 * margin
    below = textwrap.wrap(caption, columns + 8)
    block = len(lines) * _LINE * _EM
    top, bottom = 1.14, 0.28 + 0.2 * len(below)
    height = top + len(routed.names) * (heading + block) + bottom
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))  # In inches, origin at the top left.
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    plain = {"color": palette.TEXT, "parse_math": False}  # A "$" in a title is a dollar.
    axes.text(margin, 0.14, title, fontsize=14, weight="bold", va="top", **plain)
    axes.text(margin, height - 0.12, "\n".join(below), fontsize=11, va="bottom", **plain)
    _draw_legend(axes, routed, margin, 0.52)
    y = top
    for layer, text in enumerate(layer_headings(routed)):
        axes.text(margin, y + 0.19, text, fontsize=12, weight="bold", va="top", **plain)
        y += heading
        _draw_lines(axes, lines, routed, layer, margin, y)
        y += block
    return figure


def _draw_legend(axes: Axes, routed: RoutedText, x: float, y: float) -> None:
    """A line of mechanisms and a line of depths, drawn like the text itself."""

    def write(entries: Sequence[Run], y: float) -> None:
        spaced = [run for entry in entries for run in (entry, (" ", None, 0))]
        _draw_runs(axes, spaced, x, y)

    mechanisms = [(f" {name} ", style, 0) for name, style in routed.styles.items()]
    depths = [(f" {text} ", palette.NEUTRAL, depth) for depth, text in enumerate(depth_labels(routed.edges))]
    write([("mechanism ", None, 0), *mechanisms], y)
    write([("certain   ", None, 0), *depths, ("uncertain", None, 0)], y + 1.2 * _LINE * _EM)


def _draw_lines(
    axes: Axes, lines: Sequence[Sequence[Cell]], routed: RoutedText, layer: int, x: float, y: float
) -> None:
    styles = list(routed.styles.values())

    def look(cell: Cell) -> tuple[palette.Style, int]:
        return styles[routed.route[layer, cell[1]]], int(routed.depth[layer, cell[1]])

    for row, line in enumerate(lines):
        runs = [("".join(letter for letter, _ in run), *key) for key, run in itertools.groupby(line, key=look)]
        _draw_runs(axes, runs, x, y + row * _LINE * _EM)


def _draw_runs(axes: Axes, runs: Sequence[Run], x: float, y: float) -> None:
    """One line from x, its top at y: cells, underlines, letters."""
    height = _LINE * _EM
    boxes, fills, letters = [], [], []
    for text, style, depth in runs:
        right = x + len(text) * _WIDTH
        if style is not None:
            low, high = y + 0.05 * height, y + 0.95 * height
            boxes.append([(x, low), (right, low), (right, high), (x, high)])
            fills.append(palette.tint(style.fill, DEPTHS[depth]))
            axes.add_collection(
                LineCollection(
                    [[(x, y + 0.87 * height), (right, y + 0.87 * height)]], colors=style.ink, linewidths=1.3,
                    linestyles=[_DASHES[style.underline]], zorder=2,
                ),
                autolim=False,
            )
        letters += [
            _glyph(character).transformed(Affine2D().translate(x + i * _WIDTH, y + 0.66 * height))
            for i, character in enumerate(text)
            if character != " "
        ]
        x = right
    axes.add_collection(PolyCollection(boxes, facecolors=fills, linewidths=0, zorder=1), autolim=False)
    if letters:
        path = Path.make_compound_path(*letters)
        axes.add_patch(PathPatch(path, facecolor=palette.TEXT, linewidth=0, zorder=3))


@functools.cache
def _glyph(character: str) -> Path:
    """Outline in inches, baseline at 0, y downwards; "·" for what the font does not have. Outlines rather than text
    objects: these sit exactly on the grid at every resolution."""
    if not get_font(findfont(_MONO)).get_char_index(ord(character)):
        character = UNDECODABLE
    path = TextPath((0, 0), character, size=_SIZE, prop=_MONO)
    return path.transformed(Affine2D().scale(1 / 72, -1 / 72))
