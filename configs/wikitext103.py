"""WikiText-103; needs --config.data.corpus=path:/where/the/wiki.train.tokens/is. Not run yet."""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "wikitext103"
    config.data.corpus = "path:wikitext-103"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 16384
    config.data.sequence_length = 1024
    config.data.batch_size = 32
    config.model.model_dim = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.num_kv_heads = 4
    config.model.window = 256
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.controller.hidden = 128
    config.optimizer.learning_rate = 6e-4
    config.train.steps = 50000
    config.train.eval_every = 2000
    config.train.eval_batches = 32
    config.train.checkpoint_every = 2000
    return config
