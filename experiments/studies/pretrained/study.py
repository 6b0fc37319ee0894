"""The published model, its windows, what was chosen on validation, and rows of readings as they come."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.common import environment
from experiments.studies.pretrained import arms, local, plan
from experiments.studies.pretrained.arms import Read, Reader
from experiments.studies.pretrained.local import Pool
from experiments.studies.pretrained.material import Material, Window
from meta_attention_jax.console import say
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole
from meta_attention_jax.training import backbone, build

Job = tuple[str, int, float, Callable[[Window], Read]]
"""(arm, seed, asked share, how it reads a window)."""


class OutOfTime(Exception):
    """The minutes are over; what has been read is kept."""


class Record:
    """Rows of readings as they come, and what was chosen before them."""

    def __init__(self, out: pathlib.Path, about: dict[str, Any]) -> None:
        self.path, self._choices, self._found = out / "rows.jsonl", out / "choices.json", out / "found.json"
        self.rows = read_rows(self.path)
        self.done = {key_of(row) for row in self.rows}
        self.choices: dict[str, Any] = {"about": about}
        if self._choices.is_file():
            self.choices = json.loads(self._choices.read_text(encoding="utf-8"))
            expect(self.choices["about"] == about, "out", f"a record of {about}", self.choices["about"])
        self.found: dict[str, Any] = {}
        if self._found.is_file():
            self.found = json.loads(self._found.read_text(encoding="utf-8"))

    def note(self, name: str, found: Any) -> None:
        """What was found and is no row."""
        self.found[name] = found
        write_whole(self._found, json.dumps(self.found, indent=1) + "\n")

    def find(self, name: str, found: Callable[[], Any]) -> Any:
        """What was noted under a name, or is now."""
        if name not in self.found:
            self.note(name, found())
        return self.found[name]

    def began(self, parts: Sequence[str]) -> None:
        """Which parts are gone on with, by which code."""
        session = {"parts": list(parts), "rows": len(self.rows), **environment()}
        self.choices.setdefault("sessions", []).append(session)
        write_whole(self._choices, json.dumps(self.choices, indent=1) + "\n")

    def choose(self, name: str, found: Callable[[], Any]) -> Any:
        """What was chosen under a name, or is now."""
        if name not in self.choices:
            self.choices[name] = found()
            write_whole(self._choices, json.dumps(self.choices, indent=1) + "\n")
        return self.choices[name]

    def take_settings(self, out: pathlib.Path) -> None:
        """Those that another record chose, none of them tuned on this model."""
        path = out / "choices.json"
        expect(path.resolve() != self._choices.resolve(), "settings", "another record than out", str(out))
        expect(path.is_file(), "settings", "a folder with a choices.json", str(out))
        known = json.loads(path.read_text(encoding="utf-8"))
        expect("grid" in known, "settings", f"chosen ones in {path}", "none yet")
        wanted = {name: one for name, one in known.items() if name == "grid" or name.startswith("end to end ")}
        wanted["settings of"] = known["about"]["backbone"]["path"]
        for name, one in wanted.items():
            got = self.choose(name, lambda: one)  # noqa: B023
            expect(got == one, "settings", f"{name!r} as this record has it already", f"another in {path}")

    def add(self, row: dict[str, Any]) -> None:
        """One reading."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.done.add(key_of(row))


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """All rows but a last one that was cut; the file ends behind the last whole one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a reading is of."""
    return row["kind"], row["window"], row["arm"], row["seed"]


def row_of(window: Window, arm: str, seed: int, asked: float, read: Read) -> dict[str, Any]:
    """One reading of one window. "keys": of the keys that full attention reads everywhere, those that are read where it
    is asked for (a late token has more); "layers": the share by layer, per cent."""
    right = bool((read.guess == window.targets)[window.counted].all())
    reads = 1.0 + np.arange(len(window.tokens))
    return {
        "kind": window.kind, "window": window.number, "document": window.document, "arm": arm, "seed": seed,
        "asked": asked, "share": round(float(np.mean(read.full)), 5),
        "keys": round(float(np.mean(read.full * reads) / np.mean(reads)), 5), "tokens": int(window.counted.sum()),
        "nll": round(float(read.nll[window.counted].mean()), 6),
        "exact": right if window.kind.startswith("lookup") else None,
        "layers": [round(100 * float(share)) for share in read.full.mean(axis=1)],
    }


class Study:
    """The published model, the windows, what was chosen and what has been read."""

    def __init__(
        self, config: ConfigDict, out: pathlib.Path, workdir: pathlib.Path, minutes: float,
        corpora: Optional[Mapping[str, str]] = None, base: Optional[Study] = None, seeds: int = len(plan.SEEDS),
    ) -> None:
        """`base`: the study at the length that controllers were trained at; None: this one. `seeds`: of routers, in
        turn over the windows."""
        self.seeds = base.seeds if base else plan.SEEDS[:seeds]
        self.base = base or self
        build.check(config)
        params, tokenizer = backbone.load(config), backbone.described(config)[1]
        expect(tokenizer is not None, "backbone", "a model with its tokenizer.json", config.retrofit.backbone)
        model = build.build_model(config, tokenizer.vocab_size)
        self.config, self.workdir = config, workdir
        self.reader = Reader(model, params, plan.COSTS)
        length, window = config.data.sequence_length, config.model.window
        self.material = Material(tokenizer, length=length, window=window, corpora=corpora)
        self.material.check(plan.KINDS)
        about = {"backbone": backbone.identity(config), "length": length, "window": window,
                 "sinks": config.model.sinks, "hidden": config.controller.hidden, "protocol": plan.protocol()}
        if len(self.seeds) < len(plan.SEEDS):  # Which seed reads a window hangs on their number.
            about["seeds"] = len(self.seeds)
        self.record = Record(out, about)
        self._ends = time.monotonic() + 60 * minutes
        self._pools: dict[str, Pool] = {}

    def check_time(self) -> None:
        """Raises OutOfTime when the minutes are over."""
        if time.monotonic() > self._ends:
            raise OutOfTime

    def pool(self, split: str) -> Pool:
        """Streams of the training mixture (two each), or of validation (full attention's)."""
        if split not in self._pools:
            self.check_time()
            counts = {"train": plan.TRAINING_WINDOWS, "validation": plan.VALIDATION_WINDOWS}
            oracle = (False, True) if split == "train" else (False,)
            windows = self.material.mixture(split, counts[split])
            say(f"streams of {len(windows)} windows, {split}")
            self._pools[split] = local.collect(
                self.reader.model.config, self.reader.params, windows, oracle, say
            )
        return self._pools[split]

    def calibration(self, count: int) -> list[Window]:
        """Validation windows of every main kind."""
        return [w for kind in plan.CALIBRATED_ON for w in self.material.windows(kind, "validation", count)]

    def threshold(self, name: str, share: float, read: Callable[[Window, float], Read], start: float) -> float:
        """The threshold of an arm at a share."""

        def find():
            self.check_time()
            found, seen = arms.threshold_at(share, self.calibration(2), read, start)
            say(f"{name}: threshold {found:.4g}, {seen:.1%} on full attention at the last reading")
            return found

        return self.record.choose(f"threshold {name}", find)

    def forget_pools(self) -> None:
        """Gives their gigabytes back."""
        self._pools.clear()

    def read(
        self, kinds: Sequence[str], count: int, jobs: Callable[[Window], list[Job]],
        besides: Callable[[Read], dict[str, Any]] = lambda read: {},
    ) -> None:
        """Reads windows by all jobs that the plan wants and that are not done, the kinds in turn, window by window: of
        whatever time there is, every kind and arm has its part. `besides`: what else a row says of a reading."""
        began = time.monotonic()
        for number in range(count):
            for kind in kinds:
                [window] = self.material.windows(kind, "test", 1, skip=number)
                turn = window.turn(len(self.seeds))
                for arm, seed, asked, read in jobs(window):
                    done = (kind, number, arm, seed) in self.record.done
                    if not done and plan.wanted(kind, number, arm, seed, turn):
                        self.check_time()
                        seen = read(window)
                        self.record.add(row_of(window, arm, seed, asked, seen) | besides(seen))
            if number % 5 == 4:
                say(f"windows {number + 1}/{count} of each kind, {(time.monotonic() - began) / 60:.0f} min, "
                    f"{len(self.record.rows):,} rows")
