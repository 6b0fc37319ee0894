"""A byte-level model of State of the Union addresses, sized for about an hour of one GPU. Not run yet."""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "sotu_small"
    config.data.sequence_length = 1024
    config.data.batch_size = 32
    config.model.model_dim = 512
    config.model.num_layers = 8
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.window = 128
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.controller.hidden = 128
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 20000
    config.train.eval_every = 1000
    config.train.eval_batches = 32
    config.train.checkpoint_every = 1000
    return config
