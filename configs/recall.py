"""Generated key-value recall: full attention is needed at the queries and nowhere else."""

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
