"""Token files: a corpus as tokens in a folder, larger than memory; `experiments.tokenize` writes them.

    manifest.json       what it is made of, and name, split, bytes and sha256 of every part; written last
    tokenizer.json      what the tokens mean
    NAME.tokens         a part: token ids of documents one after the other, uint16 where these hold them, else uint32
    NAME.offsets        its documents, int64: number i is tokens[offsets[i]:offsets[i + 1]]
    NAME.json           its line of the manifest, until there is a manifest

All little-endian. A part is a function of its texts and the tokenizer alone, and is there whole or not at all, so that
whoever stops can go on.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
from jaxtyping import Integer

from meta_attention_jax.data.splits import SPLITS
from meta_attention_jax.data.tokenized import Split, Tokenized
from meta_attention_jax.data.tokenizer import FILE, Tokenizer, load_tokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.files import local, partial, write_whole

MANIFEST, PLAN = "manifest.json", "plan.json"
_READ = 1 << 24  # Bytes that are hashed at a time.


class Tokens:
    """Token ids of files as if they were one, by slices that lie within one file; memory-mapped, and no page stays in
    this process's memory once it has been copied from."""

    def __init__(self, paths: Sequence[pathlib.Path], dtype: np.dtype) -> None:
        self._maps, self._dtype = [], dtype
        for path in paths:
            with open(path, "rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(found, "madvise"):
                found.madvise(mmap.MADV_RANDOM)  # What lies behind a window is not wanted next.
            self._maps.append(found)
        self._starts = np.cumsum([0, *(len(found) // dtype.itemsize for found in self._maps)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, part: slice) -> Integer[np.ndarray, "_"]:
        file = int(np.searchsorted(self._starts, part.start, side="right")) - 1
        found, start = self._maps[file], part.start - int(self._starts[file])
        ids = np.frombuffer(found, self._dtype, part.stop - part.start, start * self._dtype.itemsize).copy()
        if hasattr(found, "madvise"):
            found.madvise(mmap.MADV_DONTNEED)
        return ids


def dtype_of(vocab_size: int) -> np.dtype:
    """Of the ids in files."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def begin(folder: pathlib.Path, plan: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Makes the folder, or checks that it was begun with the same plan, JSON that says all that the files depend on."""
    text = json.dumps(plan, indent=1)
    path = folder / PLAN
    if path.exists():
        same = path.read_text(encoding="utf-8") == text
        expect(same, "out", "a new folder, or one of the same corpus, tokenizer and --part_mb", str(folder))
        return
    # A tokenizer alone is of one that was killed just here.
    held = [p for p in folder.iterdir() if p.name != FILE and p.suffix != ".tmp"] if folder.is_dir() else []
    expect(not held and (folder.is_dir() or not folder.exists()), "out", "a new or empty folder", str(folder))
    tokenizer.save(folder)
    write_whole(path, text)


def line_of(folder: pathlib.Path, name: str) -> Optional[dict[str, Any]]:
    """The manifest's line of a part; None if it is not there yet."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_part(
    folder: pathlib.Path, name: str, split: str, read: Callable[[], Iterable[Optional[bytes]]],
    tokenizer: Optional[Tokenizer] = None,
) -> dict[str, Any]:
    """Writes a part of the texts that `read` gives, None for one that is no text, and gives its line of the manifest; a
    text of less than two tokens is left out. `tokenizer`: that of the folder, if it is at hand."""
    tokenizer = tokenizer or load_tokenizer(folder)
    dtype, digest = dtype_of(tokenizer.vocab_size), hashlib.sha256()
    path, texts, skipped = folder / f"{name}.tokens", 0, 0
    offsets = [0]
    try:
        with open(partial(path), "wb") as file:
            for data in read():
                skipped += data is None
                ids = tokenizer.encode(data or b"")
                if len(ids) > 1:
                    raw = ids.astype(dtype).tobytes()
                    file.write(raw)
                    digest.update(raw)
                    texts += len(data)
                    offsets.append(offsets[-1] + len(ids))
        os.replace(partial(path), path)
    finally:
        partial(path).unlink(missing_ok=True)
    raw = np.array(offsets, "<i8").tobytes()
    digest.update(raw)
    write_whole(path.with_suffix(".offsets"), raw)
    line = dict(
        name=name, split=split, bytes=offsets[-1] * dtype.itemsize, sha256=digest.hexdigest(),
        documents=len(offsets) - 1, text_bytes=texts, skipped=skipped,
    )
    write_whole(path.with_suffix(".json"), json.dumps(line))
    return line


def finish(folder: pathlib.Path, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes the manifest: `about` ("source" and "split_by"), and the lines of all parts."""
    lines = list(lines)
    for split in SPLITS:
        found = any(line["documents"] for line in lines if line["split"] == split)
        expect(found, "corpus", f"a document of at least 2 tokens in split {split!r}", "none")
    stored = {**about, "tokenizer": _digest(folder / FILE), "documents": lines}
    write_whole(folder / MANIFEST, json.dumps(stored, indent=1))
    for done in (*(folder / f"{line['name']}.json" for line in lines), *folder.glob(".*.tmp")):
        done.unlink(missing_ok=True)


def open_files(spec: str, rest: str) -> Tokenized:
    """The token files in the folder `rest`. Their sizes are checked, their bytes by `damaged` alone."""
    folder, stored = _manifest(rest)
    tokenizer = load_tokenizer(folder)
    dtype, lines = dtype_of(tokenizer.vocab_size), [line for line in stored["documents"] if line["documents"]]
    splits = {}
    for split in SPLITS:
        mine = [line for line in lines if line["split"] == split]
        paths = [folder / f"{line['name']}.tokens" for line in mine]
        offsets, ends = [np.zeros(1, np.int64)], 0
        for path, line in zip(paths, mine, strict=True):
            sizes = line["bytes"], (line["documents"] + 1) * 8
            found = tuple(p.stat().st_size if p.is_file() else 0 for p in (path, path.with_suffix(".offsets")))
            expect(found == sizes, "corpus", f"{sizes} bytes of {path.stem}.tokens and .offsets in {rest!r}", found)
            offsets.append(np.fromfile(path.with_suffix(".offsets"), "<i8")[1:] + ends)
            ends += line["bytes"] // dtype.itemsize
        splits[split] = Split(Tokens(paths, dtype), np.concatenate(offsets))
    known = [{key: line[key] for key in ("name", "split", "bytes", "sha256")} for line in lines]
    manifest = {"corpus": spec, "source": stored["source"], "documents": known}
    return Tokenized(spec, tokenizer, splits, manifest, stored["split_by"])


def damaged(rest: str) -> list[str]:
    """Names of the parts whose bytes are not those that were written, and the tokenizer's file if it is none."""
    folder, stored = _manifest(rest)
    bad = [FILE] if stored.get("tokenizer") not in (None, _digest(folder / FILE)) else []
    for line in stored["documents"]:
        digest = hashlib.sha256()
        for end in (".tokens", ".offsets"):
            path = folder / f"{line['name']}{end}"
            with open(path, "rb") if path.is_file() else open(os.devnull, "rb") as file:
                while data := file.read(_READ):
                    digest.update(data)
        bad += [line["name"]] if digest.hexdigest() != line["sha256"] else []
    return bad


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def _manifest(rest: str) -> tuple[pathlib.Path, dict[str, Any]]:
    folder = local("data.corpus", rest)
    try:
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stored["source"], stored["split_by"], [line["documents"] for line in stored["documents"]]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        begun = (folder / PLAN).is_file()
        got = "some that are not finished; the same experiments.tokenize goes on" if begun else "none"
        raise ValueError(f"corpus: expected token files in {rest!r}, got {got}.") from None
    return folder, stored
