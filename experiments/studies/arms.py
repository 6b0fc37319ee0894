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


def controller_of(arm: str) -> str:
    """Name of the arm's controller."""
    return overrides(arm)["controller.name"]


def overrides(
    arm: str,
    mechanisms: tuple[str, ...] = ("full", "linear", "local"),
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Overrides of an arm; see the module.

    Raises:
      ValueError: unknown, or a pattern that does not go into num_layers.
    """
    if arm.endswith(SOFT) and arm.removesuffix(SOFT) in NAMED and arm != "full-only" + SOFT:
        return {**NAMED[arm.removesuffix(SOFT)], "gate.kind": "none"}
    if arm in NAMED:
        return NAMED[arm]
    pattern = tuple(arm.split("+"))
    if set(pattern) <= set(mechanisms):
        if num_layers is not None and num_layers % len(pattern):
            raise ValueError(f"arms: expected a pattern whose length divides the {num_layers} layers, got {arm!r}.")
        return {"controller.name": "fixed", "controller.fixed": pattern}
    raise ValueError(
        f"arms: expected some of {tuple(NAMED)} or patterns of {mechanisms} such as 'local+full', "
        f"got {arm!r}."
    )


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

    Everybody's learning rate; beta of those with a penalty; strength of those with a Dirichlet prior
    and preference of those with any; rho of `cost_penalty`, the temperature of `gumbel`. The
    prior-free router, `switch` and fixed patterns have no more to choose: tables say how many settings
    an arm has tried.
    """
    name = controller_of(arm)
    fields = [("optimizer.learning_rate", (0.5, 1.0, 2.0))]
    if CONTROLLERS[name].has_penalty and "objective.beta" not in overrides(arm):
        fields.append(("objective.beta", (1 / 3, 1.0, 3.0, 10.0)))
    if CONTROLLERS[name].has_posterior:
        fields.append(("prior.strength", (0.5, 1.0, 4.0)))
    if CONTROLLERS[name].has_prior:
        fields.append(("prior.preference", (0.3, 1.0)))
    if name == "cost_penalty":
        fields.append(("controller.entropy_bonus", (0.3, 1.0, 3.0)))
    if name == "gumbel":
        fields.append(("controller.temperature", (0.4, 1.0, 2.0)))
    return fields
