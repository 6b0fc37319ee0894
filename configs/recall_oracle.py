"""`recall` with all three kinds of tokens: the truth of every route is known.

python -m experiments.ablation --config=configs/recall_oracle.py --workdir=runs/ablation-recall

local tokens follow from the last few, recall tokens need full attention, aggregate tokens (the most
frequent mark so far) are served by linear attention and not by a window.
"""

from configs import recall


def get_config():
    config = recall.get_config()
    config.name = "recall oracle"
    config.data.num_marks = 4
    config.data.mark_rate = 0.15
    config.data.mark_bias = 0.5
    config.data.aggregate_rate = 0.08
    config.data.query_rate = 0.2
    return config
