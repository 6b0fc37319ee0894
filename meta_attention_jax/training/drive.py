"""The order of things in training: a step, then what is due after it, and what the steps between two logs have
measured. The same for one run and for many that are trained together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax.objective import Sums
from meta_attention_jax.training.interrupt import Asked, Interrupted
from meta_attention_jax.training.step import Finite

SCALARS = ("gradient_norm", "threshold", "beta", "learning_rate")  # Of a step's metrics, what is logged as it is.


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
        has otherwise, for who sends signals does not wait for long; but the last step has all that is due, since
        nothing would come after it.
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
