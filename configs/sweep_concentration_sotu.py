"""The prior's strength kappa on State of the Union addresses, with the baselines.

python -m experiments.sweep --config=configs/sweep_concentration_sotu.py --workdir=runs/sweep-sotu
"""

from configs import tiny_lm
from configs.sweep_concentration import get_sweep  # noqa: F401


def get_config():
    config = tiny_lm.get_config()
    config.name = "strength on sotu"
    return config
