"""What a field of a config is: its default, its bounds, and what is known of it over time; and numbers that callers
give, of which those of NumPy and JAX are as good as Python's."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any, Optional

import jax
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
            text = isinstance(self.default[0], str)
            ok = isinstance(value, (tuple, list))
            ok = ok and all(isinstance(one, str) if text else _is_number(one, (int, float)) for one in value)
            expect(ok, name, f"{'names' if text else 'numbers'} such as {self.default}", value)
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


def expect(ok: Any, field: str, expected: str, got: Any) -> None:
    """Raises a ValueError of one sentence unless `ok`."""
    if not ok:
        got = got.item() if isinstance(got, np.generic) else got
        raise ValueError(f"{field}: expected {expected}, got {got!r}.")


def near(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else "."


def plain(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers, arrays as tuples of them, in lists and tuples too; all else as it is."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = value.item() if value.ndim == 0 else tuple(value.tolist())
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def whole(field: str, value: Any) -> int:
    """An integer; neither True nor 2.0 is one."""
    value = plain(value)
    expect(_is_number(value, int), field, "an integer", value)
    return value


def real(field: str, value: Any) -> float:
    """An integer or a float, NaN and infinities too."""
    value = plain(value)
    expect(_is_number(value, (int, float)), field, "a number", value)
    return value


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
