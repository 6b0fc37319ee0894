"""A corpus as tokens, in memory or in files, and the windows that lie within one of its documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer

from meta_attention_jax.data.corpora import SPLITS, Corpus
from meta_attention_jax.data.tokenizer import Tokenizer
from meta_attention_jax.fields import expect

Ids = Integer[np.ndarray, "_"]

_SHUFFLED = (1, 2, 4, 5, 9, 7, 8, 6, 0, 3)  # What order 2 makes of ten windows.


@runtime_checkable
class Source(Protocol):
    """What `grain.MapDataset.source` takes: windows of up to T + 1 tokens by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Ids: ...


@runtime_checkable
class Part(Protocol):
    """A split, of which windows can be had."""

    def windows(self, length: int, *, cover: bool = False) -> Source:
        """Windows of T = `length`. `cover`: those of evaluation, in which every token but a document's first is a
        target once; else none is padded but those of documents that are shorter."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The tokens of a split's documents one after the other."""

    tokens: Any  # All tokens, in an unsigned type: an array, or `token_files.Tokens`.
    offsets: Int[np.ndarray, "documents+1"]  # Document i is tokens[offsets[i]:offsets[i + 1]].

    def windows(self, length: int, *, cover: bool = False) -> Windows:
        return Windows(self, length, length, cover=cover)


class Windows:
    """Windows of T + 1 tokens of one document each, `stride` tokens apart; of a shorter document one, its tokens, or
    none where they have to be `full`. Unless `cover` is asked for, the last one ends with its document, however many
    tokens it shares with the one before."""

    def __init__(self, split: Split, length: int, stride: int, *, cover: bool = False, full: bool = False) -> None:
        self._split, self._length, self._stride, self._cover = split, length, stride, cover
        more = np.diff(split.offsets) - (length + 1)
        counts = np.maximum(1 + more // stride, 0) if full else np.maximum(1 - (-more) // stride, 1)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Ids:
        document = int(np.searchsorted(self._starts, number, side="right")) - 1
        begin, end = (int(at) for at in self._split.offsets[document : document + 2])
        at = begin + int(number - self._starts[document]) * self._stride
        if not self._cover:
            at = max(min(at, end - self._length - 1), begin)
        return self._split.tokens[at : min(at + self._length + 1, end)]


def shuffled(windows: Source, seed: int) -> Source:
    """Windows in an order that is another in every epoch, without end: nothing is permuted but the index that is asked
    for. It is grain's own, and checked, for a release with another would change what a run reads on resumption."""
    import grain  # Here, for it takes half a second that `recall` does not need.

    def order(source: Any, seed: int) -> Any:
        return grain.MapDataset.source(source).seed(seed).shuffle().repeat()

    known = order(range(len(_SHUFFLED)), 0)
    found = tuple(known[i] for i in range(len(_SHUFFLED)))
    expect(found == _SHUFFLED, "data.order", f"the shuffle of grain 0.2.18, which gives {_SHUFFLED}", found)
    return order(windows, seed)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A corpus as tokens, by split."""

    name: str  # What it was asked for by.
    tokenizer: Tokenizer
    splits: Mapping[str, Part]
    manifest: Mapping[str, Any]  # As `Corpus.manifest`, the documents those of the corpus, or files of many.
    split_by: str  # Where the split comes from, in words.

    def sizes(self) -> dict[str, dict[str, int]]:
        """Files and bytes by split."""
        files = {s: [one["bytes"] for one in self.manifest["documents"] if one["split"] == s] for s in SPLITS}
        return {split: {"files": len(sizes), "bytes": sum(sizes)} for split, sizes in files.items()}


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Tokenized:
    """A corpus that is in memory, in the smallest type that holds the tokens."""
    splits = {split: tokenize_split(corpus, split, tokenizer) for split in SPLITS}
    return Tokenized(corpus.name, tokenizer, splits, corpus.manifest(), corpus.split_by)


def tokenize_split(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Split:
    """One of its splits."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    documents = [tokenizer.encode(d.data).astype(dtype) for d in corpus.splits[split]]
    documents = [d for d in documents if len(d) > 1]  # A single token has no target.
    if not documents:
        raise ValueError(
            f"data: expected a document of at least 2 tokens in split {split!r} of {corpus.name!r}, got none."
        )
    return Split(np.concatenate(documents), np.cumsum([0, *map(len, documents)], dtype=np.int64))
