"""About 1 B parameters at 8,192 tokens of context on 256 TPU v5e. Compiled, not trained.

python -m experiments.checks.compile --config=configs/pod_v5e_256.py --topology=v5e:16x16
Of 15.75 GiB a chip: soft step 4.56, packed step 4.47, decode step 6.34 (jax 0.10.2, libtpu 0.0.42.1, commit
50ee26d; experiments/results/compile_pod_v5e_256.json).

python -m experiments.train --config=configs/pod_v5e_256.py --workdir=/a/disk/that/all/hosts/see --multihost
    --config.data.corpus=path:...
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "pod_v5e_256"
    config.data.corpus = "path:corpus"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32768
    config.data.sequence_length = 8192
    config.data.batch_size = 256
    config.model.model_dim = 2048
    config.model.num_layers = 22
    config.model.num_heads = 16
    config.model.num_kv_heads = 4
    config.model.window = 512
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = True
    config.controller.hidden = 256
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup = 0.02
    config.train.steps = 20000
    config.train.eval_every = 1000
    config.train.eval_batches = 8
    config.train.checkpoint_every = 500
    config.train.packed = True
    config.train.packed_dense_rows = 0.0
    config.parallel.fsdp = 16
    return config
