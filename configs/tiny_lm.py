"""A byte-level language model of State of the Union addresses, for two CPU cores."""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "tiny_lm"
    config.data.batch_size = 8
    config.objective.beta = 0.001
    config.train.steps = 400
    config.train.eval_every = 100
    config.train.eval_batches = 8
    config.train.checkpoint_every = 200
    return config
