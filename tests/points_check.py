"""Run by test_together.py with 2 virtual devices: three points on one, on both, and interrupted."""

from __future__ import annotations

import pathlib
import sys

import jax

from configs import smoke
from meta_attention_jax.sweeps import together
from meta_attention_jax.sweeps.space import configured, sweep
from meta_attention_jax.training import job


def trained(root, devices, start=0, stop_after=None):
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
        jobs, label="x", names=["a", "b", "c"], start=start, stop_after=stop_after, progress=False
    ) == [None] * 3


def main():
    root = pathlib.Path(sys.argv[1])
    assert len(jax.devices()) == 2
    trained(root / "one", 1)
    trained(root / "two", 2)
    trained(root / "parts", 2, stop_after=6)
    trained(root / "parts", 2, start=6)


if __name__ == "__main__":
    main()
