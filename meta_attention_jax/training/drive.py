"""The order of things in training: a step, then what is due after it. The same for one run and for many that are
trained together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from meta_attention_jax.objective import Sums
from meta_attention_jax.training.interrupt import Asked, Interrupted

SCALARS = ("gradient_norm", "threshold", "beta", "learning_rate")  # Of a step's metrics, what is logged as it is


@runtime_checkable
class Work(Protocol):
    """What is trained."""

    def step(self, number: int) -> None:
        """Trains on batch `number`."""

    def log(self, done: int) -> bool:
        """Tells of the steps since the last time; False if there is nothing left to train."""

    def evaluate(self, done: int) -> None:
        """Measures and logs on the validation split."""

    def save(self, done: int, *, evaluated: bool = True) -> None:
        """Starts writing a checkpoint; one without an evaluation comes after all others in what is best."""


def drive(work: Work, every: ConfigDict, asked: Asked, *, start: int, stop: int) -> None:
    """Steps `start` to `stop`, and what is due by the fields `every` of `config.train`; all of it after the last one.
    What is saved is evaluated, or it could not be the best; what is evaluated is logged.

    Raises:
      Interrupted: `asked` told of a signal. The step that was under way is saved, without the evaluation that a save
        has otherwise, for who sends signals does not wait for long.
    """
    for number in range(start, stop):
        work.step(number)
        done, signal = number + 1, asked(number + 1)
        cut = signal is not None and done < stop
        save = cut or done % every.checkpoint_every == 0 or done == stop
        evaluate = not cut and (save or done % every.eval_every == 0)
        if (save or evaluate or done % every.log_every == 0) and not work.log(done):
            return
        if evaluate:
            work.evaluate(done)
        if save:
            work.save(done, evaluated=evaluate)
        if signal is not None:
            raise Interrupted(signal, done)


class Tally:
    """What the steps since the last reading have measured; on the devices until `get` gives it to the host."""

    def __init__(self, get: Callable[[Any], Any]):
        self._get = get
        self._add = jax.jit(lambda total, new: jax.tree.map(jnp.add, total, new))
        self._clear()

    def _clear(self) -> None:
        self._sums: Optional[Sums] = None
        self._finite: list[Finite] = []
        self._last: dict[str, jax.Array] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Of one `train_step`."""
        sums = metrics["sums"]
        self._sums = sums if self._sums is None else self._add(self._sums, sums)
        self._finite.append(metrics["finite"])
        self._last = {name: metrics[name] for name in SCALARS}

    def read(self) -> tuple[Sums, Finite, dict[str, Any]]:
        """(sums, finite with a leading axis of steps, SCALARS of the last step), and begins anew."""
        read = self._get(self._sums), self._get(self._finite), self._get(self._last)
        self._clear()
        sums, finite, last = read
        return sums, jax.tree.map(lambda *flags: np.stack(flags), *finite), last


STACKED = "layers"  # The module whose parameters have a leading axis of layers, where layers are scanned

Finite = dict[str, Any]


def finite_parts(sums: Sums, gradients: Any, norm: Array, params: Any) -> Finite:
    """What of a step is finite; of penalty and routing by layer, of gradients and parameters by module, and by layer
    where a module stacks them."""

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
    """(index of the first step with something that is not finite, what it is in words), from `finite_parts` with a
    leading axis of steps; None if all is finite."""
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
