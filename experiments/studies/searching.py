"""A search: batches of points that Optuna proposes, each trained and told before the next. No flags.

`sweep.json` has the points of every batch before one of them is trained, and the runs say what became of them. A search
that is started again goes through the same batches: what has run to its end is told as it was, and the rest trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.common import user_mistakes
from experiments.studies import outcome, pinned
from meta_attention_jax.config import check_fields, config_to_dict, read_stored
from meta_attention_jax.fields import expect
from meta_attention_jax.sweeps.search import Search, package
from meta_attention_jax.sweeps.space import LONGEST, Point, Range, Ranges, configured, content_label, ends, text_of
from meta_attention_jax.training.processes import hold

OBJECTIVES = {"nats": "nll_hard", "soft_nats": "nll_soft", "cost": "cost"}
"""What is minimised, on validation, and its name in a row."""

JOURNAL = "optuna.log"

GROWING = ("points", "batches")


def check(base: ConfigDict, ranges: Ranges, objectives: Sequence[str]) -> None:
    """Raises ValueError for objectives that are none, for ranges whose ends no config may have, and without Optuna."""
    known = f"one or several of {', '.join(OBJECTIVES)}"
    ok = objectives and set(objectives) <= OBJECTIVES.keys() and len(set(objectives)) == len(objectives)
    expect(ok, "objectives", known, ",".join(objectives))
    shown = [max(len(text_of(v)) for v in one.values or (-1.23456e-10,)) + len(field.split(".")[-1]) + 2
             for field, one in ranges.items() if isinstance(one, Range)]
    expect(sum(shown) <= LONGEST, "config", f"ranges whose names and values fit into the {LONGEST} characters of a "
           "point's name", f"{sum(shown)} of {len(shown)} ranges")
    for point in ends(ranges):
        check_fields(configured(base, point))
    package()


def search(
    root: pathlib.Path, base: ConfigDict, ranges: Ranges, objectives: Sequence[str], *, sampler: str, trials: int,
    at_once: int, train: Callable[[Mapping[str, Point], Mapping[str, Any]], Any],
) -> dict[str, Point]:
    """The points by label of `trials` trials, `at_once` of them a batch, all trained.

    Args:
      train: trains points by label, of one batch, after it has pinned what is shared, the second.
    """
    spelled = {f: dataclasses.asdict(one) if isinstance(one, Range) else one for f, one in ranges.items()}
    asks = {"objectives": list(objectives), "sampler": sampler, "trials_at_once": at_once, "ranges": spelled}
    shared = {"config": config_to_dict(base), "search": asks}
    with contextlib.ExitStack() as stack:
        with user_mistakes():
            if not (root / "sweep.json").exists():
                pinned.pin(root / "sweep.json", {**shared, "points": {}, "batches": {}}, "this search")
            stack.enter_context(hold(root))
            points, batches = _stored(root)
            shared |= {"points": points, "batches": batches}
            pinned.pin(root / "sweep.json", shared, "this search", GROWING)
            asked = sum(map(len, batches.values()))
            expect(trials >= asked, "trials", f"at least the {asked} that {str(root)!r} has", trials)
            study = Search(root / JOURNAL, ranges, objectives, sampler, seed=base.seed, at_once=at_once)
        rows: dict[str, dict[str, Any]] = {}
        told = 0
        for number in map(str, itertools.count()):
            known = [points[label] for label in batches.get(number, [])]
            count = len(known) or min(at_once, trials - told)
            if not count:
                return points
            proposed = study.ask(int(number), count, known)
            batches[number] = [content_label(point) for point in proposed]
            new = {label: one for label, one in zip(batches[number], proposed) if label not in rows}
            points |= new
            ended = outcome.rows(root, new) if new else []
            if trained := len(ended) < len(new):
                print(f"\ntrials {told + 1} to {told + count} of {trials}")
                train(new, shared)
                ended = outcome.rows(root, new)
            rows |= {row["label"]: row for row in ended}
            with user_mistakes():
                left = [label for label in new if label not in rows]
                expect(not left, "search", "all points of a batch to come to their end (what is above says why one "
                       "did not; the same command tries it again, from the start if its folder is removed)", left)
            study.tell([
                None if "diverged" in rows[label] else [rows[label][OBJECTIVES[name]] for name in objectives]
                for label in batches[number]
            ])
            told += count
            if trained and told < trials:
                outcome.write_results(root, points, base.name, unasked=trials - told)


def _stored(root: pathlib.Path) -> tuple[dict[str, Point], dict[str, list[str]]]:
    """Points by label, and the labels of every batch by its number."""
    stored = read_stored(root / "sweep.json", "this search")
    points, batches = (stored.get(key) for key in GROWING)
    ok = isinstance(points, dict) and isinstance(batches, dict)
    ok = ok and all(isinstance(point, dict) and content_label(point) == label for label, point in points.items())
    ok = ok and all(isinstance(one, list) and points.keys() >= set(one) for one in batches.values())
    expect(ok, "workdir", f"this search in {str(root / 'sweep.json')!r}", "something else")
    return {
        label: {f: tuple(v) if isinstance(v, list) else v for f, v in point.items()} for label, point in points.items()
    }, batches
