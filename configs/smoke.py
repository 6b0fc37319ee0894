"""Every part of a run in seconds; learns nothing worth reading.

python -m experiments.train --config=configs/smoke.py --workdir=runs/smoke
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "smoke"
    config.data.corpus = "recall"
    config.data.sequence_length = 32
    config.data.batch_size = 8
    config.data.num_pairs = 4
    config.model.model_dim = 32
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.window = 4
    config.controller.hidden = 16
    config.train.steps = 30
    config.train.log_every = 5
    config.train.eval_every = 15
    config.train.eval_batches = 2
    config.train.checkpoint_every = 15
    return config
