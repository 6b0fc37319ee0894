"""`recall` at a context of 4096 tokens, where hard routing by packed dispatch pays.

Starts from runs of 64 tokens, here those of `make demo`: from random parameters 600 steps of this
length did not learn to answer.

python -m experiments.train --config=configs/recall_long.py --workdir=runs/long-bayesian \\
    --config.train.init_from=runs/demo/recall-bayesian
python -m experiments.train --config=configs/recall_long.py --workdir=runs/long-full-only \\
    --config.train.init_from=runs/demo/recall-full-only --config.controller.name=fixed
python -m experiments.benchmarks.long_evaluation --full_only=runs/long-full-only --routed=runs/long-bayesian

Eleven minutes an arm on one CPU core each. Recorded (seed 0, jax 0.10.2, commit 03ec59a), validation: Bayesian 1.212
nats hard, 100 % of the queries answered, cost 26.5 %, in 0.32 of full-only's time; full-only 1.226 nats, 97.5 %.
"""

from configs import recall


def get_config():
    config = recall.get_config()
    config.name = "recall long"
    config.data.sequence_length = 4096
    config.data.batch_size = 2
    config.optimizer.learning_rate = 3e-3
    config.gate.start = 0.3
    config.gate.end = 0.6
    config.train.steps = 450
    config.train.eval_every = 50
    config.train.checkpoint_every = 150
    config.train.eval_batches = 4
    return config
