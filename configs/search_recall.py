"""The prior's strength and the price on cost, searched on `recall` with half the points of the grid's 39.

python -m experiments.sweep --config=configs/search_recall.py --workdir=runs/search-recall
    --search=optuna --sampler=tpe --trials=18 --trials_at_once=6
python -m experiments.studies.front --workdir=runs/search-recall --beside=experiments/results/sweep_recall

Not recorded yet. The grid is configs/sweep_concentration.py.
"""

from configs import recall
from meta_attention_jax.sweeps.space import choice, log_uniform


def get_config():
    config = recall.get_config()
    config.name = "search on recall"
    return config


def get_search():
    return {
        "prior.strength": log_uniform(0.5, 32.0),
        # From next to none to linear attention alone: over 1 / (0.3 - 0.15) nothing else is worth its nominal cost.
        "gate.price": log_uniform(0.01, 20.0),
        "seed": choice(0, 1, 2),
    }
