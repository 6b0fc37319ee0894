"""The arms that are compared: a name stands for overrides of any config."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from meta_attention_jax.controller.baselines import CONTROLLERS, WITH_POSTERIOR

NAMED: dict[str, dict[str, Any]] = {
    **{name: {"controller.name": name} for name in CONTROLLERS if name != "fixed"},
    "prior-free": {"controller.name": "softmax"},
    "full-only": {"controller.name": "fixed", "controller.fixed": ("full",)},
}
del NAMED["softmax"]  # It goes by what it lacks.

WITH_PENALTY = (*WITH_POSTERIOR, "softmax_kl", "cost_penalty", "switch")
"""Arms whose objective has a term weighed by beta."""

DEFAULT = (
    "bayesian", "bayesian_mean", "softmax_kl", "prior-free", "cost_penalty", "switch", "gumbel",
    "full-only", "local+full", "full+local", "linear+full", "full+linear", "local",
)


def overrides(arm: str, mechanisms: tuple[str, ...] = ("full", "linear", "local")) -> dict[str, Any]:
    """Overrides of an arm: one of `NAMED`, or a fixed pattern of mechanisms over the layers, such as
    "local+local+full", repeated.

    Raises:
      ValueError: neither of these.
    """
    if arm in NAMED:
        return NAMED[arm]
    pattern = tuple(arm.split("+"))
    if set(pattern) <= set(mechanisms):
        return {"controller.name": "fixed", "controller.fixed": pattern}
    raise ValueError(
        f"arms: expected some of {tuple(NAMED)} or patterns of {mechanisms} such as 'local+full', "
        f"got {arm!r}."
    )


def configured(config: ConfigDict, arm: str, **changes: Any) -> ConfigDict:
    """A copy of the config with an arm's controller, then the dotted changes."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides(arm, tuple(config.model.mechanisms)))
    config.update_from_flattened_dict(changes)
    config.name = f"{config.name} {arm}"
    return config


def grids(arm: str) -> list[tuple[str, tuple[float, ...]]]:
    """What is chosen for an arm, one field after the other: (field, factors of its value).

    Everybody's learning rate; beta of those with a penalty; strength and preference of those with a
    Dirichlet prior, preference alone of the categorical one.
    """
    fields = [("optimizer.learning_rate", (0.5, 1.0, 2.0))]
    if arm in WITH_PENALTY:
        fields.append(("objective.beta", (1 / 3, 1.0, 3.0)))
    if arm in WITH_POSTERIOR:
        fields.append(("prior.strength", (0.5, 1.0, 4.0)))
    if arm in (*WITH_POSTERIOR, "softmax_kl"):
        fields.append(("prior.preference", (0.3, 1.0)))
    return fields
