"""Generated key-value recall: only at the queries does the answer lie further back than any window.

python -m experiments.train --config=configs/recall.py --workdir=runs/recall

About a minute on two CPU cores. Recorded (seed 0, jax 0.10.2, commit 03ec59a, `make demo`), test split:
1.488 nats soft, 1.428 hard, projected cost 26.5 %, all queries answered; full on 100 % of the queries
and 0.0 % of the other tokens in layer 0. full-only: 1.449 nats. The source's own entropy: 1.402.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "recall"
    config.data.corpus = "recall"
    config.data.sequence_length = 64
    config.data.batch_size = 32
    config.data.num_keys = 8
    config.data.num_values = 8
    config.data.num_pairs = 8
    config.model.model_dim = 64
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.window = 8
    config.prior.preference = 1.0
    config.objective.beta = 0.003
    config.optimizer.learning_rate = 6e-3
    config.gate.start = 0.6
    config.gate.end = 0.9
    config.train.steps = 600
    config.train.eval_every = 150
    config.train.checkpoint_every = 300
    config.train.eval_batches = 8
    return config
