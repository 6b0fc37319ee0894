"""Tokenizers: bytes to token ids and back, with the bytes of every token for bits per byte.

There are no special tokens: padding is marked by segment ids, never by a token.
"""

from __future__ import annotations

import abc
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int

from meta_attention_jax.data.corpora import Corpus
from meta_attention_jax.fields import expect
from meta_attention_jax.files import at, write_whole

FILE = "tokenizer.json"
TOKENIZERS = ("bytes", "bpe", "model")

Ids = Int[np.ndarray, "tokens"]

_CHUNK = 1 << 20  # Characters that are encoded at a time: bounds memory on files of gigabytes.
_WORD = re.compile(r"\S{1000}(?=\S)")  # Training takes time of the square of a word's length.


class Tokenizer(abc.ABC):
    """What the pipeline needs to know of a tokenizer; `load_tokenizer` opens what any of them saved."""

    kind: str  # Its name in manifests.
    vocab_size: int  # Number of token ids.
    token_bytes: Int[np.ndarray, "vocab"]  # UTF-8 bytes of every token, [vocab]; 0 where bytes mean nothing.
    ends: tuple[int, ...] = ()  # Ids that end a text.

    @abc.abstractmethod
    def encode(self, data: bytes) -> Ids:
        """Token ids (int32) of a text; `decode` undoes it."""

    def decode(self, ids: Sequence[int | np.integer] | Ids) -> bytes:
        """The text of token ids; for a part of a text it may start or end within a character."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids: expected within [0, {self.vocab_size}), got {ids.min()} to {ids.max()}.")
        return self._decode(ids)

    def same(self, other: Tokenizer) -> bool:
        """Whether the other one gives the same tokens."""
        return self.kind == other.kind and self._content() == other._content()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` into `directory`, atomically."""
        write_whole(at(directory) / FILE, self._content())

    @abc.abstractmethod
    def _decode(self, ids: Ids) -> bytes: ...

    @abc.abstractmethod
    def _content(self) -> str: ...


class ByteTokenizer(Tokenizer):
    """One token per byte, 256 in all."""

    kind = "bytes"
    vocab_size = 256

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, np.int32)

    def encode(self, data: bytes) -> Ids:
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def _decode(self, ids: Ids) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def _content(self) -> str:
        return json.dumps({"kind": self.kind})


class SymbolTokenizer(Tokenizer):
    """A fixed list of names separated by blanks, for generated corpora; `token_bytes` is 0."""

    kind = "symbols"

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        self.vocab_size = len(self.symbols)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        self._ids = {symbol.encode(): i for i, symbol in enumerate(self.symbols)}

    def encode(self, data: bytes) -> Ids:
        words = data.split()
        for word in words:
            expect(word in self._ids, "text", f"names such as {self.symbols[0]}", word)
        return np.array([self._ids[word] for word in words], np.int32)

    def _decode(self, ids: Ids) -> bytes:
        return "".join(f"{self.symbols[i]} " for i in ids).encode()

    def _content(self) -> str:
        return json.dumps({"kind": self.kind, "symbols": self.symbols})


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al., 2016; the byte form of GPT-2, 2019). The file it saves is that of
    the library `tokenizers`, which opens it too."""

    kind = "bpe"

    def __init__(self, serialized: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.vocab_size = self._tokenizer.get_vocab_size()
        alphabet = byte_alphabet()
        self._bytes = [bytes(alphabet[c] for c in self._tokenizer.id_to_token(i)) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(b) for b in self._bytes], np.int32)

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Learns merges from `texts`; the same texts always give the same merges."""
        expect(vocab_size >= 256, "vocab_size", "at least the 256 bytes", vocab_size)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=sorted(byte_alphabet()), show_progress=False
        )
        parts = (part for text in texts for chunk in _chunks(text) for part in short_words(chunk))
        tokenizer.train_from_iterator(parts, trainer)
        expect(tokenizer.get_vocab_size() == vocab_size, "vocab_size",
               f"at most {tokenizer.get_vocab_size()}, all that the training text gives", vocab_size)
        return cls(tokenizer.to_str())

    def encode(self, data: bytes) -> Ids:
        parts = [np.array(self._tokenizer.encode(chunk).ids, np.int32) for chunk in _chunks(data)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _decode(self, ids: Ids) -> bytes:
        return b"".join(self._bytes[i] for i in ids)

    def _content(self) -> str:
        return self._tokenizer.to_str()


def make_tokenizer(
    kind: str, corpus: Corpus, vocab_size: int | None = None, directory: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """A tokenizer for `corpus`: "bytes", or "bpe" of `vocab_size` tokens: opened if one is kept in `directory`, else
    trained on the training split; or "model", a published model's, if one is kept in `directory`. Nothing is written:
    what else is wrong with the data is not known yet."""
    expect(kind in TOKENIZERS, "tokenizer", f"one of {', '.join(TOKENIZERS)}", kind)
    if kind == ByteTokenizer.kind:
        expect(vocab_size in (None, ByteTokenizer.vocab_size), "vocab_size", "256 for the tokenizer bytes", vocab_size)
        return ByteTokenizer()
    known = directory is not None and (at(directory) / FILE).is_file()
    if kind == "model":
        if not known:
            raise ValueError("tokenizer: expected a pretrained backbone, whose tokenizer 'model' is, got none.")
        kept = load_tokenizer(directory)
        expect(kept.kind == "published", "tokenizer", f"that of a published model in {str(directory)!r}", kept.kind)
        return kept
    if vocab_size is None:
        raise ValueError("vocab_size: expected a number for the tokenizer bpe, got None.")
    if known:
        kept = load_tokenizer(directory)
        if kept.kind != kind or kept.vocab_size != vocab_size:
            raise ValueError(
                f"tokenizer: expected {kind} of {vocab_size} tokens in {str(directory)!r}, got "
                f"{kept.kind} of {kept.vocab_size}."
            )
        return kept
    return BPETokenizer.train([document.data for document in corpus.splits["train"]], vocab_size)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Opens the tokenizer saved in `directory`."""
    path = at(directory) / FILE
    if not path.is_file():
        raise ValueError(f"tokenizer: expected {FILE} in {str(directory)!r}, got no such file.")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if content.get("kind") == ByteTokenizer.kind:
            return ByteTokenizer()
        if content.get("kind") == SymbolTokenizer.kind:
            return SymbolTokenizer(content["symbols"])
        if content.get("kind") == "published":
            from meta_attention_jax.data.published import PublishedTokenizer  # It is made of this module.

            return PublishedTokenizer.of_content(content)
        return BPETokenizer(text)
    except Exception as error:  # The library raises bare Exceptions.
        raise ValueError(f"tokenizer: expected a tokenizer of this package in {str(path)!r}, got {error}.") from error


def byte_alphabet() -> dict[str, int]:
    """The printable character of each byte in byte-level BPE: a visible Latin-1 character stands for itself; the other
    bytes, in order, take the characters from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = sorted(set(range(256)) - visible)
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def text_of(data: bytes) -> str:
    """UTF-8, decoded."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8, got something else at byte {error.start}.") from None


def _chunks(data: bytes) -> Iterator[str]:
    """A text in pieces of about a million characters, cut behind line ends where there are any."""
    text = text_of(data)
    start = 0
    while start < len(text):
        stop = min(start + _CHUNK, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def short_words(text: str) -> Iterator[str]:
    """A text in pieces without longer words than `_WORD`."""
    start = 0
    for found in _WORD.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
