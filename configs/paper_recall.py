"""The authors' own system (see configs/paper.py) on `recall`.

python -m experiments.train --config=configs/paper_recall.py --workdir=runs/paper_recall
"""

from configs import recall
from configs.paper import theirs


def get_config():
    return theirs(recall.get_config())
