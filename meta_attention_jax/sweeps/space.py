"""A small algebra of sweeps, and which of their points one program can train together.

A sweep is a list of points, a point a dict of dotted overrides of a config:

    product(sweep("prior.strength", log_spaced(0.5, 32, 7)), sweep("seed", range(3)))     21 points
    chain(a, b)            the points of a, then those of b
    zipped(a, b)           a's first with b's first, ...; of equal length
    point(name="full-only", **{"controller.name": "fixed"})     one point

A search has ranges in their place, by dotted field, and values that all of its points have:

    {"prior.strength": log_uniform(0.5, 32.0), "model.window": integers(4, 16), "seed": choice(0, 1, 2)}
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from meta_attention_jax.config import ARRAY_INPUTS, config_to_dict, flat
from meta_attention_jax.fields import expect, plain, real, whole
from meta_attention_jax.training.build import data_seed

LONGEST = 200  # Characters of a point's name: file systems take 255 bytes, and files beside a point say more

Point = dict[str, Any]
Sweep = list[Point]


@dataclasses.dataclass(frozen=True)
class Range:
    """What a search may give to a field: numbers from `low` to `high`, whole ones if these are, or one of `values`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False  # As likely in every octave.
    values: tuple[Any, ...] = ()


Ranges = dict[str, Any]
"""By field a `Range`, or the value that all points have."""


def point(**overrides: Any) -> Sweep:
    """The sweep of one point; dotted fields as `**{"prior.strength": 2.0}`."""
    return [{field: plain(value) for field, value in overrides.items()}]


def sweep(field: str, values: Iterable[Any]) -> Sweep:
    """One point per value of a dotted field."""
    return [{field: plain(value)} for value in values]


def log_spaced(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from `first` to `last`, each the same multiple of the one before. Rounded to 6 digits, so that
    they read well in names and tables."""
    first, last = real("log_spaced", first), real("log_spaced", last)
    count = whole("log_spaced", count)
    if not (0 < first < math.inf and 0 < last < math.inf):
        raise ValueError(f"log_spaced: expected ends > 0, got {first} and {last}.")
    if count < 2:
        raise ValueError(f"log_spaced: expected a count of at least 2, got {count}.")
    ratio = math.log(last / first) / (count - 1)
    return [float(f"{first * math.exp(ratio * i):.6g}") for i in range(count)]


def uniform(low: float, high: float) -> Range:
    """Numbers from `low` to `high`."""
    return _between("uniform", float(real("uniform", low)), float(real("uniform", high)))


def log_uniform(low: float, high: float) -> Range:
    """Numbers > 0 from `low` to `high`, as likely in every octave."""
    low, high = float(real("log_uniform", low)), float(real("log_uniform", high))
    expect(low > 0, "log_uniform", "ends > 0", low)
    return dataclasses.replace(_between("log_uniform", low, high), log=True)


def integers(low: int, high: int) -> Range:
    """Whole numbers, both ends too."""
    return _between("integers", whole("integers", low), whole("integers", high))


def choice(*values: Any) -> Range:
    """One of the values, which have no order."""
    values = plain(values)
    texts = [text_of(value) for value in values]
    expect(len(values) > 1 and len(set(texts)) == len(texts), "choice", "several values that differ", values)
    return Range(values=values)


def _between(what: str, low: float, high: float) -> Range:
    expect(-math.inf < low < high < math.inf, what, "finite ends, the lower one first", (low, high))
    return Range(low, high)


def ends(ranges: Ranges) -> Sweep:
    """Points at the ends of the ranges: each value that may be wrong by itself is in one of them."""
    options = {
        field: (value.values or (value.low, value.high)) if isinstance(value, Range) else (value,)
        for field, value in ranges.items()
    }
    most = max(map(len, options.values()))
    return [{field: values[min(i, len(values) - 1)] for field, values in options.items()} for i in range(most)]


def content_label(point: Point) -> str:
    """A name for a point, good for a directory, that depends on nothing but the point: its fields, and a digest."""
    shown = ",".join(f"{field.split('.')[-1]}={text_of(value)}" for field, value in point.items())
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{shown[: LONGEST - 13]},{digest[:12]}"


def _join(points: Iterable[Point], what: str) -> Point:
    joined: Point = {}
    for one in points:
        if both := joined.keys() & one.keys():
            raise ValueError(f"{what}: expected distinct fields, got {sorted(both)[0]!r} twice.")
        joined |= one
    return joined


def product(*sweeps: Sweep) -> Sweep:
    """Every combination of one point of each, the last varying fastest."""
    return [_join(points, "product") for points in itertools.product(*sweeps)]


def zipped(*sweeps: Sweep) -> Sweep:
    """The i-th points of all, joined."""
    lengths = sorted({len(points) for points in sweeps})
    if len(lengths) > 1:
        raise ValueError(f"zipped: expected sweeps of one length, got lengths {lengths}.")
    return [_join(points, "zipped") for points in zip(*sweeps)]


def chain(*sweeps: Sweep) -> Sweep:
    """The points of all, one sweep after the other."""
    return [dict(one) for points in sweeps for one in points]


def text_of(value: Any) -> str:
    """A value in a directory's name."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, (tuple, list)):
        value = "+".join(map(str, value))
    return re.sub(r"[^\w.+-]+", "_", str(value))


def labels(points: Sequence[Point]) -> list[str]:
    """A name for every point, good for a directory: its "name" if it has one, then what varies among the points of this
    name, e.g. "full-only,seed=1" or "strength=0.5,seed=1"."""
    if not points:
        raise ValueError("sweep: expected at least one point, got none.")
    families: dict[Any, list[Point]] = {}
    for one in points:
        families.setdefault(one.get("name"), []).append(one)
    made = []
    for one in points:
        family = families[one.get("name")]
        fields = list(dict.fromkeys(field for other in family for field in other))
        varying = [
            field for field in fields if field != "name" and len({_key(other.get(field)) for other in family}) > 1
        ]
        last = [field.split(".")[-1] for field in varying]
        parts = [text_of(one["name"])] if "name" in one else []
        for field, short in zip(varying, last):
            if field in one:
                shown = short if last.count(short) == 1 else field
                parts.append(f"{shown}={text_of(one[field])}")
        made.append(",".join(parts) or "point")
    for label in made:
        if made.count(label) > 1:
            raise ValueError(f"sweep: expected points that differ, got {label!r} twice.")
        expect(label not in (".", "..") and len(label) <= LONGEST, "sweep",
               f"points whose names a folder can have, of at most {LONGEST} characters", label)
    return made


def kept_labels(points: Sequence[Point], stored: Mapping[str, Point], base: ConfigDict) -> list[str]:
    """`labels`, but a point that `stored` has, by label, keeps its own: what varies among the points, and so is said in
    a label, is more in a sweep that has grown. Points are the same whose configs are: {} is {"seed": 0} where that is
    the seed of `base`."""

    def whole(overrides: Mapping[str, Any]) -> str:
        rich = {f: tuple(v) if isinstance(v, list) else v for f, v in overrides.items()}
        return json.dumps(config_to_dict(configured(base, rich)), sort_keys=True)

    known: dict[str, list[str]] = {}
    for label, overrides in stored.items():
        known.setdefault(whole(overrides), []).append(label)
    kept = [known.get(whole(one)) for one in points] if stored else [None] * len(points)
    made: list[str] = []
    for label, old in zip(labels(points), kept):
        if not old and label in stored:
            raise ValueError(f"sweep: expected another name for a point, got {label!r}, of another one.")
        made.append(old.pop(0) if old else label)
    return made


def _key(value: Any) -> Hashable:
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)


def configured(base: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with a point's overrides; the order of the data stays that of the base."""
    config = base.copy_and_resolve_references()
    if config.data.seed < 0:
        config.data.seed = config.seed  # One order of the data for all seeds of the points.
    known = dict(flat(config_to_dict(config)))
    for field, value in overrides.items():
        expect(field in known, "sweep", "a field of the config", field)
        try:
            if value is None:  # A ConfigDict would take it.
                raise TypeError
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError):
            raise ValueError(f"{field}: expected a value like {known[field]!r}, got {value!r}.") from None
    return config


def program(config: ConfigDict) -> Hashable:
    """What is the same for all points that one program can train; None if the point has to be trained alone.
    Alone: packed dispatch (its trip counts follow the data of one run), costs measured in the run's own directory, a
    profile, and pmap."""
    if (
        config.train.packed
        or config.prior.costs == "measured"
        or config.train.profile_step >= 0
        or config.parallel.mode != "jit"
        or config.parallel.fsdp > 1
    ):
        return None
    fields = dict(flat(config_to_dict(config)))
    same = {name: _key(fields[name]) for name in sorted(fields) if name not in ARRAY_INPUTS}
    return tuple({**same, "data.seed": data_seed(config)}.items())
