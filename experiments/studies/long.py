"""One long evaluation batch, routed and not: time, nats, routes and answers. Shared by commands."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import interleave, median_and_spread
from meta_attention_jax import analysis
from meta_attention_jax.data import recall
from meta_attention_jax.data.manifest import same_data
from meta_attention_jax.fields import expect
from meta_attention_jax.objective import forward, summarise
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.evaluation import eval_step

COLUMNS = [
    analysis.Column("evaluation", "evaluation"),
    analysis.Column("length", "tokens", ",d"),
    analysis.Column("seconds", "seconds", ".3f", "median wall clock of one batch of this length"),
    analysis.Column("ratio", "of full-only", ".2f", "median over interleaved rounds; below 1 is faster"),
    analysis.Column("spread", "spread", ".2f", "interquartile range of that ratio"),
    analysis.Column("nll", "nats", ".3f", "of that batch; the models may have been trained shorter"),
    analysis.Column("routes", "k*", note="full, linear, local, of all tokens and layers"),
]
ANSWER_COLUMNS = [
    analysis.Column("accuracy_queries", "queries right", ".1%", "most likely next token = the value"),
    analysis.Column("same_answers", "same as full-only", ".1%", "queries with the same answer"),
]


def side(run: Run, mode: str, rows: int) -> tuple[functools.partial, functools.partial]:
    """(the evaluation step, the most likely next tokens), both on the first validation batch."""
    batch = jax.tree.map(lambda x: jnp.asarray(x[:rows]), next(run.dataset.eval_batches("validation")))
    model = run.model.clone(mode=mode, dispatch="packed")
    step = jax.jit(functools.partial(eval_step, model, run.dataset.num_kinds))

    @jax.jit
    def answers(params, batch, hypers):
        return jnp.argmax(forward(model, params, batch, hypers).logits, axis=-1)

    arguments = run.params, batch, run.hypers.routing
    return functools.partial(step, *arguments), functools.partial(answers, *arguments)


def long_evaluation(
    full_only: str | pathlib.Path, routed: str | pathlib.Path, *, length: int, rows: int = 1, rounds: int = 5
) -> list[dict[str, Any]]:
    """Rows of full-only, soft, and hard by packed dispatch, of the runs in two directories on the same data,
    timed in turns in this process: `rows` sequences of `length` tokens."""
    base, run = (load_run(p, sequence_length=length, batch_size=rows) for p in (full_only, routed))
    if not same_data(base.dataset.manifest(), run.dataset.manifest()):
        raise ValueError(f"routed: expected a run on the data of {str(full_only)!r}, got {str(routed)!r} on others.")
    name = run.config.controller.name
    expect(name != "fixed", "routed", "a run that routes", str(routed))
    sides = {
        "full-only": side(base, "soft", rows),
        f"{name}, soft": side(run, "soft", rows),
        f"{name}, hard (packed)": side(run, "hard", rows),
    }
    seconds = interleave({name: step for name, (step, _) in sides.items()}, rounds)
    queries = None
    if run.config.data.corpus == "recall":
        kind = next(run.dataset.eval_batches("validation")).kind[:rows]
        queries = kind == recall.KIND_QUERY
        expected = np.asarray(sides["full-only"][1]())
    table = []
    for label, (step, answers) in sides.items():
        sums = jax.device_get(step())
        metrics = summarise(sums, mechanisms=run.mechanisms, costs=run.hypers.routing.costs)
        ratio, spread = median_and_spread(seconds[label] / seconds["full-only"])
        shares = [metrics[f"fraction/{name}"] for name in run.mechanisms]
        row = {
            "evaluation": label, "length": length, "rows": rows,
            "seconds": float(np.median(seconds[label])), "ratio": ratio, "spread": spread, "rounds": rounds,
            "nll": metrics["nll"],
            "routes": " / ".join(f"{share:.1%}" for share in shares),
            "fractions": shares,
        }
        if queries is not None:
            row["queries"] = int(queries.sum())
            row["accuracy_queries"] = metrics["kinds"]["accuracy"][recall.KIND_QUERY]
            row["same_answers"] = float(np.mean((np.asarray(answers()) == expected)[queries]))
        table.append(row)
    return table


def columns_of(table: list[dict[str, Any]]) -> list[analysis.Column]:
    """The columns that these rows fill."""
    return COLUMNS + [c for c in ANSWER_COLUMNS if c.key in table[0]]
