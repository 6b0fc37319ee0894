"""What a field of a config is: its default, its bounds, and what is known of it over time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Optional

import numpy as np

SMALLEST, LARGEST = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
ALWAYS = object()
"""Of `Field.since`: every run has the field."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Numbers that are allowed: `least` <= value <= `most`, less `least` itself where it is `open`."""

    expected: str
    least: float
    most: float = math.inf
    open: bool = False

    def allow(self, value: float) -> bool:
        return (self.least < value if self.open else self.least <= value) and value <= self.most


POSITIVE = Bounds("a number > 0", 0, open=True)
NOT_NEGATIVE = Bounds("a number >= 0", 0)
SHARE = Bounds("a share in [0, 1]", 0, 1)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config."""

    default: Any  # Its type is the field's.
    help: str  # What it is, in a line.
    bounds: Optional[Bounds] = None  # Of a number.
    choices: Optional[Collection[str]] = None  # Of a text; None takes any.
    since: Any = ALWAYS  # What runs from before the field did; `ALWAYS` for those of the first version.
    array: bool = False  # Changes no program: points of a sweep that differ in such fields alone train together.
    free_on_resume: bool = False  # Changes no number of a run, so that one that goes on may set it anew.

    def check(self, name: str, value: Any) -> None:
        """Checks a value by itself."""
        kind = type(self.default)
        if kind is str:
            expect(isinstance(value, str) and "\0" not in value, name, "text", value)
        elif kind is bool:
            expect(isinstance(value, bool), name, "True or False", value)
        elif kind is tuple:
            ok = isinstance(value, (tuple, list)) and all(isinstance(one, str) for one in value)
            expect(ok, name, "names of mechanisms", value)
        elif kind is int:
            expect(_is_number(value, int), name, "a whole number", value)
            # Of a seed, jax drops the bits that are too many.
            least, most = (0, 2**32) if name == "seed" else (-(2**31), 2**31)
            least = -1 if name == "data.seed" else least
            expect(least <= value < most, name, f"a whole number in [{least}, {most})", value)
        else:
            expect(_is_number(value, (int, float)), name, "a number", value)
            size = f"0 or a number of {SMALLEST:.1e} to {LARGEST:.1e} in size"
            expect(value == 0 or SMALLEST <= abs(value) <= LARGEST, name, size, value)
        if self.bounds is not None:
            expect(self.bounds.allow(value), name, self.bounds.expected, value)
        if self.choices is not None:
            expect(value in self.choices, name, f"one of {tuple(self.choices)}", value)


def expect(ok: bool, field: str, expected: str, got: Any) -> None:
    """Raises a ValueError of one sentence unless `ok`."""
    if not ok:
        raise ValueError(f"{field}: expected {expected}, got {got!r}.")


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
