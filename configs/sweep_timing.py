"""Eight strengths of a small model: what `benchmarks/sweep.py` times. Teaches nothing about routing.

python -m experiments.benchmarks.sweep --json=experiments/results/sweep_timing.json
"""

from configs import recall
from meta_attention_jax.sweeps.space import log_spaced, sweep


def get_config():
    config = recall.get_config()
    config.name = "sweep timing"
    config.data.batch_size = 8
    config.train.steps = 300
    config.train.eval_every = config.train.checkpoint_every = 300
    config.train.eval_batches = 4
    return config


def get_sweep():
    return sweep("prior.strength", log_spaced(0.5, 64.0, 8))
