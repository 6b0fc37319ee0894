"""Held-out windows of prose, code, copies and needles, with the document that each is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Optional

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from meta_attention_jax.data import tasks
from meta_attention_jax.data.corpora import load_corpus
from meta_attention_jax.data.tasks import LOOKUP, PROSE, REPEAT, TaskConfig, Writer
from meta_attention_jax.data.tokenized import Split, tokenize_split
from meta_attention_jax.data.tokenizer import Tokenizer
from meta_attention_jax.fields import expect, near
from meta_attention_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Kind:
    """What windows are made of, and how."""

    corpus: str  # As `load_corpus` has it.
    task: str  # Of `data.tasks.TASKS`.
    needles: int = 0


KINDS = {
    "prose": Kind("sotu", "prose"),
    "code": Kind("stdlib", "prose"),
    "repeat": Kind("sotu", "repeat"),
    "lookup1": Kind("sotu", "lookup", 1),
    "lookup4": Kind("sotu", "lookup", 4),
    "lookup16": Kind("sotu", "lookup", 16),
}
_COUNTED = {"prose": PROSE, "repeat": REPEAT, "lookup": LOOKUP}


@dataclasses.dataclass(frozen=True)
class Window:
    """One window, and what of it counts."""

    kind: str
    number: int
    document: int  # Of its split: windows of one document are not independent.
    tokens: Int[np.ndarray, "time"]
    targets: Int[np.ndarray, "time"]
    counted: Bool[np.ndarray, "time"]  # Prose and code behind the first window of attention, copies, answers.
    lap: int = 0  # How often its document had been in turn before.

    def turn(self, seeds: int) -> int:
        """Which of so many seeds reads it, where they take turns: every document meets every seed in time."""
        return (self.number + self.lap) % seeds

    def batch(self) -> Batch:
        """As the model takes it."""
        ones = jnp.ones((1, len(self.tokens)), jnp.int32)
        places = jnp.arange(len(self.tokens), dtype=jnp.int32)[None]
        return Batch(
            tokens=jnp.asarray(self.tokens[None]), targets=jnp.asarray(self.targets[None]), segment_ids=ones,
            positions=places, loss_mask=ones.astype(bool), kind=0 * ones, num_bytes=0 * ones,
            row=jnp.zeros(1, jnp.int32),
        )


class Material:
    """Windows of T tokens. Window i of a kind and a split is a function of these alone: documents take turns in an
    order that is drawn once, and a window begins anywhere in its document."""

    def __init__(
        self, tokenizer: Tokenizer, *, length: int, window: int, corpora: Optional[Mapping[str, str]] = None
    ) -> None:
        self.length, self.window = length, window
        self._tokenizer = tokenizer
        self._own = dict(corpora or {})  # Another corpus in the place of one, for small trials.
        self._splits: dict[tuple[str, str], Split] = {}
        self._writer: Optional[Writer] = None

    def check(self, kinds: Sequence[str]) -> None:
        """Raises ValueError unless T tokens have room for these kinds."""
        for kind in kinds:
            self._room(KINDS[kind])

    def _room(self, made: Kind) -> tuple[TaskConfig, Optional[Writer]]:
        config = TaskConfig((made.task,), (1.0,), made.needles, self.window)
        writer = self._written(config) if made.task == "lookup" else None
        tasks.check_length(config, self.length, writer)
        return config, writer

    def windows(self, kind: str, split: str, count: int, skip: int = 0) -> list[Window]:
        """Windows number skip to skip + count - 1."""
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}{near(kind, KINDS)}")
        return [self._window(kind, split, number) for number in range(skip, skip + count)]

    def mixture(self, split: str, count: int) -> list[Window]:
        """Windows of prose, copies and needles (1, 4 and 16 in turn), two, two and one of five."""
        order = ("prose", "repeat", "lookup", "prose", "repeat")
        lookups = ("lookup1", "lookup4", "lookup16")
        found = []
        for i in range(count):
            turn, place = divmod(i, len(order))
            kind = lookups[turn % len(lookups)] if order[place] == "lookup" else order[place]
            found.append(self._window(kind, split, 10_000 + i))
        return found

    def _window(self, kind: str, split: str, number: int) -> Window:
        made = KINDS[kind]
        config, writer = self._room(made)
        held = self._split(made.corpus, split)
        stretch = tasks.stretch(made.task, self.length)
        long = np.flatnonzero(np.diff(held.offsets) >= stretch)
        expect(len(long), "length", f"documents of {stretch} tokens in {split!r} of {made.corpus!r}", "none")
        order = np.random.default_rng(0).permutation(long)
        document = int(order[number % len(order)])
        rng = np.random.default_rng([list(KINDS).index(kind), ("train", "validation", "test").index(split), number])
        begin, end = held.offsets[document : document + 2]
        begin = int(rng.integers(begin, end - stretch, endpoint=True))
        source = held.tokens[begin : begin + stretch].astype(np.int32)
        tokens, kinds, _ = tasks.window(made.task, rng, source, config, self.length, writer)
        counted = kinds == _COUNTED[made.task]
        if made.task == "prose":  # Before a window is full, it is full attention.
            counted &= np.arange(self.length) >= self.window
        return Window(kind, number, document, tokens[:-1], tokens[1:], counted, number // len(order))

    def _written(self, config: TaskConfig) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._tokenizer, tasks.WORDINGS[config.wording])
        return self._writer

    def _split(self, corpus: str, split: str) -> Split:
        key = self._own.get(corpus, corpus), split
        if key not in self._splits:
            self._splits[key] = tokenize_split(load_corpus(key[0]), split, self._tokenizer)
        return self._splits[key]
