"""A byte-level language model of State of the Union addresses, for two CPU cores.

python -m experiments.train --config=configs/tiny_lm.py --workdir=runs/tiny_lm

About a minute and a half on two CPU cores. Recorded (seed 0, jax 0.10.2, commit 03ec59a, `make demo`),
test split: 1.595 nats soft, 1.569 hard (2.263 bits/byte), projected cost 29.3 %, no token on full.
prior-free: 1.539 hard. full-only: 1.578.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "tiny_lm"
    config.data.batch_size = 8
    config.data.order = 1  # As recorded, here and in what is made of this.
    config.objective.beta = 0.001
    config.train.steps = 400
    config.train.eval_every = 100
    config.train.eval_batches = 8
    config.train.checkpoint_every = 200
    return config
