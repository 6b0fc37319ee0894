"""The arms that are compared: a name stands for overrides of any config.

    bayesian, prior-free, ...   a controller (`NAMED`)
    full-only, local+full, ...  one mechanism, or a fixed pattern over the layers, repeated
    kl-free                     the Dirichlet controller with beta 0, the paper's own prior-free arm
    bayesian@soft, ...          the same without a gate: no token is hardened in training
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from meta_attention_jax.controller.baselines import CONTROLLERS
from meta_attention_jax.fields import expect

NAMED: dict[str, dict[str, Any]] = {
    **{name: {"controller.name": name} for name in CONTROLLERS if name not in ("fixed", "softmax")},
    "prior-free": {"controller.name": "softmax"},
    "kl-free": {"controller.name": "bayesian", "objective.beta": 0.0},
    "full-only": {"controller.name": "fixed", "controller.fixed": ("full",)},
}
SOFT = "@soft"

DEFAULT = (
    "bayesian", "bayesian_mean", "softmax_kl", "prior-free", "kl-free", "cost_penalty", "switch", "gumbel",
    "full-only", "local+full", "full+local", "linear+full", "full+linear", "linear+local",
    "local+linear", "local", "linear",
    "bayesian@soft", "prior-free@soft",
)


def base_arm(arm: str) -> str:
    """The arm whose settings this one takes over: the same with a gate."""
    return arm.removesuffix(SOFT)


def overrides(
    arm: str, mechanisms: tuple[str, ...] = ("full", "linear", "local"), num_layers: int = 0
) -> dict[str, Any]:
    """Overrides of an arm; see the module. A pattern has to go into `num_layers`, where that is given."""
    if arm.endswith(SOFT) and arm.removesuffix(SOFT) in NAMED and arm != "full-only" + SOFT:
        return {**NAMED[arm.removesuffix(SOFT)], "gate.kind": "none"}
    if arm in NAMED:
        return NAMED[arm]
    pattern = tuple(arm.split("+"))
    if set(pattern) <= set(mechanisms):
        expect(num_layers % len(pattern) == 0, "arms", f"a pattern whose length divides the {num_layers} layers", arm)
        return {"controller.name": "fixed", "controller.fixed": pattern}
    known = f"some of {tuple(NAMED)} or patterns of {mechanisms} such as 'local+full'"
    raise ValueError(f"arms: expected {known}, got {arm!r}.")


def configured(config: ConfigDict, arm: str, **changes: Any) -> ConfigDict:
    """A copy of the config with an arm's controller, then the dotted changes."""
    config = config.copy_and_resolve_references()
    own = overrides(arm, tuple(config.model.mechanisms), config.model.num_layers)
    config.update_from_flattened_dict(own)
    config.update_from_flattened_dict(changes)
    config.name = f"{config.name} {arm}"
    return config


def grids(arm: str) -> list[tuple[str, tuple[float, ...]]]:
    """What is chosen for an arm, one field after the other: (field, factors of its value).

    Everybody's learning rate; beta of those with a penalty; strength of those with a Dirichlet prior and preference of
    those with any; rho of `cost_penalty`, the temperature of `gumbel`. The prior-free router, `switch` and fixed
    patterns have no more to choose: tables say how many settings an arm has tried.
    """
    own = overrides(arm)
    name = own["controller.name"]
    has, free_beta = CONTROLLERS[name], "objective.beta" not in own
    fields = (
        (True, "optimizer.learning_rate", (0.5, 1.0, 2.0)),
        (has.has_penalty and free_beta, "objective.beta", (1 / 3, 1.0, 3.0, 10.0)),
        (has.has_posterior, "prior.strength", (0.5, 1.0, 4.0)),
        (has.has_prior, "prior.preference", (0.3, 1.0)),
        (name == "cost_penalty", "controller.entropy_bonus", (0.3, 1.0, 3.0)),
        (name == "gumbel", "controller.temperature", (0.4, 1.0, 2.0)),
    )
    return [(field, factors) for chosen, field, factors in fields if chosen]
