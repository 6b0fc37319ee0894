"""What does a sweep as one program save, and where does it stop paying as the model grows?

python -m experiments.benchmarks.sweep [--json=FILE] [--rounds=5] [--widths=32,64,128,256]
    [--process_rounds=2]

`speedup_vs_processes`: whole commands by the wall clock. Eight `experiments.train`, one after another as a shell loop
would run them, against one `experiments.sweep` of the same eight points (`configs/sweep_timing.py`: D 64, L 2, T 64,
batch 8, 300 steps); start-up, compilation, evaluation and checkpoints included. "anew": nothing is kept of what is
compiled; "again": both sides find it as their first round left it, as commands do from the second time on.

`speedup_warm`: training steps alone, everything compiled: eight steps of one run each against one step
of eight points, same process, interleaved, by model width (L 2, T 64, batch 8). Below 1 it does not pay.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Optional

import jax
import jax.numpy as jnp
from absl import flags

from configs import sweep_timing
from experiments import common as commands
from experiments.benchmarks import common
from meta_attention_jax.sweeps.group import Group
from meta_attention_jax.sweeps.space import configured
from meta_attention_jax.training import build
from meta_attention_jax.training.job import Job
from meta_attention_jax.training.parallel import Parallel, device_per_core
from meta_attention_jax.training.step import init_state, train_step

JSON = commands.define_path("json", None, "Write the rows here.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds of the warm steps.", 1)
WIDTHS = flags.DEFINE_list("widths", ["32", "64", "128", "256"], "D; 16 per head.")
PROCESS_ROUNDS = flags.DEFINE_integer("process_rounds", 2, "Rounds of whole commands; 0 for none.", 0)

STEPS = 10
"""Steps per timed call: long against the cost of a call."""


def command(name: str, cache: Optional[str], *arguments: str) -> None:
    """A whole command, started anew; None: without what was compiled before."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"} if cache is None else {"XDG_CACHE_HOME": cache}
    asked = [sys.executable, "-m", f"experiments.{name}", "--config=configs/sweep_timing.py", *arguments]
    subprocess.run(asked, check=True, env=environment, stdout=subprocess.DEVNULL)


def processes(rounds: int, cache: Optional[str]) -> common.Row:
    """Eight commands against one; the order changes from round to round."""
    points = sweep_timing.get_sweep()

    def one_by_one():
        with tempfile.TemporaryDirectory() as folder:
            for i, point in enumerate(points):
                changes = (f"--config.{field}={value}" for field, value in point.items())
                command("train", cache, f"--workdir={folder}/{i}", *changes)

    def together():
        with tempfile.TemporaryDirectory() as folder:
            # No test split: the eight commands do not read it either.
            command("sweep", cache, f"--workdir={folder}/sweep", "--test_batches=0")

    sides = {"processes": one_by_one, "together": together}
    seconds = common.interleave(sides, rounds, warmup=0 if cache is None else 1)
    size, name = sweep_timing.get_config().model.model_dim, f"whole commands, {'anew' if cache is None else 'again'}"
    row = common.ratio_row(name, seconds, "processes", "together", points=len(points), size=size)
    return {**row, "speedup_vs_processes": row["ratio"]}


def warm(width: int, rounds: int) -> common.Row:
    """STEPS steps of eight runs one after another against STEPS steps of eight points."""
    base = sweep_timing.get_config()
    base.model.model_dim = width
    base.model.num_heads = base.model.num_kv_heads = max(width // 16, 1)
    dataset = build.build_dataset(base)
    jobs = [
        Job(config=config, path=pathlib.Path(), dataset=dataset, parallel=Parallel("jit"),
            spec=build.build_spec(config, dataset), hypers=build.build_hypers(config))
        for config in (configured(base, point) for point in sweep_timing.get_sweep())
    ]
    group = Group(jobs, jax.devices())
    batch = dataset.train_batch(0)
    one = jax.jit(functools.partial(train_step, jobs[0].spec))
    alone = [init_state(job.spec, jax.random.key(job.config.seed), batch, job.hypers) for job in jobs]
    many = group.over_points(functools.partial(train_step, group.spec), (1,), 3)
    states, shared = group.states(), group.replicate(batch)
    local = jax.tree.map(jnp.asarray, batch)

    def one_after_another():
        out = []
        for job, state in zip(jobs, alone):
            for _ in range(STEPS):
                state, _ = one(state, local, job.hypers)
            out.append(state)
        return out

    def at_once():
        state = states
        for _ in range(STEPS):
            state, _ = many(state, shared, group.hypers)
        return state

    seconds = common.interleave({"one after another": one_after_another, "at once": at_once}, rounds)
    row = common.ratio_row("warm steps", seconds, "one after another", "at once", points=len(jobs), size=width)
    return {**row, "speedup_warm": row["ratio"]}


def main() -> None:
    device_per_core()  # As `experiments.sweep`; a step of one run has the first, with the threads of all.
    with commands.user_mistakes():
        widths = common.numbers("widths", WIDTHS.value, "multiples of 32", lambda n: n % 32 == 0 < n)
    rows = [warm(width, ROUNDS.value) for width in widths]
    if PROCESS_ROUNDS.value:
        rows.append(processes(PROCESS_ROUNDS.value, None))
        with tempfile.TemporaryDirectory() as cache:
            rows.append(processes(PROCESS_ROUNDS.value, cache))
    common.tell([rows], JSON.value)


if __name__ == "__main__":
    commands.run(main, prints=True)
