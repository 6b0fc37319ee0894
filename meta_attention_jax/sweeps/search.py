"""Points that Optuna proposes (extra `optuna`), a batch at a time.

What is proposed depends on the seed, the number of the batch, and on the points before it with what they scored, alone.
So a search that was stopped is not read from Optuna's journal: it is asked for the same batches again, whose points are
given, and told the same. The journal is written anew on the way, for those who read it.
"""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from meta_attention_jax.sweeps.space import Point, Range, Ranges, text_of

SAMPLERS = ("nsga2", "tpe")
"""For several objectives, and for one; TPE takes several too, and may do better by few points."""


def package() -> Any:
    """Optuna; raises ValueError where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError(
            "search: expected the package optuna (extra optuna: pip install 'optuna>=4') for --search=optuna, got none."
        ) from None
    return optuna


class Search:
    """A study of Optuna, whose objectives are all minimised."""

    def __init__(
        self, journal: pathlib.Path, ranges: Ranges, objectives: Sequence[str], sampler: str, *, seed: int, at_once: int
    ):
        """Starts from nothing; what lies at `journal` is of an earlier start and goes. One process at a time.

        Args:
          sampler: one of `SAMPLERS`.
          at_once: points of a batch.
        """
        optuna = package()
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for left in (journal, journal.with_name(f"{journal.name}.lock")):  # The lock of one that was killed.
            left.unlink(missing_ok=True)
        backend = JournalFileBackend(str(journal), JournalFileOpenLock(str(journal)))
        self._optuna, self._ranges, self._kind, self._seed, self._at_once = optuna, ranges, sampler, seed, at_once
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name="search",
            directions=["minimize"] * len(objectives), sampler=self._sampler(0),
        )
        with self._quiet():
            self._study.set_metric_names(list(objectives))
        self._distributions = {
            field: _distribution(optuna, one) for field, one in ranges.items() if isinstance(one, Range)
        }
        self._asked: list[Any] = []

    def ask(self, number: int, count: int, known: Sequence[Point] = ()) -> list[Point]:
        """The points of batch `number`, from 0: `count` new ones, or `known`, which it was asked for before."""
        self._study.sampler = sampler = self._sampler(number)
        self._asked = []
        for point in known or [{}] * count:
            sampler.given = {f: _name(self._ranges[f], point[f]) for f in self._distributions if point}
            self._asked.append(self._study.ask(self._distributions))
        return [
            {f: _value(one, trial.params[f]) if isinstance(one, Range) else one for f, one in self._ranges.items()}
            for trial in self._asked
        ]

    def tell(self, scores: Sequence[Optional[Sequence[float]]]) -> None:
        """The objectives of the points that were asked for last, in their order; None for one that diverged."""
        for trial, values in zip(self._asked, scores, strict=True):
            failed = self._optuna.trial.TrialState.FAIL if values is None else None
            self._study.tell(trial, values, state=failed)

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        samplers = self._optuna.samplers
        with self._quiet():
            if self._kind == "tpe":
                return _ours(samplers.TPESampler)(seed=seed, constant_liar=True)
            # A batch is a generation, though up to half of it diverge. Children lie between and around their parents:
            # those that take a number of either are often points that there are already.
            return _ours(samplers.NSGAIISampler)(
                seed=seed, population_size=max(2, self._at_once // 2), crossover=samplers.nsgaii.BLXAlphaCrossover()
            )

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            yield


def _ours(kind: type) -> type:
    """A sampler whose numbers have 6 digits: they read well, and a name that shows them says which they are. Values
    that are `given` it takes: to trials that are enqueued NSGA-II gives no generation."""

    class Sampler(kind):
        given: dict[str, Any] = {}

        def sample_relative(self, study, trial, search_space):
            found = super().sample_relative(study, trial, search_space)
            return {name: self._final(name, value, search_space[name]) for name, value in found.items()}

        def sample_independent(self, study, trial, param_name, param_distribution):
            found = super().sample_independent(study, trial, param_name, param_distribution)
            return self._final(param_name, found, param_distribution)

        def _final(self, name, value, distribution):
            return self.given.get(name, _rounded(value, distribution))

    return Sampler


def _rounded(value: Any, distribution: Any) -> Any:
    if not isinstance(value, float):
        return value
    return min(max(float(f"{value:.6g}"), distribution.low), distribution.high)


def _distribution(optuna: Any, one: Range) -> Any:
    kinds = optuna.distributions
    if one.values:
        return kinds.CategoricalDistribution([text_of(value) for value in one.values])
    kind = kinds.IntDistribution if isinstance(one.low, int) and isinstance(one.high, int) else kinds.FloatDistribution
    return kind(one.low, one.high, log=one.log)


def _name(one: Range, value: Any) -> Any:
    """What Optuna calls a value: a choice is a text, since its journal knows no tuples."""
    return text_of(value) if one.values else value


def _value(one: Range, name: Any) -> Any:
    return next(value for value in one.values if text_of(value) == name) if one.values else name
