"""The documents of a split as tokens, and where windows may start in them."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from meta_attention_jax.data.corpora import Corpus
from meta_attention_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Split:
    """The tokens of a split's documents one after the other, and where windows may start."""

    tokens: Int[np.ndarray, "tokens"]  # All tokens, in the smallest unsigned type that holds them.
    offsets: Int[np.ndarray, "documents+1"]  # Document i is tokens[offsets[i]:offsets[i + 1]].
    places: Int[np.ndarray, "documents+1"]  # Cumulative count of training windows by document, from 0.
    windows: Int[np.ndarray, "documents+1"]  # Cumulative count of held-out windows by document, from 0.

    def stretches(self, tokens: int) -> Int[np.ndarray, "counts"]:
        """Cumulative count of stretches of so many tokens by document, from 0."""
        return _cumulative(np.maximum(np.diff(self.offsets) - tokens + 1, 0))


def tokenize(corpus: Corpus, split: str, tokenizer: Tokenizer, length: int) -> Split:
    """A split for windows of T = `length`."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    documents = [tokenizer.encode(d.data).astype(dtype) for d in corpus.splits[split]]
    documents = [d for d in documents if len(d) > 1]  # A single token has no target.
    if not documents:
        raise ValueError(
            f"data: expected a document of at least 2 tokens in split {split!r} of {corpus.name!r}, got none."
        )
    sizes = np.array([len(d) for d in documents])
    return Split(
        tokens=np.concatenate(documents), offsets=_cumulative(sizes), places=_cumulative(np.maximum(sizes - length, 1)),
        windows=_cumulative(-(-(sizes - 1) // length)),
    )


def _cumulative(sizes: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n+1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
