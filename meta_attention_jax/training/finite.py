"""Whether a step's numbers are finite, and if not, which of them."""

from __future__ import annotations

from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from meta_attention_jax.objective import Sums

STACKED = "layers"
"""The module whose parameters have a leading axis of layers, where layers are scanned."""

Finite = dict[str, Any]


def finite_parts(sums: Sums, gradients: Any, norm: Array, params: Any) -> Finite:
    """What of a step is finite.

    Returns:
      {"loss": [], "penalty": [layer], "routing": [layer], "gradients": by module, "norm": [] (of the gradients),
      "parameters": by module}; a module that stacks its layers has [layer].
    """
    def of(tree: Any) -> dict[str, Bool[Array, "..."]]:
        found = {}
        for name, module in tree.items():
            first = 1 if name == STACKED else 0
            flags = [
                jnp.all(jnp.isfinite(leaf), axis=tuple(range(first, leaf.ndim))) for leaf in jax.tree.leaves(module)
            ]
            found[name] = jnp.all(jnp.stack(flags), axis=0)
        return found

    return {
        "loss": jnp.isfinite(sums.nll),
        "penalty": jnp.isfinite(sums.penalty),
        "routing": jnp.isfinite(sums.entropy),
        "gradients": of(gradients),
        "norm": jnp.isfinite(norm),
        "parameters": of(params),
    }


def not_finite(finite: Finite) -> Optional[tuple[int, str]]:
    """The first step with something that is not finite, and what it is.

    Args:
      finite: of `finite_parts`, every leaf with a leading axis of steps.

    Returns:
      (index of the step, words); None if all is finite.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(finite)]
    good = np.all([leaf.reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)
    if good.all():
        return None
    index = int(np.argmin(good))
    return index, _words(jax.tree.map(lambda leaf: np.asarray(leaf)[index], finite))


def _words(finite: Finite) -> str:
    """Of one step: the quantity that comes first in it, and where in the model. Routing tells the layer, where a
    controller looks at it."""
    if not finite["loss"]:
        layers = np.flatnonzero(~finite["routing"])
        if not len(layers):
            return "the loss, though the routing of all layers is finite"
        before = f", after layer {layers[0] - 1}" if layers[0] else ""
        return f"the loss, first seen in the routing of layer {layers[0]}{before}"
    if not finite["penalty"].all():
        layers = ", ".join(map(str, np.flatnonzero(~finite["penalty"])))
        return f"the KL or penalty of layer {layers}"
    for quantity in ("gradients", "parameters"):
        places = [
            f"layer {layer}" if name == STACKED else name.replace("layer_", "layer ")
            for name, flags in finite[quantity].items()
            for layer in np.flatnonzero(~np.atleast_1d(flags))
        ]
        if places:
            return f"the {quantity} of {', '.join(places)}"
        if not finite["norm"]:
            return "the norm of the gradients"
    return "the routing of layer " + ", ".join(map(str, np.flatnonzero(~finite["routing"])))
