"""What the paper's authors run, beside our defaults and fixed patterns, on `tiny_lm`; and their KL weight.

python -m experiments.studies.paper --workdir=runs/paper     (this sweep and that of recall, and the answers)
"""

from configs import tiny_lm
from configs.paper import theirs
from meta_attention_jax.config import config_to_dict, flat
from meta_attention_jax.sweeps.space import chain, log_spaced, point, product, sweep

SEEDS = range(5)
WEIGHTS = log_spaced(1e-4, 1.0, 9)


def get_config():
    config = tiny_lm.get_config()
    config.name = "paper on tiny_lm"
    return config


def arms(config):
    """Points by name; `config` is what all of them start from."""
    own = dict(flat(config_to_dict(config)))
    made = dict(flat(config_to_dict(theirs(config.copy_and_resolve_references()))))
    paper = {field: value for field, value in made.items() if value != own[field] and field != "name"}
    return {
        "paper": paper,
        "paper, KL weight 0": {**paper, "objective.beta": 0.0},
        "softmax": {"controller.name": "softmax"},
        "our defaults": {"controller.name": "bayesian"},
        "full-only": {"controller.name": "fixed", "controller.fixed": ("full",)},
        "local": {"controller.name": "fixed", "controller.fixed": ("local",)},
    }


def compared(config):
    """All arms at all seeds."""
    seeds = sweep("seed", list(SEEDS))
    return chain(*(product(point(name=name, **one), seeds) for name, one in arms(config).items()))


def get_sweep():
    theirs_at = [
        {**arms(get_config())["paper"], "name": f"paper at {weight:g}", "objective.beta": weight}
        for weight in WEIGHTS
    ]
    return chain(compared(get_config()), product(theirs_at, sweep("seed", [0])))
