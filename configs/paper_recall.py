"""The authors' own system (see configs/paper.py) on `recall`.

python -m experiments.train --config=configs/paper_recall.py --workdir=runs/paper_recall

Recorded (experiments/results/paper/, five seeds, 600 steps, test split): 1.754 ± 0.019 nats soft, 1.947 ± 0.017 run hard,
every token linear (cost 15.0 %), expected cost 22.3 %; at weight 0 1.438 ± 0.015 hard at 31.2 ± 2.6 %.
"""

from configs import recall
from configs.paper import theirs


def get_config():
    return theirs(recall.get_config())
