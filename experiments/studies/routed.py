"""A routed published model against full attention, a window, fixed layers and its own routes in disorder, window by
window of held-out text.

python -m experiments.studies.routed --workdir=runs/smollm2/end_to_end --out=experiments/results/routed
    [--windows=300] [--prices=0,-0.3,-0.6] [--rank=4]

Every arm sees the same windows, prose, repeat and lookup in turn, hard, and is compared with full attention on each:
95 % intervals are of a bootstrap over windows. `rows.json` has a row per window and arm, and is gone on from by the
same controllers; with --rank the layers are first ranked for every task, on validation, by what it costs when one alone
is a window.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from experiments import common
from experiments.benchmarks.common import environment
from meta_attention_jax import analysis
from meta_attention_jax.analysis.statistics import bootstrap
from meta_attention_jax.config import read_stored
from meta_attention_jax.console import say
from meta_attention_jax.data.tasks import KINDS, LOOKUP, PROSE
from meta_attention_jax.fields import expect
from meta_attention_jax.files import write_whole
from meta_attention_jax.objective import forward, token_nll
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.backbone import trained
from meta_attention_jax.types import Batch

OF_MODEL = ("backbone", "window", "sinks")
"""What an order of layers holds for."""

Rows = list[dict[str, Any]]
Arm = Callable[[Batch], "tuple[float, Any]"]
"""Batch -> (lambda, forced routes or None)."""


@functools.partial(jax.jit, static_argnames="model")
def _apply(model: Any, params: Any, batch: Batch, hypers: Any, route: Any) -> tuple[Any, Any, Any]:
    output = forward(model, params, batch, hypers, route=route)
    return token_nll(output.logits, batch.targets), jnp.argmax(output.logits, axis=-1), output.routing.route


def measured(run: Run, batch: Batch, price: float, route: Any) -> dict[str, Any]:
    """One window: its task, nats and exactness of the tokens of its kind, and the share of token-layers on full."""
    model, hypers = run.model.clone(mode="hard", dispatch="dense"), run.hypers.routing
    out = _apply(model, run.params, batch, hypers.replace(price=jnp.float32(price)), route)
    nll, guess, routes = (np.asarray(x) for x in jax.device_get(out))
    full = (routes == run.mechanisms.index("full"))[:, np.asarray(batch.loss_mask)]
    return {**of_task(run, batch, nll, guess), "share": float(full.mean()), "routes": routes}


def of_task(run: Run, batch: Batch, nll: Any, guess: Any) -> dict[str, Any]:
    """What a window says of the tokens of its kind."""
    mask, kind = np.asarray(batch.loss_mask), np.asarray(batch.kind)
    task = int(kind[mask].min())
    # Before a window is full, it is full attention.
    own = mask & (kind == task) & ((np.asarray(batch.positions) >= run.config.model.window) | (task != PROSE))
    right = bool((guess == np.asarray(batch.targets))[own].all())
    return {
        "task": KINDS[task], "tokens": int(own.sum()), "nll": float(nll[own].mean()),
        "exact": right if task == LOOKUP else None,
    }


def windows(run: Run, split: str, count: int) -> Iterator[Batch]:
    """`count` windows of a split, one at a time, spread evenly over it."""
    for batch in run.dataset.eval_batches(split, max_batches=-(-count // run.dataset.batch_size)):
        for row in range(len(batch.row)):
            if np.any(batch.loss_mask[row]):
                yield jax.tree.map(lambda leaf: leaf[row : row + 1], batch)


def constant(run: Run, full: Sequence[int] | str) -> Arm:
    """All tokens of some layers on full attention, those of the others in the window."""
    layers = len(run.model.config.routed)
    chosen = range(layers) if full == "all" else full
    k, other = run.mechanisms.index("full"), run.mechanisms.index("local")
    by_layer = np.where(np.isin(np.arange(layers), list(chosen)), k, other).astype(np.int32)
    return lambda batch: (0.0, np.broadcast_to(by_layer[:, None, None], (layers, *batch.tokens.shape)).copy())


def rank(run: Run, count: int) -> dict[str, list[int]]:
    """Layers by what it costs, in nats on the tokens of a task, when one alone is a window; the dearest first. `count`
    windows of every task."""
    layers, tasks = len(run.model.config.routed), run.config.data.tasks
    seen = list(windows(run, "validation", 2 * count * len(tasks)))
    found = {}
    for task in tasks:
        own = [b for b in seen if task_of(b) == task][:count]
        lost = np.zeros(layers)
        for layer in range(layers):
            arm = constant(run, [i for i in range(layers) if i != layer])
            lost[layer] = np.mean([measured(run, batch, *arm(batch))["nll"] for batch in own])
        found[task] = [int(i) for i in np.argsort(-lost, kind="stable")]
        say(f"{task}, {len(own)} windows: layers by what a window costs them {found[task]}")
    return found


def task_of(batch: Batch) -> str:
    """Of one window: the kind of its tokens that is asked for."""
    return KINDS[int(np.asarray(batch.kind)[np.asarray(batch.loss_mask)].min())]


def compare(
    run: Run, split: str, count: int, prices: Sequence[float], order: Mapping[str, Sequence[int]], done: Rows,
    keep: Callable[[Rows], None], disorder: bool = True,
) -> Rows:
    """Rows of all windows: full, local, each price, the layers that are best for its task at the share of each price,
    and with `disorder` the routes of the first price shuffled over tokens and drawn at random."""
    rows = list(done)
    known = {row["window"] for row in done}
    layers, full = len(run.model.config.routed), run.mechanisms.index("full")
    other = run.mechanisms.index("local")
    for number, batch in enumerate(windows(run, split, count)):
        own = np.asarray(batch.loss_mask) & (np.asarray(batch.positions) >= run.config.model.window)
        if number in known or number >= count or not own.any():  # A short document is full attention anyway.
            continue
        rng = np.random.default_rng(number)
        found = {name: measured(run, batch, *constant(run, chosen)(batch))
                 for name, chosen in (("full", "all"), ("local", ()))}
        for price in prices:
            mine = found[f"routed {price:g}"] = measured(run, batch, price, None)
            best = order[mine["task"]][: round(mine["share"] * layers)]
            found[f"layers {price:g}"] = measured(run, batch, *constant(run, best)(batch))
        if disorder:
            routes = found[f"routed {prices[0]:g}"]["routes"]
            shuffled = np.stack([rng.permuted(layer, axis=-1) for layer in routes])
            rate = (routes == full).mean(axis=-1, keepdims=True)
            drawn = np.where(rng.random(routes.shape) < rate, full, other).astype(np.int32)
            found["shuffled"] = measured(run, batch, 0.0, shuffled)
            found["random"] = measured(run, batch, 0.0, drawn)
        for name, one in found.items():
            one.pop("routes")
            rows.append({"window": number, "arm": name, "split": split, **one})
        keep(rows)
        if number % 5 == 4:
            say(f"window {number + 1}/{count}: {found['full']['task']}, full {found['full']['nll']:.3f}, routed "
                f"{found[f'routed {prices[0]:g}']['nll']:.3f} at {found[f'routed {prices[0]:g}']['share']:.1%}")
    return rows


def summary(rows: Rows) -> Rows:
    """A row per arm and task: nats, share, exact answers, and nats above full with the interval of the bootstrap."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        base = {row["window"]: row for row in rows if row["task"] == task and row["arm"] == "full"}
        for arm in dict.fromkeys(row["arm"] for row in rows):
            mine = [row for row in rows if row["task"] == task and row["arm"] == arm]
            tokens = np.array([row["tokens"] for row in mine], float)
            above = np.array([row["nll"] - base[row["window"]]["nll"] for row in mine])
            middle, low, high = bootstrap(above, tokens)
            line = {
                "task": task, "arm": arm, "windows": len(mine),
                "nll": float(np.average([row["nll"] for row in mine], weights=tokens)),
                "share": float(np.mean([row["share"] for row in mine])),
                "above": middle, "above_low": low, "above_high": high,
            }
            if task == KINDS[LOOKUP]:
                line["exact"], line["exact_low"], line["exact_high"] = bootstrap(
                    np.array([row["exact"] for row in mine], float), np.ones(len(mine))
                )
            found.append(line)
    return found


COLUMNS = [
    analysis.Column("task", "task"), analysis.Column("arm", "arm"), analysis.Column("windows", "windows", "d"),
    analysis.Column("share", "on full", ".1%"), analysis.Column("nll", "nats", ".4f"),
    analysis.Column("above", "above full", "+.4f"), analysis.Column("interval", "95 %"),
    analysis.Column("exact", "exact", ".0%"),
]


def lines(rows: Rows) -> Rows:
    """`summary` as it is shown."""
    return [
        {**row, "interval": "" if row["arm"] == "full" else f"{row['above_low']:+.4f} to {row['above_high']:+.4f}"}
        for row in summary(rows)
    ]


def setting(run: Run, split: str, prices: Sequence[float]) -> dict[str, Any]:
    """What rows are of."""
    config: ConfigDict = run.config
    return {
        "name": config.name, "controllers": digest_of(run), "step": run.step, "split": split,
        "prices": list(prices), "window": config.model.window, "sinks": config.model.sinks,
        "length": run.dataset.sequence_length, "backbone": config.retrofit.backbone,
        "tasks": list(config.data.tasks),
    }


def digest_of(run: Run) -> str:
    """sha256 of what the run has trained."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(trained(run.params)).items()):
        digest.update("/".join(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def ranked_layers(path: pathlib.Path, model: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, list[int]]:
    """The order of layers for each task that `rank` has written for a model."""
    ranked = read_stored(path, "an order of layers")
    expect(ranked.get("model") == model, "out", f"layers of {model} in {str(path)!r}", ranked.get("model"))
    order = ranked.get("order")
    whole = isinstance(order, dict) and set(tasks) <= order.keys()
    expect(whole, "out", f"an order of layers for each of {tuple(tasks)} in {str(path)!r}", order)
    return order


def stored(path: pathlib.Path, about: Mapping[str, Any]) -> Rows:
    """Rows of the same setting that are there already."""
    if not path.is_file():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))
    expect(kept.get("setting") == about, "out", f"rows of {about}", kept.get("setting"))
    return kept["rows"]


def main() -> None:
    out = pathlib.Path(OUT.value)
    with common.user_mistakes():
        run = load_run(WORKDIR.value, **DATA())
        expect(run.config.retrofit.backbone, "workdir", "a run that has routed a published model", WORKDIR.value)
        expect({"full", "local"} <= set(run.mechanisms), "workdir", "full and local among the mechanisms",
               run.mechanisms)
        prices = common.finite("prices", PRICES.value)
        expect(prices, "prices", "at least one", prices)
        about = setting(run, SPLIT.value, prices)
        rows = stored(out / "rows.json", about)
        expect(about["tasks"] != ["prose"], "workdir",
               "a run with other tasks than prose, whose windows have numbers", about["tasks"])
        ranking, model = out / "layers.json", {k: about[k] for k in OF_MODEL}
        if RANK.value and not ranking.is_file():
            content = {"environment": environment(), "model": model, "order": rank(run, RANK.value)}
            write_whole(ranking, json.dumps(content, indent=1) + "\n")
        expect(ranking.is_file(), "rank", f"windows to rank layers by, as {str(ranking)!r} is not there", RANK.value)
        order = ranked_layers(ranking, model, about["tasks"])

    def keep(rows: Rows) -> None:
        content = {"setting": about, "environment": environment(), "rows": rows}
        write_whole(out / "rows.json", json.dumps(content) + "\n")

    rows = compare(run, SPLIT.value, WINDOWS.value, prices, order, rows, keep)
    print(analysis.terminal_table(lines(rows), COLUMNS))
    analysis.write_text(out / "README.md", page(rows, about))
    with common.spared("pictures"):
        analysis.save(analysis.share_figure(summary(rows), title=about["name"]), out / "share.png")


def page(rows: Rows, about: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    said = (
        f"{about['name']} at step {about['step']}, {about['split']} split, T {about['length']}, window "
        f"{about['window']}, {about['sinks']} sinks. Nats on prose from token {about['window']} on, on copies, on "
        "answers; `layers` are the fixed layers that are best for the task at the share of the price beside them, "
        "`shuffled` and `random` the routes of the first price in disorder. Intervals: bootstrap over windows, paired "
        "with full attention."
    )
    return f"# A routed published model\n\n{said}\n\n{analysis.markdown_table(lines(rows), COLUMNS)}\n"


if __name__ == "__main__":
    WORKDIR = common.define_path("workdir", None, "A run, or an export of one.")
    OUT = common.define_path("out", "experiments/results/routed", "Where rows, table and picture go.")
    SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Which split.")
    WINDOWS = flags.DEFINE_integer("windows", 300, "Of all tasks together.", 1)
    PRICES = flags.DEFINE_list("prices", ["0", "-0.3", "-0.6"], "Lambdas.")
    RANK = flags.DEFINE_integer("rank", 0, "Windows to rank the layers by, where that is not done.", 0)
    flags.mark_flag_as_required("workdir")
    DATA = common.define_data()
    common.run(main, prints=True)
