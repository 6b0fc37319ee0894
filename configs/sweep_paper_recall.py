"""What the paper's authors run, beside our defaults and fixed patterns, on `recall`; see configs/sweep_paper.py."""

from configs import recall
from configs.sweep_paper import compared


def get_config():
    config = recall.get_config()
    config.name = "paper on recall"
    return config


def get_sweep():
    return compared(get_config())
