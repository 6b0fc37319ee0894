"""Every field of an experiment at its default; the other files here change what they need.

A field is set from the command line as `--config.<section>.<field>=<value>`. What there is, and what it
means, stands in `meta_attention_jax/config.py`; `python -m experiments.train --help_config` prints it.
"""

from meta_attention_jax.config import default_config as get_config

__all__ = ["get_config"]
