"""What a run has read, by name, size and digest, in `data_manifest.json`; and whether data are the same."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from typing import Any

from meta_attention_jax.data.corpora import PLACED, load_corpus
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.data.splits import RULES
from meta_attention_jax.files import at, write_whole

MANIFEST = "data_manifest.json"


def same_data(stored: Any, given: dict[str, Any]) -> bool:
    """Whether two manifests are of the same data. Of files of one's own that is the documents' bytes, splits and order,
    the tokenizer, and the tasks: neither where they lie nor what they are called."""
    if not _of_files(stored) or not _of_files(given):
        return stored == json.loads(json.dumps(given))
    said = all(stored.get(part) == given.get(part) for part in ("tokenizer", "tasks"))
    return said and _documents(stored) == _documents(given)


def digest(manifest: dict[str, Any]) -> str:
    """A text that is the same for manifests of the same data; see `same_data`."""
    known = json.loads(json.dumps(manifest))
    if _of_files(known):
        known = [_documents(known), known["tokenizer"], *([known["tasks"]] if "tasks" in known else [])]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _of_files(manifest: Any) -> bool:
    """Whether this is the manifest of files of one's own, with all that `same_data` looks at."""
    if not isinstance(manifest, dict) or not str(manifest.get("corpus")).startswith(PLACED):
        return False
    documents, keys = manifest.get("documents"), {"split", "bytes", "sha256"}
    if not isinstance(documents, list) or "tokenizer" not in manifest:
        return False
    return all(isinstance(one, dict) and keys <= one.keys() for one in documents)


def _documents(manifest: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(one["split"], one["bytes"], one["sha256"]) for one in manifest["documents"]]


def check_manifest(dataset: Dataset, directory: str | os.PathLike[str]) -> bool:
    """Whether `data_manifest.json` is in `directory`; nothing is written."""
    path = at(directory) / MANIFEST
    if not path.is_file():
        return False
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # Text of another kind, or JSON of 100,000 brackets.
        stored = None
    given = dataset.manifest()
    if not same_data(stored, given):
        raise ValueError(
            f"data: expected the data of {str(path)!r}, got other data"
            f"{_difference(stored, given, dataset)}; use another workdir."
        )
    return True


def _difference(stored: Any, given: dict[str, Any], dataset: Dataset) -> str:
    """How the data of two manifests of files differ, as the end of a sentence."""
    if not _of_files(stored) or not _of_files(given):
        return ""
    if stored["tokenizer"] != given["tokenizer"]:
        return " or another tokenizer"
    if stored.get("tasks") != given.get("tasks"):
        return " or other tasks"
    mine, theirs = (sorted({str(one[1:]) for one in _documents(m)}) for m in (stored, given))
    by = f"split {dataset.about()['split']}"
    same = f": the same files, but {by}" if mine == theirs else f", {by}"
    for rule in RULES:
        if _read_by(given["corpus"], rule) == _documents(stored):
            return f"{same}; data.split={rule} is what it was"
    known = _documents(stored)
    more = [one for one in given["documents"] if _documents({"documents": [one]})[0] not in known]
    if known == [one for one in _documents(given) if one in known]:
        return f"{same}; without {more[0]['name']!r}{' and others' * (len(more) > 1)} it is what it was"
    return same


def _read_by(corpus: str, rule: str) -> list[tuple[Any, ...]]:
    """The documents of a corpus by another `data.split`; none where there is no such split."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _documents(load_corpus(corpus, rule).manifest())
    except (ValueError, OSError):
        return []


def write_manifest(dataset: Dataset, directory: str | os.PathLike[str]) -> None:
    """Writes `data_manifest.json` into `directory`, atomically; the same one again is no change."""
    if check_manifest(dataset, directory):
        return
    write_whole(at(directory) / MANIFEST, json.dumps(dataset.manifest(), indent=1))
