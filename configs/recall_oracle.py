"""`recall` with all kinds of tokens: the truth of every route is known.

python -m experiments.ablation --config=configs/recall_oracle.py --workdir=runs/ablation-recall

Recall tokens are meant to need full attention; aggregate tokens (the most frequent mark so far) are
served by linear attention and not by two windows; tokens after answers and marks need a window; the
rest needs nothing. What came out otherwise: with 4 keys, linear attention alone answers recall too.

Recorded (5 seeds, two CPU cores, jax 0.10.2, commit e820864, about 90 minutes by --shard=0/2 and 1/2),
test split, hard: bayesian 1.651 nats at 36.5 % cost, prior-free 1.639 at 56.6 %, full-only 1.635,
linear+full 1.635 at 57.5 %, linear 1.697 at 15 %. All arms: FINDINGS, "what we found".
"""

from configs import recall


def get_config():
    config = recall.get_config()
    config.name = "recall oracle"
    config.data.sequence_length = 96
    config.data.batch_size = 20
    # 4 of each and many queries, or the slower seeds have not learned to recall when tokens turn hard
    # (tried on validation).
    config.data.num_keys = 4
    config.data.num_values = 4
    config.data.num_pairs = 4
    config.data.min_distance = 16  # two windows of 8 reach 15 tokens
    config.data.query_rate = 0.3
    config.data.num_marks = 4
    config.data.mark_rate = 0.25
    config.data.mark_bias = 0.2
    config.data.aggregate_rate = 0.05
    config.train.steps = 500
    return config
