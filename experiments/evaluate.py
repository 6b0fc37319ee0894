"""Evaluates a run on held-out data: soft, hard and gated; optionally with samples of pi.

Mode hard comes with the FLOPs and bytes that attention executes for its routes.

python -m experiments.evaluate --workdir=runs/recall [--split=validation] [--length=128]
    [--modes=soft,hard,gated] [--threshold=0.3] [--samples=4] [--step=best] [--json=FILE]
    [--corpus=path:WHERE_THE_DATA_ARE_NOW]
    [--prices=-0.3,0,0.1,0.3] [--beside=experiments/results/sweep_recall]
    [--budget_cost=0.3 | --budget_share=0.1]

--prices: the curve of hard nats against cost of this one model, whose hard tokens take argmax E pi - lambda c;
`prices.json` and `prices.png` of the run directory, the picture beside the runs of a sweep with --beside.
A budget finds the lambda that keeps it on validation, and stores it with the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import common
from experiments.studies import outcome
from meta_attention_jax import analysis
from meta_attention_jax.budgets import check_budget
from meta_attention_jax.fields import expect
from meta_attention_jax.kernels import select
from meta_attention_jax.objective import summarise
from meta_attention_jax.routing.decide import MODES
from meta_attention_jax.routing.dispatch import resolve_dispatch
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.parallel import Parallel

WORKDIR = common.define_path("workdir", None, "The run directory.", buckets=True)
SPLIT = flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "Which split.")
MODE = flags.DEFINE_list("modes", list(MODES), "Among soft, hard, gated.")
STEP = flags.DEFINE_string("step", "latest", "latest, best, or a saved step.")
LENGTH = flags.DEFINE_integer("length", None, "Sequence length; as trained when absent.", 1)
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "theta of gated mode; None: 0.5, or the run's own where its gate is in nats.", 0.0, 1.0
)
SAMPLES = flags.DEFINE_integer("samples", 0, "Samples of pi for predictive nats and ELBO.", 0)
MAX_BATCHES = flags.DEFINE_integer("max_batches", 64, "Batches, spread evenly over the split.", 1)
JSON = common.define_path("json", None, "Write the rows to this file as well.", buckets=True)
DATA = common.define_data()
PRICES = flags.DEFINE_list("prices", [], "Lambdas of the curve of this model; 0 is the plain argmax.")
BESIDE = common.define_path("beside", None, "A sweep's results (rows.json), to draw beside the prices.", buckets=True)
BUDGET_COST = flags.DEFINE_float("budget_cost", None, "Find the price for this projected cost, of 1.")
BUDGET_SHARE = flags.DEFINE_float("budget_share", None, "Find it for this share of tokens on full.")
flags.mark_flag_as_required("workdir")

COLUMNS = [
    analysis.Column("mode", "mode"),
    analysis.Column("tokens", "tokens", ",d"),
    analysis.Column("nll", "nats", ".4f"),
    analysis.Column("bits_per_byte", "bits/byte", ".4f"),
    analysis.Column("elbo", "nats + KL", ".4f"),
    analysis.Column("hard_fraction", "hard", ".1%"),
    analysis.Column("cost", "cost of k*", ".1%"),
    analysis.Column("routing_entropy", "H(E pi)/log K", ".1%"),
    analysis.Column("usage_entropy", "H(usage)/log K", ".1%"),
]


EXECUTED_COLUMNS = [
    analysis.Column("unit", "per token"),
    analysis.Column("executed_packed", "executed, packed", ".3e"),
    analysis.Column("executed_dense", "executed, dense select", ".3e"),
    analysis.Column("projected", "projected", ".3e"),
    analysis.Column("full_only", "full only", ".3e"),
]


def executed_table(row: dict[str, Any], run: Run) -> str:
    """FLOPs and bytes of attention per token, all layers, and which dispatch ran here."""
    used = resolve_dispatch(run.model.dispatch, time=run.dataset.sequence_length)
    if used == "packed":
        config = run.model.config  # Its kernel is what runs here; the run may have been trained by another.
        shape = (1, run.dataset.sequence_length, 1, config.head_dim)
        used += f" by the {select.packed(config.attention.kernel, shape, config.dtype or jnp.float32).name} kernel"
    if run.model.config.router.is_fixed:
        used = "of one mechanism"
    rows = [{"unit": unit, **row[unit.lower()]} for unit in ("FLOPs", "bytes")]
    title = f"Attention of all layers, mode hard (dispatch here: {used})"
    return f"{title}\n{analysis.terminal_table(rows, EXECUTED_COLUMNS)}"


PRICE_COLUMNS = [
    analysis.Column("price", "lambda", "g"),
    *(column for column in COLUMNS if column.key in ("nll", "bits_per_byte", "cost", "usage_entropy")),
]


def price_curve(run: Run, prices: Sequence[float], beside: Sequence[dict[str, Any]]) -> None:
    """Rows, table and picture of one model at several prices."""
    rows = []
    for price in prices:
        found = run.at(price=price).evaluate(SPLIT.value, mode="hard", max_batches=MAX_BATCHES.value)
        rows.append({"price": price, "step": run.step, "split": SPLIT.value, **found})
    columns = [analysis.Column(f"fraction/{name}", name, ".1%") for name in run.mechanisms]
    print(f"One model, mode hard: argmax E pi - lambda c\n{analysis.terminal_table(rows, PRICE_COLUMNS + columns)}")
    figure = analysis.prices_figure(rows, beside, title=run.config.name, split=SPLIT.value)
    with common.user_mistakes():
        analysis.write_json(run.path / "prices.json", rows)
        analysis.save(figure, run.path / "prices.png")
    print(run.path / "prices.png")


def main() -> None:
    with common.user_mistakes():
        prices = sorted(common.finite("prices", PRICES.value))
        beside = outcome.stored_lines(BESIDE.value) if BESIDE.value else []
        for mode in sorted(MODE.value):
            expect(mode in MODES, "modes", f"some of {MODES}", mode)
        if not MODE.value:
            raise ValueError(f"modes: expected some of {MODES}, got none.")
        # absl lets NaN through.
        given = THRESHOLD.value
        expect(given is None or 0 <= given <= 1, "threshold", "theta in [0, 1]", given)
        run = load_run(WORKDIR.value, step=STEP.value, sequence_length=LENGTH.value, **DATA())
        run.dataset  # Opened here, where its errors are the user's.
        budget = {"cost": BUDGET_COST.value, "share": BUDGET_SHARE.value}
        routes = run.config.controller.name != "fixed"
        expect(routes or not prices, "prices", "none for a run of controller.name = 'fixed'", prices)
        if any(b is not None for b in budget.values()):
            kind, value = check_budget(*budget.values(), run.hypers.routing.costs, run.mechanisms)
            run = run.fit_budget(**budget, max_batches=MAX_BATCHES.value)
            print(f"budget: {kind} {value:g} is kept on validation by lambda = "
                  f"{float(run.hypers.routing.price):.4f}; rows are at this price")
    if prices:
        price_curve(run, prices, beside)
    parallel = Parallel("jit")
    if run.config.data.batch_size % len(parallel.devices):
        parallel = Parallel("jit", parallel.devices[:1])
    evaluator = Evaluator(run.model, run.dataset, parallel)
    hypers = run.hypers.routing
    if given is not None or run.config.gate.unit != "nats":
        hypers = hypers.replace(threshold=jnp.float32(0.5 if given is None else given))
    price = float(hypers.price)
    params, hypers = parallel.place((run.params, hypers))
    where, mechanisms = dict(split=SPLIT.value, max_batches=MAX_BATCHES.value), run.mechanisms
    rows = []
    for mode in MODE.value:
        if mode == "hard":
            sums, accounting = evaluator.accounted(params, hypers, **where)
            spent = dataclasses.asdict(jax.tree.map(float, accounting))
            executed = {name: spent[name] for name in ("flops", "bytes")}
        else:
            sums, executed = evaluator.sums(params, hypers, mode=mode, **where), {}
        metrics = summarise(sums, mechanisms=mechanisms, costs=run.hypers.routing.costs)
        rows.append({"mode": mode, "step": run.step, "split": SPLIT.value, "price": price, **metrics, **executed})
    columns = COLUMNS + [analysis.Column(f"fraction/{name}", name, ".1%") for name in mechanisms]
    print(f"{run.path.name} at step {run.step}, {SPLIT.value} split\n{run.dataset}")
    print(analysis.terminal_table(rows, columns))
    for row in (row for row in rows if "flops" in row):
        print(executed_table(row, run))
    if SAMPLES.value:
        sampled = evaluator.sampled(params, hypers, samples=SAMPLES.value, **where)
        rows.append({"mode": "sampled", "samples": SAMPLES.value, "price": price, **sampled})
        print(f"{SAMPLES.value} samples of pi: predictive {sampled['predictive']:.4f} nats, "
              f"ELBO {sampled['elbo']:.4f} nats")
    if JSON.value:
        with common.user_mistakes():
            analysis.write_json(JSON.value, rows)


if __name__ == "__main__":
    common.run(main, prints=True)
