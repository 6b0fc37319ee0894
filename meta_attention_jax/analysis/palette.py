"""Colours of mechanisms and arms, each with a second channel (hatch, underline, marker).

The fills are Okabe and Ito's colour-blind-safe set ("Color Universal Design", 2008). Of its triples, vermillion, blue
and yellow stay farthest apart under simulated protan, deutan and tritan vision, also as tints; they go to full, linear
and local. Yellow is unreadable as a line on white, so lines and letters use `ink`, the fill darkened until it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from meta_attention_jax.fields import expect

TEXT = "#1a1a1a"
"""Colour of letters, on white and on every tint."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How one mechanism looks."""

    slot: int  # Place in the palette; the same mechanism has the same slot everywhere.
    fill: str  # Colour of areas, "#rrggbb".
    # `fill` darkened until its contrast with white is at least 4.5, which WCAG 2.1 (criterion 1.4.3) asks of text; for
    # lines and letters.
    ink: str
    hatch: str  # Matplotlib hatch of areas.
    underline: str  # CSS text-decoration-style, also drawn in pictures.
    marker: str  # Matplotlib marker.


def _channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(channels: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in channels)


def tint(colour: str, amount: float) -> str:
    """`amount` of the colour over white: amount * colour + (1 - amount) * white."""
    return _hex([amount * c + 1 - amount for c in _channels(colour)])


STYLES = (
    Style(0, "#d55e00", "#c15500", "", "solid", "o"),  # full: vermillion
    Style(1, "#0072b2", "#0072b2", "....", "dotted", "s"),  # linear: blue
    Style(2, "#f0e442", "#80770a", "////", "dashed", "^"),  # local: yellow
    Style(3, "#009e73", "#008460", "xxxx", "double", "D"),
    Style(4, "#cc79a7", "#bb4d8a", "----", "wavy", "v"),
    Style(5, "#56b4e9", "#177ab2", "++++", "solid", "P"),
    Style(6, "#999999", "#757575", "oo", "dotted", "X"),
)
NEUTRAL = Style(len(STYLES), "#666666", "#666666", "", "solid", "o")
"""Belongs to no mechanism: for scales in legends."""

_KNOWN = {"full": 0, "linear": 1, "local": 2}


def mechanism_styles(mechanisms: Sequence[str]) -> dict[str, Style]:
    """A style per mechanism, in the order given. full, linear and local always look the same, whatever the order and
    the others are; further names take the next styles in order."""
    names = list(mechanisms)
    expect(len(set(names)) == len(names), "mechanisms", "distinct names", tuple(names))
    free = iter(range(len(_KNOWN), len(STYLES)))
    slots = {name: _KNOWN[name] if name in _KNOWN else next(free, None) for name in names}
    expect(None not in slots.values(), "mechanisms",
           f"at most {len(STYLES) - len(_KNOWN)} names besides {', '.join(_KNOWN)} (one style each)", tuple(names))
    return {name: STYLES[slot] for name, slot in slots.items()}


_ARMS = (
    # Ink and marker; none of the three mechanisms' colours, so that no curve reads as a mechanism.
    ("#000000", "o"),
    ("#009e73", "s"),
    ("#c0559b", "^"),
    ("#3fa0dd", "D"),
    ("#e69f00", "v"),
    ("#7f7f7f", "P"),
    ("#6b4fa0", "X"),
    ("#8c6d31", "<"),
)


def arm_styles(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) per arm by order of first appearance; repeats from the ninth arm."""
    return {arm: _ARMS[i % len(_ARMS)] for i, arm in enumerate(dict.fromkeys(arms))}
