"""Recall small enough to be learned in 200 steps: for notebooks.

python -m experiments.train --config=configs/quick.py --workdir=runs/quick
"""

from configs import recall


def get_config():
    config = recall.get_config()
    config.name = "quick recall"
    config.data.sequence_length = 48
    config.data.batch_size = 24
    config.data.num_keys = 3
    config.data.num_values = 3
    config.data.num_pairs = 3
    config.data.query_rate = 0.4
    config.model.model_dim = 48
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.controller.hidden = 32
    config.optimizer.learning_rate = 1e-2
    config.train.steps = 200
    config.train.log_every = 10
    config.train.eval_every = 20
    config.train.checkpoint_every = 100
    config.train.eval_batches = 4
    return config
