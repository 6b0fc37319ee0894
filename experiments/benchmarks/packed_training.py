"""What does packed dispatch save of a training step, once every token is hard?

python -m experiments.benchmarks.packed_training --workdir=runs/a [--json=FILE] [--rounds=5]
    [--dense_rows=0.5]

The whole step (loss, gradients, optimizer) of a trained run at its last step, on its own data and routes: all
mechanisms with the straight-through gradient (`dense`), against packed dispatch with the controller frozen (`packed`)
and with a share of the rows dense (`dense rows`). `ratio` is time over that of `dense`, same process, interleaved.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import build
from meta_attention_jax.training.step import init_state, num_dense_rows, train_step

JSON = commands.define_path("json", None, "Write the rows here.")
WORKDIR = commands.define_path("workdir", None, "Run directory of a routed arm.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", 1)
DENSE_ROWS = flags.DEFINE_float("dense_rows", 0.5, "Share of the rows.", 0.0, 1.0)
flags.mark_flag_as_required("workdir")


def main() -> None:
    with commands.user_mistakes():
        run = load_run(WORKDIR.value)
        if run.config.controller.name == "fixed":
            raise ValueError("workdir: expected a run that routes, got a fixed controller.")
    spec = dataclasses.replace(build.build_spec(run.config, run.dataset), accumulate=1)
    batch = jax.tree.map(jnp.asarray, run.dataset.train_batch(0))
    state = init_state(spec, jax.random.key(0), batch, run.hypers)
    hardened = jnp.int32(run.config.train.steps)  # The gate's schedules have ended by then.
    hypers = run.hypers.replace(routing=run.hypers.routing.replace(threshold=jnp.float32(1.0)))
    state = state.replace(params=run.params, step=hardened)
    packed = dataclasses.replace(spec, packed=True)
    rows = num_dense_rows(DENSE_ROWS.value, len(batch.row))
    part = dataclasses.replace(packed, dense_rows=DENSE_ROWS.value)
    specs = {"dense": spec, "packed": packed, f"{rows} of {len(batch.row)} rows dense": part}
    calls = {
        name: functools.partial(jax.jit(functools.partial(train_step, s)), state, batch, hypers)
        for name, s in specs.items()
    }
    sums = {name: call()[1]["sums"] for name, call in calls.items()}
    shares = sums["packed"].routes.sum(axis=(0, 1)) / sums["packed"].routes.sum()
    assert float(sums["dense"].hard.sum()) == float(sums["packed"].hard.sum()), "not all are hard"
    sizes = dict(
        run=run.config.name, T=run.dataset.sequence_length, batch=len(batch.row),
        **{name: float(s) for name, s in zip(run.config.model.mechanisms, shares)},
    )
    seconds = common.interleave(calls, ROUNDS.value)
    table = [common.ratio_row(name, seconds, name, "dense", **sizes) for name in specs if name != "dense"]
    common.tell([table], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
