"""Run by test_together.py: three points on one of two virtual devices, on both, interrupted; or on three cores."""

from __future__ import annotations

import pathlib
import sys

import jax

from configs import smoke
from meta_attention_jax.sweeps import together
from meta_attention_jax.sweeps.space import configured, sweep
from meta_attention_jax.training import job, parallel


def trained(root, devices, start=0, stop_after=None, progress=False):
    config = smoke.get_config()
    config.optimizer.name = "sgd"
    config.controller.name = "softmax"
    config.model.num_layers = 1
    config.train.steps = 12
    config.train.eval_every = config.train.checkpoint_every = 6
    config.parallel.devices = devices
    points = sweep("optimizer.learning_rate", (0.01, 0.02, 0.03))
    jobs = [
        job.prepare(configured(config, point), root / str(index))
        for index, point in enumerate(points)
    ]
    assert together.train_together(
        jobs, label="x", names=["a", "b", "c"], start=start, stop_after=stop_after, progress=progress
    ) == [None] * 3


def on_cores(root):
    parallel.cores = lambda: 3  # Whatever this machine has.
    parallel.device_per_core()
    # Eight rows do not split over three: a run by itself has one.
    assert len(jax.devices()) == 3 and parallel.for_run() == jax.devices()[:1]
    assert parallel.for_points(parallel.for_run()) == jax.devices()
    trained(root / "cores", 0, progress=True)
    trained(root / "asked", 1, progress=True)
    together.device_bytes = lambda device: 1  # Not even for one.
    trained(root / "short", 0, progress=True)


def main():
    root = pathlib.Path(sys.argv[1])
    if sys.argv[2] == "cores":
        return on_cores(root)
    assert len(jax.devices()) == 2
    trained(root / "one", 1)
    trained(root / "two", 2)
    trained(root / "parts", 2, stop_after=6)
    trained(root / "parts", 2, start=6)


if __name__ == "__main__":
    main()
