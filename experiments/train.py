"""Trains one model in one directory, or goes on where it stopped.

python -m experiments.train --config=configs/recall.py --workdir=runs/recall
    [--config.prior.strength=2.0] [--config.controller.name=softmax] ... [--debug_nans]
    [--config.parallel.fsdp=8] [--multihost [--coordinator=HOST:PORT --num_processes=N --process_id=I]]

On a TPU pod or under Slurm start the same command with --multihost on every host; elsewhere also give the
coordinator, the address of process 0. The run directory has to be one that all of them see.

--debug_nans stops at the operation that makes the first NaN, with a traceback; slower, and for a run that
is known to diverge.
"""

from __future__ import annotations

import jax
from absl import flags
from ml_collections import config_flags

from experiments import common
from experiments.studies import final
from meta_attention_jax.training import processes
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.processes import Busy

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = common.define_path("workdir", None, "The run directory.", buckets=True)
MULTIHOST = flags.DEFINE_bool("multihost", False, "This is one of several processes of the run.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where not found.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0, with --coordinator.")
DEBUG_NANS = flags.DEFINE_bool("debug_nans", False, "Stop at the operation that makes a NaN.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    if DEBUG_NANS.value:
        jax.config.update("jax_debug_nans", True)
    with common.user_mistakes():
        explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        if MULTIHOST.value:
            processes.start(*explicit)
        elif any(value is not None for value in explicit):
            raise ValueError("multihost: expected --multihost with the address of a coordinator, got none.")
        job = prepare(CONFIG.value, WORKDIR.value)
    try:
        evaluation = train(job, final=final.of_run)
    except (Busy, Diverged) as error:
        common.fail(error)
    if not processes.leads():
        return
    for mode, metrics in evaluation.items():
        print(f"validation, {mode}: {metrics['nll']:.4f} nats, projected cost {metrics['cost']:.1%}")


if __name__ == "__main__":
    common.run(main)
