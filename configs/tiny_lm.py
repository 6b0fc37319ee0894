"""A byte-level language model of State of the Union addresses, for two CPU cores."""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "tiny_lm"
    return config
