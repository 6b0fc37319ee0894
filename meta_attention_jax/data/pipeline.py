"""Batches of token windows, without any iterator state.

Row r of training batch s is a function of (seed, s, r) alone: resuming needs the step, and a process that is given some
of the rows makes exactly those. Everything is NumPy on the host.

Windows of text come in one of two orders, `data.order`: 2, a `grain.MapDataset` that shuffles them, every one once an
epoch; or 1, that of older runs, a place drawn for every row.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, Shaped

from meta_attention_jax.data import recall as recall_lib
from meta_attention_jax.data import tasks as tasks_lib
from meta_attention_jax.data.corpora import SPLITS, check_split, load_corpus
from meta_attention_jax.data.recall import RecallConfig
from meta_attention_jax.data.stored import is_stored, open_stored
from meta_attention_jax.data.tasks import TaskConfig
from meta_attention_jax.data.tokenized import Source, Split, Tokenized, Windows, shuffled, tokenize
from meta_attention_jax.data.tokenizer import SymbolTokenizer, Tokenizer, make_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.types import Batch

_TRAIN = len(SPLITS)  # Stream of the training steps; `recall`'s held-out splits use their own index.
_EVAL_BATCHES = 16  # Of splits that have no end.


def make_dataset(
    *,
    corpus: str,
    sequence_length: int,
    batch_size: int,
    seed: int,
    tokenizer: str | Tokenizer = "bytes",
    vocab_size: int | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    recall: RecallConfig | None = None,
    tasks: Sequence[str] = ("prose",),
    shares: Sequence[float] = (1.0,),
    needles: int = 0,
    wording: int = 0,
    min_distance: int = 0,
    window: int = 2,
    rows: slice | np.ndarray = slice(None),
    split: str = "auto",
    order: int = 2,
) -> Dataset:
    """The data set of one experiment: "recall", a corpus that `load_corpus` knows, or token files.

    Args:
      batch_size: rows of the whole batch, over all processes.
      seed: of the training batches.
      tokenizer, vocab_size, tokenizer_dir: as `make_tokenizer`, or a tokenizer that there is, for text; `recall` has a
        vocabulary of its own, and token files were written with one.
      tasks, shares, needles, wording, min_distance: of text, as `TaskConfig`; prose alone is windows as they are.
      window: of local attention; raises `min_distance`, recall's too, to at least that.
      rows: the rows of every batch that this process makes.
      split: of files of one's own; see `data/splits.py`.
      order: of training windows of prose; see the head of this module.
    """
    for field, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        expect(value >= 1, field, "at least 1", value)
    expect(seed >= 0, "seed", "at least 0", seed)
    if not np.arange(batch_size)[rows].size:
        raise ValueError(f"rows: expected some of the batch's {batch_size} rows, got {rows}.")
    made_of = TaskConfig(tuple(tasks), tuple(shares), needles, window, min_distance, wording)
    shape = dict(sequence_length=sequence_length, batch_size=batch_size, seed=seed, rows=rows)
    if corpus == "recall":
        check_split(corpus, split)
        expect(made_of.tasks == ("prose",), "data.tasks", "('prose',) for the corpus 'recall'", made_of.tasks)
        config = recall if recall is not None else RecallConfig()
        distance = max(config.min_distance, window)
        return RecallDataset(dataclasses.replace(config, min_distance=distance), **shape)
    if is_stored(corpus):
        check_split(corpus, split)
        made = open_stored(corpus, tokenizer, vocab_size)
    else:
        loaded = load_corpus(corpus, split)
        own = isinstance(tokenizer, Tokenizer)
        made = tokenize(loaded, tokenizer if own else make_tokenizer(tokenizer, loaded, vocab_size, tokenizer_dir))
    if made_of.tasks == ("prose",):
        return TextDataset(made, order, **shape)
    return TaskDataset(made, made_of, **shape)


class Dataset(abc.ABC):
    """Training batches by step, and held-out splits as fixed sequences of batches, all of one shape."""

    kinds: tuple[str, ...] = ("all",)  # Names of those that `Batch.kind` tells apart.

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rows: slice | np.ndarray = slice(None),
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size  # Of all processes.
        self.rows = np.arange(batch_size, dtype=np.int32)[rows]  # Numbers of those made here.
        self._seed = seed

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def num_kinds(self) -> int:
        return len(self.kinds)

    @abc.abstractmethod
    def manifest(self) -> dict[str, Any]:
        """What the data consists of, as JSON; independent of batch size, length and seed."""

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What a log says of the data: "corpus", its "tasks" if there are any, where its "split" comes from, and files
        and bytes of each split where there are files."""

    def __str__(self) -> str:
        """`about` on one line."""
        about = self.about()
        sizes = [
            f"{split} {about[split]['files']:,} file{'s' * (about[split]['files'] != 1)}, "
            f"{about[split]['bytes']:,} bytes" for split in SPLITS if split in about
        ]
        tasks = f", {about['tasks']}" if "tasks" in about else ""
        line = f"data {about['corpus']}{tasks}, split {about['split']}"
        return f"{line}: {'; '.join(sizes)}" if sizes else line

    def check_training(self) -> None:
        """Raises ValueError for what would else be found at the first step alone."""

    @abc.abstractmethod
    def train_batch(self, step: int) -> Batch:
        """Batch number `step` (from 0), [local_batch, T]; a function of the seed and `step`."""

    @abc.abstractmethod
    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        """How many batches `eval_batches` gives."""

    @abc.abstractmethod
    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        """The fixed batches of a split, independent of the seed; at most so many, spread evenly over the split."""

    def _generator(self, seed: int, *key: int) -> np.random.Generator:
        """Of the stream, the number in it, and maybe the row."""
        sequence = np.random.SeedSequence(seed, spawn_key=key)
        return np.random.Generator(np.random.Philox(sequence))

    def _batch(
        self,
        windows: Shaped[np.ndarray, "local_batch time_and_next"],
        targets: Int[np.ndarray, "local_batch"],
        kind: Int[np.ndarray, "local_batch time"],
    ) -> Batch:
        """A batch of windows whose first `targets` inputs have a target; the rest is padding."""
        index = np.arange(self.sequence_length, dtype=np.int32)[None, :]
        real = index < targets[:, None]
        following = np.where(real, windows[:, 1:], 0).astype(np.int32)
        return Batch(
            tokens=np.where(real, windows[:, :-1], 0).astype(np.int32), targets=following,
            segment_ids=real.astype(np.int32), positions=np.where(real, index, 0).astype(np.int32), loss_mask=real,
            kind=kind, num_bytes=np.where(real, self.tokenizer.token_bytes[following], 0).astype(np.int32),
            row=self.rows,
        )


class TextDataset(Dataset):
    """Windows of a corpus of documents. Training windows are T tokens apart, and the last of a document ends with it; a
    shorter document is one window, padded. Held-out documents are cut into windows that do not overlap, so that every
    token but a document's first is a target once."""

    def __init__(self, data: Tokenized, order: int = 2, **shape: Any) -> None:
        super().__init__(data.tokenizer, **shape)
        self._data, self._order = data, order
        if isinstance(train := data.splits["train"], Split):
            tokens = len(train.tokens)
            most = f"at most {tokens - 1}, as the training split of {data.name!r} has {tokens} tokens"
            expect(tokens > self.sequence_length, "sequence_length", most, self.sequence_length)
        else:
            expect(order == 2, "data.order", f"2 for {data.name!r}, of rows", order)
        self._known: dict[str, Source] = {}
        for split in SPLITS[1:]:  # What is wrong with them is said before any work.
            self._held_out(split)

    def _held_out(self, split: str) -> Source:
        """Windows of evaluation; of a large training split they are seldom asked for."""
        if split not in self._known:
            self._known[split] = self._data.splits[split].windows(self.sequence_length, cover=True)
        return self._known[split]

    def manifest(self) -> dict[str, Any]:
        named = {"kind": self.tokenizer.kind, "vocab_size": self.vocab_size}
        return {**self._data.manifest, "tokenizer": named}

    def about(self) -> dict[str, Any]:
        return {"corpus": self._data.name, "split": self._data.split_by, **self._data.sizes()}

    @functools.cached_property
    def _windows(self) -> Any:
        """Training windows: of order 2 an endless shuffled sequence, of order 1 those at every place."""
        train = self._data.splits["train"]
        if self._order == 1:
            return Windows(train, self.sequence_length, 1)
        return shuffled(train.windows(self.sequence_length), self._seed)

    def check_training(self) -> None:
        self._windows

    def train_batch(self, step: int) -> Batch:
        numbers = step * self.batch_size + self.rows.astype(np.int64)
        if self._order == 1:
            uniforms = self._generator(self._seed, _TRAIN, step).random(self.batch_size)[self.rows]
            numbers = (uniforms * len(self._windows)).astype(np.int64)
        return self._padded([self._windows[i] for i in numbers.tolist()])

    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        _check_eval(split, max_batches)
        batches = -(-len(self._held_out(split)) // self.batch_size)
        return batches if max_batches is None else min(batches, max_batches)

    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        """The last one is filled up with rows of padding."""
        batches = self.num_eval_batches(split, max_batches=max_batches)
        return self._eval_batches(self._held_out(split), batches)

    def _eval_batches(self, windows: Source, batches: int) -> Iterator[Batch]:
        total = len(windows)
        count = min(batches * self.batch_size, total)
        for batch in range(batches):
            numbers = (batch * self.batch_size + self.rows.astype(np.int64)).tolist()
            yield self._padded([windows[i * total // count] if i < count else np.zeros(1, np.int32) for i in numbers])

    def _padded(self, windows: Sequence[Integer[np.ndarray, "_"]]) -> Batch:
        tokens = np.zeros((len(windows), self.sequence_length + 1), np.int32)
        for row, window in zip(tokens, windows):
            row[: len(window)] = window
        targets = np.array([len(window) - 1 for window in windows])
        return self._batch(tokens, targets, np.zeros((len(windows), self.sequence_length), np.int32))


class TaskDataset(TextDataset):
    """Windows that are made of a corpus by `data/tasks.py`. Row r of training step s has a generator of its own, which
    draws the task, the stretch of a document and all else. So has every held-out window, with the tasks in turn: a
    split is a fixed sequence without an end, whatever the seed and the batch size."""

    kinds = tasks_lib.KINDS

    def __init__(self, data: Tokenized, config: TaskConfig, **shape: Any) -> None:
        super().__init__(data, **shape)
        self.config = config
        asks = "lookup" in config.tasks
        self._writer = tasks_lib.Writer(self.tokenizer, tasks_lib.WORDINGS[config.wording]) if asks else None
        tasks_lib.check_length(config, self.sequence_length, self._writer)
        self._stretches = {}  # Of one document, that a task is made of.
        for split, task in itertools.product(SPLITS, config.tasks):
            documents = data.splits[split]
            expect(isinstance(documents, Split), "data.tasks", f"('prose',) for {data.name!r}, of rows", config.tasks)
            tokens = tasks_lib.stretch(task, self.sequence_length)
            stretches = Windows(documents, tokens - 1, 1, full=task != "prose")
            expected = f"less for {task!r}, made of {tokens} tokens of one document, which none of {split!r} has"
            expect(len(stretches), "sequence_length", expected, self.sequence_length)
            self._stretches[split, task] = stretches

    def manifest(self) -> dict[str, Any]:
        return {**super().manifest(), "tasks": self.config.manifest()}

    def about(self) -> dict[str, Any]:
        return {**super().about(), "tasks": str(self.config)}

    def check_training(self) -> None:
        """Nothing: what it needs is here."""

    def train_batch(self, step: int) -> Batch:
        rngs = [self._generator(self._seed, _TRAIN, step, int(row)) for row in self.rows]
        return self._made("train", [(self.config.draw(rng), rng) for rng in rngs])

    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        """A split has no end: None stands for 16."""
        _check_eval(split, max_batches)
        return _EVAL_BATCHES if max_batches is None else max_batches

    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        batches = self.num_eval_batches(split, max_batches=max_batches)
        return (self._in_turn(split, batch * self.batch_size + self.rows.astype(np.int64)) for batch in range(batches))

    def _in_turn(self, split: str, numbers: Int[np.ndarray, "local_batch"]) -> Batch:
        stream, tasks = SPLITS.index(split), self.config.tasks
        return self._made(split, [(tasks[i % len(tasks)], self._generator(0, stream, i)) for i in numbers.tolist()])

    def _made(self, split: str, rows: Iterable[tuple[str, np.random.Generator]]) -> Batch:
        windows, kinds, targets = zip(*(self._window(split, task, rng) for task, rng in rows))
        return self._batch(np.stack(windows), np.array(targets), np.stack(kinds))

    def _window(self, split: str, task: str, rng: np.random.Generator) -> tuple[Any, Any, int]:
        stretches = self._stretches[split, task]
        source = stretches[int(rng.integers(len(stretches)))].astype(np.int32)
        return tasks_lib.window(task, rng, source, self.config, self.sequence_length, self._writer)


class RecallDataset(Dataset):
    """Generated sequences; every held-out split is a stream of its own, apart from any seed's."""

    def __init__(self, config: RecallConfig, **shape: Any) -> None:
        super().__init__(SymbolTokenizer(recall_lib.symbols(config)), **shape)
        recall_lib.check_length(config, self.sequence_length)
        self.config = config
        self.kinds = recall_lib.KINDS[: config.num_kinds]

    def manifest(self) -> dict[str, Any]:
        parameters = dataclasses.asdict(self.config)
        if not self.config.num_marks:  # As before there were marks.
            for field in ("num_marks", "mark_rate", "mark_bias", "aggregate_rate"):
                del parameters[field]
        named = {"kind": self.tokenizer.kind, "vocab_size": self.vocab_size}
        return {"corpus": "recall", "recall": parameters, "tokenizer": named}

    def about(self) -> dict[str, Any]:
        return {"corpus": "recall", "split": "by random numbers of its own, for it is generated"}

    def train_batch(self, step: int) -> Batch:
        return self._sequences(self._generator(self._seed, _TRAIN, step))

    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        """A split has no end: None stands for 16."""
        _check_eval(split, max_batches)
        return _EVAL_BATCHES if max_batches is None else max_batches

    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        batches = self.num_eval_batches(split, max_batches=max_batches)
        stream = SPLITS.index(split)
        return (self._sequences(self._generator(0, stream, number)) for number in range(batches))

    def _sequences(self, rng: np.random.Generator) -> Batch:
        draws = recall_lib.num_draws(self.config, self.sequence_length)
        uniforms = rng.random((self.batch_size, draws))[self.rows]
        tokens, kind = recall_lib.sequences(uniforms, self.config, self.sequence_length)
        return self._batch(tokens, np.full(len(tokens), self.sequence_length), kind)


def _check_eval(split: str, max_batches: int | None) -> None:
    expect(split in SPLITS, "split", f"one of {', '.join(SPLITS)}", split)
    expect(max_batches is None or max_batches >= 1, "max_batches", "at least 1", max_batches)
