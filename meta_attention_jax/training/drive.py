"""The order of things in training: a step, then what is due after it. The same for one run and for many that are
trained together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from meta_attention_jax.objective import Sums
from meta_attention_jax.training.finite import Finite
from meta_attention_jax.training.interrupt import Asked, Interrupted

SCALARS = ("gradient_norm", "threshold", "beta", "learning_rate")
"""Of a step's metrics, what is logged as it is."""


class Due(NamedTuple):
    """What comes after a step."""

    log: bool
    evaluate: bool
    save: bool


def due(every: ConfigDict, done: int, stop: int) -> Due:
    """What comes after step `done`, by the fields of `config.train`; all of it after the last one.

    What is saved is evaluated, or it could not be the best; what is evaluated is logged.
    """
    save = done % every.checkpoint_every == 0 or done == stop
    evaluate = save or done % every.eval_every == 0
    return Due(evaluate or done % every.log_every == 0, evaluate, save)


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
    """Steps `start` to `stop`, and what is due by the fields `every` of `config.train`.

    Raises:
      Interrupted: `asked` told of a signal. The step that was under way is saved, without the evaluation that a save
        has otherwise, for who sends signals does not wait for long; but the last step has all that is due, since
        nothing would come after it.
    """
    for number in range(start, stop):
        work.step(number)
        done, signal = number + 1, asked(number + 1)
        cut = signal is not None and done < stop
        now = Due(log=True, evaluate=False, save=True) if cut else due(every, done, stop)
        if now.log and not work.log(done):
            return
        if now.evaluate:
            work.evaluate(done)
        if now.save:
            work.save(done, evaluated=now.evaluate)
        if signal is not None:
            raise Interrupted(signal, done)


class Tally:
    """What the steps since the last reading have measured; on the devices until it is read.

    Args:
      get: a tree on the devices -> the same on the host.
    """

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
