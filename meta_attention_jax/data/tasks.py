"""Windows of text whose targets need a known reach, made of any corpus of documents:

    prose    a window as it is
    repeat   a stretch of P tokens that comes back until the window is full: from the second copy on, whoever looks P
             tokens back knows the next token
    lookup   prose in which needles are strewn, each of which binds a made-up word to another, and which ends with a
             question for one of them and the answer: "... Note: the code word of Zora is Milu. ... Remember the note
             above: the code word of Zora is Milu"

A copy and an asked needle are further back than any window of local attention. Pure functions of a generator each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from meta_attention_jax.data.tokenizer import Tokenizer
from meta_attention_jax.fields import expect, near

PROSE, REPEAT, LOOKUP, OTHER = range(4)
KINDS = ("prose", "repeat", "lookup", "other")
"""Names of the kinds of tokens, by what it takes to predict the next one. `other` are those of repeat and lookup that
are nothing special."""

TASKS = KINDS[:OTHER]
NEEDLES = (1, 4, 16)  # Drawn from where their number is not given.
SEEN = 8  # Tokens of the second copy after which its next one is taken to be known.

Ids = Int[np.ndarray, "_"]
Window = tuple[Int[np.ndarray, "time_and_next"], Int[np.ndarray, "time"]]
"""T + 1 tokens, and the kinds of the T targets."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_MOST_NEEDLES = 500
_SAMPLE = 256  # Words whose tokens bound those of all.


@dataclasses.dataclass(frozen=True)
class Wording:
    """What a needle says: note + answer + end; asked for by the question alone."""

    note: str  # With {name}, a made-up word.
    question: str  # With {name}.
    answer: str  # With {value}.
    end: str
    digits: bool = False  # Values are numbers of six digits, else words.


_OF = "the code word of {name} is"
_CODE, _NUMBER = " The code word of {name} is", " {name}'s secret number is"
WORDINGS = (
    # Of four that SmolLM2-135M was asked by, the one that it answers best: 16 of 16 single needles, 13 of 16 of four;
    # the next one 15 and 10.
    Wording(f"\n\nNote: {_OF}", f"\n\nRemember the note above: {_OF}", " {value}", ".\n\n"),
    Wording(_CODE, _CODE, " {value}", "."),
    Wording(_NUMBER, _NUMBER, " {value}", ".", digits=True),
)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which tasks there are, and how far they reach."""

    tasks: tuple[str, ...] = ("prose",)
    shares: tuple[float, ...] = (1.0,)  # Of the training windows, by task; in any unit.
    needles: int = 0  # Of a lookup; 0 draws one of NEEDLES.
    window: int = 1  # Of local attention.
    min_distance: int = 0  # Tokens; see `period` and `distance`.
    wording: int = 0  # Of WORDINGS.

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"data.tasks: expected some of {', '.join(TASKS)}, got {task!r}{near(task, TASKS)}")
        distinct = 0 < len(self.tasks) == len(set(self.tasks))
        expect(distinct, "data.tasks", "one or more distinct names", self.tasks)
        ok = len(self.shares) == len(self.tasks) and all(0.0 < share < math.inf for share in self.shares)
        expect(ok, "data.shares", f"a number > 0 for each of {self.tasks}", self.shares)
        expect(0 <= self.needles <= _MOST_NEEDLES, "data.needles", f"0 to {_MOST_NEEDLES}", self.needles)
        expect(self.min_distance >= 0, "data.min_distance", "at least 0", self.min_distance)
        expect(0 <= self.wording < len(WORDINGS), "wording", f"one of 0 to {len(WORDINGS) - 1}", self.wording)

    @property
    def period(self) -> int:
        """The least P of a repeat: two windows of local attention."""
        return max(2 * self.window, self.min_distance)

    @property
    def distance(self) -> int:
        """A question begins more than so many tokens behind the end of its needle."""
        return max(self.window, self.min_distance)

    def manifest(self) -> dict[str, Any]:
        """What the windows are made by, as JSON."""
        return {
            "tasks": list(self.tasks), "shares": list(self.shares), "needles": self.needles, "period": self.period,
            "distance": self.distance, "wording": dataclasses.asdict(WORDINGS[self.wording]),
        }

    def __str__(self) -> str:
        total = sum(self.shares)
        return ", ".join(f"{task} {share / total:.0%}" for task, share in zip(self.tasks, self.shares))

    def draw(self, rng: np.random.Generator) -> str:
        """A task by the shares."""
        edges = np.cumsum(self.shares)
        return self.tasks[int(np.searchsorted(edges[:-1], rng.random() * edges[-1], side="right"))]


def stretch(task: str, length: int) -> int:
    """The most tokens of one document from which a window of T = `length` is made."""
    return length // 2 if task == "repeat" else length + 1


def check_length(config: TaskConfig, length: int, writer: Writer | None) -> None:
    """Raises ValueError unless windows of T = `length` have room for the tasks."""
    if "repeat" in config.tasks:
        least = 2 * config.period
        expected = f"at least {least} tokens, two copies of a stretch of {config.period}"
        expect(length >= least, "sequence_length", expected, length)
    if writer is not None:
        count = config.needles or max(NEEDLES)
        least = writer.longest(count) + config.distance - 1
        expected = f"at least {least} tokens, as data.needles may be {count} and a question {config.distance} behind"
        expect(length >= least, "sequence_length", expected, length)


def window(
    task: str, rng: np.random.Generator, source: Ids, config: TaskConfig, length: int, writer: Writer | None
) -> tuple[Ids, Ids, int]:
    """T + 1 tokens, the kinds of the T targets, and how many targets there are: fewer in a document's last prose. Of
    `source`, `stretch` tokens of a document, or all that there are of prose."""
    if task == "repeat":
        return *repeat(rng, source, config, length), length
    if task == "lookup":
        return *lookup(rng, source, config, length, writer), length
    tokens = np.zeros(length + 1, np.int32)
    tokens[: len(source)] = source
    return tokens, np.full(length, PROSE, np.int32), len(source) - 1


def repeat(rng: np.random.Generator, source: Ids, config: TaskConfig, length: int) -> Window:
    """The first P tokens of `source`, P uniform in [period, T // 2], again and again; a target at P + SEEN or behind is
    of kind REPEAT."""
    period = int(rng.integers(config.period, length // 2, endpoint=True))
    tokens = np.resize(source[:period], length + 1).astype(np.int32)
    return tokens, np.where(np.arange(1, length + 1) >= period + SEEN, REPEAT, OTHER).astype(np.int32)


def lookup(rng: np.random.Generator, source: Ids, config: TaskConfig, length: int, writer: Writer) -> Window:
    """The beginning of `source` with needles behind some of its sentences, where there are any, and a question whose
    answer is of kind LOOKUP."""
    count = config.needles or int(rng.choice(NEEDLES))
    bindings = writer.bindings(rng, count)
    needles = [np.concatenate([note, answer, writer.end]) for note, _, answer in bindings]
    _, question, answer = bindings[0]  # Any: they are alike.
    free = length + 1 - len(question) - len(answer) - sum(map(len, needles))
    sentences = 1 + np.flatnonzero(writer.is_end[source[:free]])
    # Whatever comes between them, the asked needle ends with `distance` tokens of prose before the question.
    most = [free - config.distance, *[free] * (count - 1)]
    places = [_place(rng, sentences, limit) for limit in most]
    parts, at = [], 0
    for i in np.argsort(places, kind="stable"):
        parts += [source[at : places[i]], needles[i]]
        at = places[i]
    tokens = np.concatenate([*parts, source[at:free], question, answer]).astype(np.int32)
    return tokens, np.where(np.arange(length) >= length - len(answer), LOOKUP, OTHER).astype(np.int32)


def _place(rng: np.random.Generator, sentences: Int[np.ndarray, "n"], limit: int) -> int:
    """Where a needle goes in: at the end of a sentence up to `limit`, else anywhere up to there."""
    allowed = sentences[sentences <= limit]
    return int(rng.choice(allowed)) if len(allowed) else int(rng.integers(limit, endpoint=True))


class Writer:
    """Needles in the tokens of a tokenizer. Note, question, answer and end are encoded apart, so that the answer is the
    same tokens in both, and known."""

    def __init__(self, tokenizer: Tokenizer, wording: Wording) -> None:
        self._tokenizer, self._wording = tokenizer, wording
        self.end = tokenizer.encode(wording.end.encode())
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.is_end: Bool[np.ndarray, "vocab"] = np.array([text.endswith(b".") or b"\n" in text for text in texts])
        rng = np.random.default_rng(0)
        sample = [self._binding(_word(rng), self._value(rng)) for _ in range(_SAMPLE)]
        # Tokens of a note, of a question, of an answer.
        self._most = [max(len(part) for part in parts) for parts in zip(*sample)]

    def longest(self, count: int) -> int:
        """The most tokens that so many needles take, and the question for one with its answer."""
        note, question, answer = self._most
        return count * (note + answer + len(self.end)) + question + answer

    def bindings(self, rng: np.random.Generator, count: int) -> list[tuple[Ids, Ids, Ids]]:
        """(note, question, answer) of so many needles: no two have a word in common. Words of more tokens than any of a
        sample are passed over."""
        found: list[tuple[Ids, Ids, Ids]] = []
        known: set[str] = set()
        while len(found) < count:
            name, value = _word(rng), self._value(rng)
            binding = self._binding(name, value)
            fits = all(len(part) <= most for part, most in zip(binding, self._most))
            if fits and name != value and not known & {name, value}:
                known |= {name, value}
                found.append(binding)
        return found

    def _binding(self, name: str, value: str) -> tuple[Ids, Ids, Ids]:
        said = self._wording
        texts = (said.note.format(name=name), said.question.format(name=name), said.answer.format(value=value))
        note, question, answer = (self._tokenizer.encode(text.encode()) for text in texts)
        return note, question, answer

    def _value(self, rng: np.random.Generator) -> str:
        return str(rng.integers(100_000, 1_000_000)) if self._wording.digits else _word(rng)


def _word(rng: np.random.Generator) -> str:
    """Two syllables, such as Milu: one of 4,900, none of which begins another."""
    letters = (_CONSONANTS, _VOWELS) * 2
    return "".join(part[i] for part, i in zip(letters, rng.integers([len(part) for part in letters]))).capitalize()
