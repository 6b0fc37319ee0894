"""The prior's strength kappa on `recall`, with the baselines.

python -m experiments.sweep --config=configs/sweep_concentration.py --workdir=runs/sweep

Recorded (two CPU cores, jax 0.10.2, commit 9a3f822, `experiments/results/sweep_recall`): kappa 32 is chosen,
1.440 nats hard on the test split at 27.0 % cost; kappa hardly moves the cost.
"""

from configs import recall
from meta_attention_jax.sweeps.space import chain, log_spaced, point, product, sweep

SEEDS = range(3)


def get_config():
    config = recall.get_config()
    config.name = "strength on recall"
    return config


def fixed(name, *pattern):
    return point(name=name, **{"controller.name": "fixed", "controller.fixed": pattern})


def get_sweep():
    seeds = sweep("seed", list(SEEDS))
    return chain(
        product(sweep("prior.strength", log_spaced(0.5, 32.0, 7)), seeds),
        product(point(name="prior-free", **{"controller.name": "softmax"}), seeds),
        product(fixed("full-only", "full"), seeds),
        product(fixed("local+full", "local", "full"), seeds),
        product(fixed("full+local", "full", "local"), seeds),
        product(fixed("local", "local"), seeds),
        product(fixed("linear", "linear"), seeds),
    )
