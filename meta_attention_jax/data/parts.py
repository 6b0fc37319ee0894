"""A corpus in parts of some megabytes, whose texts are read when they are wanted: what token files are made of."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional

from meta_attention_jax.data.corpora import check_split, joined, load_corpus, open_hub
from meta_attention_jax.data.splits import SPLITS, TEST_FROM, VALIDATION_FROM, assign, split_of
from meta_attention_jax.data.texts import NotText, read_text, walk
from meta_attention_jax.files import local

_ROWS = 20_000  # Of a part of a data set of the hub's, whose rows say no size.


@dataclasses.dataclass(frozen=True)
class Part:
    """Some texts of one split; can be sent to another process."""

    name: str
    split: str
    size: int  # Bytes of text, or rows: its share of the work.
    read: Callable[[], Iterable[Optional[bytes]]]  # Its texts; None for one that turns out to be none.


@dataclasses.dataclass(frozen=True)
class Parts:
    """All parts of a corpus, the same for the same corpus."""

    source: str  # As `Corpus.source`.
    split_by: str
    known: str  # What the texts are, by name and size, as JSON.
    parts: tuple[Part, ...]

    def texts(self, split: str) -> Iterator[bytes]:
        """All of a split, one at a time."""
        return (text for part in self.parts if part.split == split for text in part.read() if text is not None)


def in_parts(spec: str, rule: str, size: int, *, rows: bool = False) -> Parts:
    """A corpus of `load_corpus` in parts of about `size` bytes. Files of a folder are read one at a time where paths
    say every split, and rows of the hub some thousands at a time, each a document if `rows`; else all are read now."""
    check_split(spec, rule)
    scheme, _, rest = spec.partition(":")
    if scheme == "hf":
        return _hub(spec, rest, rows)
    if scheme == "path" and rest and (found := _folder(rest, rule)):
        by, splits = found
        root = local("data.corpus", rest)
        texts = [(split, (root / name).stat().st_size, str(root / name)) for name, split in splits.items()]
        known = json.dumps([[name, *text[:2], (root / name).stat().st_mtime_ns] for name, text in zip(splits, texts)])
        return Parts("files", by, known, _cut(texts, size, _files))
    corpus = load_corpus(spec, rule)
    texts = [(split, len(d.data), d.data) for split in SPLITS for d in corpus.splits[split]]
    return Parts(corpus.source, corpus.split_by, json.dumps(corpus.manifest()["documents"]), _cut(texts, size, list))


def _cut(texts: Sequence[tuple[str, int, Any]], size: int, read: Callable[[Any], Any]) -> tuple[Part, ...]:
    """Texts, each (split, bytes, what `read` is given in a list), in order: parts that are full with the text that
    makes them `size` bytes."""
    parts: list[Part] = []
    for split in SPLITS:
        mine = [text for text in texts if text[0] == split]
        held, total, number = [], 0, 0
        for i, (_, count, what) in enumerate(mine):
            held, total = [*held, what], total + count
            if total >= size or i == len(mine) - 1:
                parts.append(Part(f"{split}-{number:05d}", split, total, functools.partial(read, held)))
                held, total, number = [], 0, number + 1
    return tuple(parts)


def _folder(rest: str, rule: str) -> Optional[tuple[str, dict[str, str]]]:
    """(what says the split, the split of every file) of a folder; None of a file, and where it takes more than paths,
    which `texts.read_folder` looks at."""
    root = local("data.corpus", rest)
    names, notes = walk(root) if root.is_dir() else ([], [])
    found = assign(names, rule) if names else None
    if found is None or None in found.splits.values():
        return None
    splits, by = {name: str(split) for name, split in found.splits.items()}, found.by
    if missing := [split for split in SPLITS[1:] if split not in splits.values()]:
        splits |= {n: split_of(n) for n, s in splits.items() if s == "train" and split_of(n) in missing}
        by += f"; {' and '.join(missing)} by a hash of the train file's path"
    if set(splits.values()) != set(SPLITS):
        return None
    for note in (*notes, *found.notes):
        warnings.warn(f"corpus: {note}.", stacklevel=3)
    return by, splits


def _files(paths: Iterable[str]) -> Iterator[Optional[bytes]]:
    for path in paths:
        try:
            yield read_text(local("data.corpus", path))
        except NotText:
            yield None


def _hub(spec: str, rest: str, as_documents: bool) -> Parts:
    sets, source = open_hub(spec, rest)
    missing = [split for split in SPLITS[1:] if not sets[split]]
    parts: list[Part] = []
    for split in SPLITS:
        for name, rows in sets[split].items():
            splits = [split, *(missing if split == "train" else [])]
            share = TEST_FROM - VALIDATION_FROM
            ends = [round(len(rows) * (1.0 - share * i)) for i in reversed(range(len(splits)))]
            for of, start, end in zip(splits, [0, *ends], ends):
                for a in range(start, end, _ROWS):
                    b = min(a + _ROWS, end)
                    read = functools.partial(_rows, spec, rest, (split, name), a, b, as_documents)
                    parts.append(Part(f"{of}-{len(parts):05d}", of, b - a, read))
    by = "by the data set's own splits" + (f"; {' and '.join(missing)} off the end of train" if missing else "")
    known = [spec, as_documents, *([split, name, len(rows)] for split in SPLITS for name, rows in sets[split].items())]
    return Parts(source, by, json.dumps(known), tuple(parts))


def _rows(spec: str, rest: str, which: tuple[str, str], a: int, b: int, as_documents: bool) -> Iterator[bytes]:
    split, name = which
    rows = open_hub(spec, rest)[0][split][name][a:b]["text"]
    return (row.encode("utf-8") for row in rows) if as_documents else iter([joined(rows)])
