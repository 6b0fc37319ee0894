"""Corpora that are tokens already and stay on disk, by name:

* ``tokens:FOLDER``: token files, documents of any length; `data/token_files.py` has the format;
* ``arrayrecord:FOLDER``: files ``*.array_record`` or ``*.arrayrecord``, by grain; a record is a row's ids as
  little-endian uint16, or uint32 where the vocabulary is larger than that;
* ``parquet:FOLDER``: files ``*.parquet``, by pyarrow; rows are lists of integers in a column ``tokens`` or
  ``input_ids``.

A row is one window, T + 1 tokens or fewer. Of rows, the name of a file or of its folder says the split, by the words of
`data/splits.py`, and a ``tokenizer.json`` as runs and token files have it lies in the folder. All are read at random:
Parquet by whole row groups, so that small ones are quick (grain's own source of Parquet has an order and a state of its
own, and so no batch number s).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from meta_attention_jax.data.corpora import PLACED
from meta_attention_jax.data.splits import SPLITS, split_word
from meta_attention_jax.data.token_files import dtype_of, open_files
from meta_attention_jax.data.tokenized import Tokenized
from meta_attention_jax.data.tokenizer import FILE, Tokenizer, load_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.files import local

_ENDS = {"arrayrecord": ("array_record", "arrayrecord"), "parquet": ("parquet",)}
_COLUMNS = ("tokens", "input_ids")
_GROUPS = 8  # Row groups of a split that are kept.
_LOOKED_AT = 1 << 16  # Bytes of either end of a file, by which it is known again.


def is_stored(spec: str) -> bool:
    """Whether a corpus is called by one of these names."""
    return spec.startswith(PLACED[1:])


def open_stored(spec: str, tokenizer: str | Tokenizer, vocab_size: int | None = None) -> Tokenized:
    """Opens one; `tokenizer` and `vocab_size`, as `make_dataset` has them, have to be those that it was written
    with."""
    scheme, _, rest = spec.partition(":")
    found = open_files(spec, rest) if scheme == "tokens" else _open_rows(spec, scheme, rest, tokenizer)
    known = found.tokenizer
    if isinstance(tokenizer, Tokenizer):
        expect(known.same(tokenizer), "data.corpus", f"tokens of the model's own tokenizer in {rest!r}", "others")
        return found
    kind = {"published": "model"}.get(known.kind, known.kind)
    expect(tokenizer == kind, "data.tokenizer", f"{kind!r}, with which {rest!r} is written", tokenizer)
    expect(vocab_size in (None, known.vocab_size), "data.vocab_size", f"{known.vocab_size}, as in {rest!r}", vocab_size)
    return found


def _open_rows(spec: str, scheme: str, rest: str, tokenizer: str | Tokenizer) -> Tokenized:
    folder = local("data.corpus", rest)
    need, ends = {"arrayrecord": "array_record", "parquet": "pyarrow"}[scheme], _ENDS[scheme]
    if importlib.util.find_spec(need) is None:
        raise ValueError(
            f"corpus: expected the package {need} for {spec!r}, got none installed; run 'pip install {need}'."
        )
    paths = sorted(p for end in ends for p in folder.rglob(f"*.{end}"))
    expect(paths, "corpus", f"files *.{ends[0]} in the folder {rest!r}", "none")
    said = [split_word(p.stem) or split_word(p.parent.name) for p in paths]
    for split in SPLITS:
        expect(split in said, "corpus", f"a file of {rest!r} whose name, or whose folder's, says {split}", "none")
    given = isinstance(tokenizer, Tokenizer) and not (folder / FILE).is_file()
    known = tokenizer if given else load_tokenizer(folder)
    source = _parquet if scheme == "parquet" else functools.partial(_records, dtype=dtype_of(known.vocab_size))
    splits = {}
    for split in SPLITS:
        try:
            count, read = source([p for p, word in zip(paths, said) if word == split])
        except (RuntimeError, OSError) as error:  # Of files that are none of the format.
            words = (str(error).splitlines() or [""])[0]
            raise ValueError(f"corpus: expected files of {scheme} in {rest!r}, got {words!r}.") from None
        expect(count, "corpus", f"a row in split {split!r} of {rest!r}", "none")
        splits[split] = Rows(count, read, known.vocab_size)
    documents = [
        dict(name=p.relative_to(folder).as_posix(), split=word, bytes=p.stat().st_size, sha256=_ends_of(p))
        for p, word in zip(paths, said) if word
    ]
    manifest = {"corpus": spec, "source": "rows", "documents": documents}
    return Tokenized(spec, known, splits, manifest, "by names")


def _ends_of(path: pathlib.Path) -> str:
    """The sha256 of the first and the last bytes: both kinds of files end with what they hold, and all is too much."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_LOOKED_AT))
        file.seek(max(path.stat().st_size - _LOOKED_AT, 0))
        digest.update(file.read())
    return digest.hexdigest()


class Rows:
    """Rows of tokens, each a window."""

    def __init__(self, count: int, read: Callable[[int], Integer[np.ndarray, "_"]], vocab_size: int) -> None:
        self._count, self._read, self._vocab_size = count, read, vocab_size
        self._most = 0

    def windows(self, length: int, *, cover: bool = False) -> Rows:
        """Every row, whatever is asked for."""
        self._most = length + 1
        if self._count:
            self[0]  # What is wrong with all is said before any work.
        return self

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Integer[np.ndarray, "_"]:
        ids = self._read(number)
        expect(1 < len(ids) <= self._most, "data.sequence_length",
               f"rows of 2 to T + 1 = {self._most} tokens", len(ids))
        expect(0 <= ids.min() and ids.max() < self._vocab_size, "corpus",
               f"ids of the {self._vocab_size} tokens that there are in row {number}",
               int(min(ids.min(), 0) or ids.max()))
        return ids


def _records(paths: Sequence[pathlib.Path], dtype: np.dtype) -> tuple[int, Callable[[int], Any]]:
    import grain  # As in `data/pipeline.py`.

    source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])


    def read(number: int) -> Integer[np.ndarray, "_"]:
        record = source[number]
        expect(not len(record) % dtype.itemsize, "corpus", f"ids of {dtype.itemsize} bytes in row {number}",
               f"{len(record)} bytes")
        return np.frombuffer(record, dtype)

    return len(source), read


def _parquet(paths: Sequence[pathlib.Path]) -> tuple[int, Callable[[int], Any]]:
    import pyarrow.parquet  # Optional, and asked for here only.

    try:
        files = [pyarrow.parquet.ParquetFile(path) for path in paths]
    except pyarrow.ArrowException as error:
        raise RuntimeError(str(error)) from None
    groups = [(file, g) for file in files for g in range(file.metadata.num_row_groups)]
    starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for file, g in groups)])
    columns = {next((c for c in _COLUMNS if c in file.schema_arrow.names), None) for file in files}
    expect(len(columns) == 1 and None not in columns, "corpus", f"one of the columns {', '.join(_COLUMNS)}",
           files[0].schema_arrow.names)
    (column,) = columns
    for file in files:
        kind, types = file.schema_arrow.field(column).type, pyarrow.types
        known = (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type)
        expect(known, "corpus", f"lists of whole numbers in the column {column!r}", str(kind))

    @functools.lru_cache(maxsize=_GROUPS)
    def group(number: int) -> Any:
        file, g = groups[number]
        return file.read_row_group(g, columns=[column]).column(0).combine_chunks()

    def read(number: int) -> Integer[np.ndarray, "_"]:
        g = int(np.searchsorted(starts, number, side="right")) - 1
        ids = group(g)[int(number - starts[g])].values
        whole = ids is not None and not ids.null_count
        expect(whole, "corpus", f"tokens in row {number}", "one that is missing" if ids is not None else "none")
        return ids.to_numpy(zero_copy_only=False)

    return int(starts[-1]), read
