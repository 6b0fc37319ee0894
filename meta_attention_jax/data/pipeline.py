"""Batches of token windows, without any iterator state.

Row r of training batch s is a function of (seed, s, r) alone: resuming needs the step, and a process that is given some
of the rows makes exactly those. Everything is NumPy on the host.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from meta_attention_jax.data import recall as recall_lib
from meta_attention_jax.data.corpora import SPLITS, Corpus, check_split, load_corpus
from meta_attention_jax.data.recall import RecallConfig
from meta_attention_jax.data.tokenizer import SymbolTokenizer, Tokenizer, make_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.types import Batch

_TRAIN = len(SPLITS)  # Stream of the training steps; `recall`'s held-out splits use their own index.
_RECALL_EVAL_BATCHES = 16


def make_dataset(
    *,
    corpus: str,
    sequence_length: int,
    batch_size: int,
    seed: int,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    recall: RecallConfig | None = None,
    window: int = 2,
    rows: slice | np.ndarray = slice(None),
    split: str = "auto",
) -> Dataset:
    """The data set of one experiment: "recall", or a corpus that `load_corpus` knows.

    Args:
      batch_size: rows of the whole batch, over all processes.
      seed: of the training batches.
      tokenizer, vocab_size, tokenizer_dir: as `make_tokenizer`, for text; `recall` has a vocabulary of its own.
      window: raises recall's `min_distance` to at least the window of local attention.
      rows: the rows of every batch that this process makes.
      split: of files of one's own; see `data/splits.py`.
    """
    for field, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        expect(value >= 1, field, "at least 1", value)
    expect(seed >= 0, "seed", "at least 0", seed)
    if not np.arange(batch_size)[rows].size:
        raise ValueError(f"rows: expected some of the batch's {batch_size} rows, got {rows}.")
    shape = dict(sequence_length=sequence_length, batch_size=batch_size, seed=seed, rows=rows)
    if corpus == "recall":
        check_split(corpus, split)
        config = recall if recall is not None else RecallConfig()
        distance = max(config.min_distance, window)
        return RecallDataset(dataclasses.replace(config, min_distance=distance), **shape)
    loaded = load_corpus(corpus, split)
    made = make_tokenizer(tokenizer, loaded, vocab_size, tokenizer_dir)
    return TextDataset(loaded, made, **shape)


class Dataset(abc.ABC):
    """Training batches by step, and held-out splits as fixed sequences of batches, all of one shape."""

    num_kinds = 1  # That `Batch.kind` tells apart.

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

    @abc.abstractmethod
    def manifest(self) -> dict[str, Any]:
        """What the data consists of, as JSON; independent of batch size, length and seed."""

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What a log says of the data: "corpus", where its "split" comes from, and files and bytes of each split where
        there are files."""

    def __str__(self) -> str:
        """`about` on one line."""
        about = self.about()
        sizes = [
            f"{split} {about[split]['files']:,} file{'s' * (about[split]['files'] != 1)}, "
            f"{about[split]['bytes']:,} bytes" for split in SPLITS if split in about
        ]
        line = f"data {about['corpus']}, split {about['split']}"
        return f"{line}: {'; '.join(sizes)}" if sizes else line

    @abc.abstractmethod
    def train_batch(self, step: int) -> Batch:
        """Batch number `step` (from 0), [local_batch, T]; a function of the seed and `step`."""

    @abc.abstractmethod
    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        """How many batches `eval_batches` gives."""

    @abc.abstractmethod
    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        """The fixed batches of a split, independent of the seed; at most so many, spread evenly over the split."""

    def _generator(self, seed: int, stream: int, number: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(seed, spawn_key=(stream, number))
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
    """Windows of a corpus of documents. Training windows start uniformly at every place of the training split whose T +
    1 tokens stay within one document; a shorter document is one window, padded. Held-out documents are cut into windows
    that do not overlap, so that every token but a document's first is a target once."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, **shape: Any) -> None:
        super().__init__(tokenizer, **shape)
        self._corpus = corpus
        self._splits = {split: _tokenize(corpus, split, tokenizer, self.sequence_length) for split in SPLITS}
        tokens = len(self._splits["train"].tokens)
        if tokens < self.sequence_length + 1:
            raise ValueError(
                f"sequence_length: expected at most {tokens - 1}, as the training split of "
                f"{corpus.name!r} has {tokens} tokens, got {self.sequence_length}."
            )

    def manifest(self) -> dict[str, Any]:
        named = {"kind": self.tokenizer.kind, "vocab_size": self.vocab_size}
        return {**self._corpus.manifest(), "tokenizer": named}

    def about(self) -> dict[str, Any]:
        sizes = {
            split: {"files": total["documents"], "bytes": total["bytes"]}
            for split, total in self._corpus.totals().items()
        }
        return {"corpus": self._corpus.name, "split": self._corpus.split_by, **sizes}

    def train_batch(self, step: int) -> Batch:
        split = self._splits["train"]
        uniforms = self._generator(self._seed, _TRAIN, step).random(self.batch_size)[self.rows]
        place = (uniforms * split.places[-1]).astype(np.int64)
        document = np.searchsorted(split.places, place, side="right") - 1
        return self._windows(split, document, place - split.places[document])

    def num_eval_batches(self, split: str, *, max_batches: int | None = None) -> int:
        _check_eval(split, max_batches)
        batches = -(-int(self._splits[split].windows[-1]) // self.batch_size)
        return batches if max_batches is None else min(batches, max_batches)

    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        """The last one is filled up with rows of padding."""
        batches = self.num_eval_batches(split, max_batches=max_batches)
        return self._eval_batches(self._splits[split], batches)

    def _eval_batches(self, split: _Split, batches: int) -> Iterator[Batch]:
        total = int(split.windows[-1])
        count = min(batches * self.batch_size, total)
        for batch in range(batches):
            number = batch * self.batch_size + self.rows.astype(np.int64)
            window = np.minimum(number, count - 1) * total // count
            document = np.searchsorted(split.windows, window, side="right") - 1
            start = (window - split.windows[document]) * self.sequence_length
            yield self._windows(split, document, start, number < count)

    def _windows(
        self,
        split: _Split,
        document: Int[np.ndarray, "local_batch"],
        start: Int[np.ndarray, "local_batch"],
        present: np.ndarray | bool = True,
    ) -> Batch:
        begin, end = split.offsets[document] + start, split.offsets[document + 1]
        index = begin[:, None] + np.arange(self.sequence_length + 1)[None, :]
        tokens = split.tokens[np.minimum(index, end[:, None] - 1)]
        targets = np.where(present, np.minimum(end - 1 - begin, self.sequence_length), 0)
        kind = np.zeros((len(self.rows), self.sequence_length), np.int32)
        return self._batch(tokens, targets, kind)


class RecallDataset(Dataset):
    """Generated sequences; every held-out split is a stream of its own, apart from any seed's."""

    def __init__(self, config: RecallConfig, **shape: Any) -> None:
        super().__init__(SymbolTokenizer(recall_lib.symbols(config)), **shape)
        recall_lib.check_length(config, self.sequence_length)
        self.config = config
        self.num_kinds = config.num_kinds

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
        return _RECALL_EVAL_BATCHES if max_batches is None else max_batches

    def eval_batches(self, split: str, *, max_batches: int | None = None) -> Iterator[Batch]:
        batches = self.num_eval_batches(split, max_batches=max_batches)
        stream = SPLITS.index(split)
        return (self._sequences(self._generator(0, stream, number)) for number in range(batches))

    def _sequences(self, rng: np.random.Generator) -> Batch:
        draws = recall_lib.num_draws(self.config, self.sequence_length)
        uniforms = rng.random((self.batch_size, draws))[self.rows]
        tokens, kind = recall_lib.sequences(uniforms, self.config, self.sequence_length)
        return self._batch(tokens, np.full(len(tokens), self.sequence_length), kind)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The tokens of a split's documents one after the other, and where windows may start."""

    tokens: Int[np.ndarray, "tokens"]  # All tokens, in the smallest unsigned type that holds them.
    offsets: Int[np.ndarray, "documents+1"]  # Document i is tokens[offsets[i]:offsets[i + 1]].
    places: Int[np.ndarray, "documents+1"]  # Cumulative count of training windows by document, from 0.
    windows: Int[np.ndarray, "documents+1"]  # Cumulative count of held-out windows by document, from 0.


def _tokenize(corpus: Corpus, split: str, tokenizer: Tokenizer, length: int) -> _Split:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    documents = [tokenizer.encode(d.data).astype(dtype) for d in corpus.splits[split]]
    documents = [d for d in documents if len(d) > 1]  # A single token has no target.
    if not documents:
        raise ValueError(
            f"data: expected a document of at least 2 tokens in split {split!r} of {corpus.name!r}, got none."
        )
    sizes = np.array([len(d) for d in documents])
    return _Split(
        tokens=np.concatenate(documents), offsets=_cumulative(sizes), places=_cumulative(np.maximum(sizes - length, 1)),
        windows=_cumulative(-(-(sizes - 1) // length)),
    )


def _cumulative(sizes: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n+1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _check_eval(split: str, max_batches: int | None) -> None:
    expect(split in SPLITS, "split", f"one of {', '.join(SPLITS)}", split)
    expect(max_batches is None or max_batches >= 1, "max_batches", "at least 1", max_batches)
