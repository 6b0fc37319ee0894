"""Which file is of which split: names of data, not of programs; links; texts among what is none."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import warnings

import numpy as np
import pytest

from meta_attention_jax.data import splits
from meta_attention_jax.data.corpora import SPLITS, load_corpus
from meta_attention_jax.data.pipeline import make_dataset
from meta_attention_jax.data.texts import cut, walk
from tests.test_corpora import write

TEXT = "".join(f"line {i} of a text – é\n" for i in range(60))


def folder(root, *names):
    """Files of different texts."""
    return write(root, {name: f"{name}\n{TEXT}" for name in names})


def found(spec, **arguments):
    corpus = load_corpus(f"path:{spec}", **arguments)
    return {split: [d.name for d in corpus.splits[split]] for split in SPLITS}, corpus.split_by


def many(prefix, count):
    return [f"{prefix}/{i}.txt" for i in range(count)]


@pytest.mark.smoke
def test_names_count_below_the_folder_given(tmp_path):
    names = many("data/train", 40), many("data/valid", 10), many("data/test", 10)
    folder(tmp_path, *names[0], *names[1], *names[2])
    got, by = found(tmp_path)
    assert got == {split: sorted(part) for split, part in zip(SPLITS, names, strict=True)}
    assert by == "by names: 'data/train', 'data/valid', 'data/test'"
    dataset = make_dataset(
        corpus=f"path:{tmp_path}", sequence_length=8, batch_size=2, seed=0
    )
    sizes = [sum(len(f"{name}\n{TEXT}".encode()) for name in part) for part in names]
    assert str(dataset) == (
        f"data path:{tmp_path}, split {by}: train 40 files, {sizes[0]:,} bytes; validation 10 "
        f"files, {sizes[1]:,} bytes; test 10 files, {sizes[2]:,} bytes"
    )


LAYOUTS = {
    # Names of train, validation and test files.
    "wikitext": (["wiki.train.tokens"], ["wiki.valid.tokens"], ["wiki.test.tokens"]),
    "deep": (["a/b/train/x"], ["a/b/dev/x"], ["a/b/test/x/y"]),
    "several": (["de/train/x", "en/train/x"], ["de/dev/x", "en/dev/x"], ["de/test/x", "en/test/x"]),
    "shards": (["train-00000-of-00002.txt", "train-00001-of-00002.txt"],
               ["validation-00000-of-00001.txt"], ["test-00000-of-00001.txt"]),
    "languages": (["train.de", "train.en"], ["dev.de", "dev.en"], ["test.de", "test.en"]),
    "ing": (["training/x"], ["validation/x"], ["testing/x"]),
    "capitals": (["Train/x"], ["VALID/x"], ["Test/x"]),
    "shouted": (["TRAIN.txt"], ["DEV.txt"], ["TEST.txt"]),
    "development": (["train/x"], ["development/x"], ["heldout/x"]),
    "devel": (["train/x"], ["devel/x"], ["held-out/x"]),
    "held_out": (["train.txt"], ["eval.txt"], ["held_out.txt"]),
    "evaluation": (["train/x"], ["evaluation/x"], ["HeldOut/x"]),
    "speech": (["train-clean-100/x", "train-other-500/x"], ["dev-clean/x", "dev-other/x"],
               ["test-clean/x", "test-other/x"]),
    "sets": (["train_set/x"], ["dev_set/x"], ["my_test_set/x"]),
    "joined": (["trainset.txt"], ["devset.txt"], ["testset.txt"]),
    "camel": (["myTrainData/x"], ["myValData/x"], ["myTestData/x"]),
    "years": (["train2017/x"], ["val2017/x"], ["test-dev2017/x"]),
    "suffix": (["eng.train"], ["eng.dev"], ["eng.testa", "eng.testb"]),
    "two kinds": (["train/x"], ["valid.txt"], ["test.jsonl"]),
    "two words": (["train.txt"], ["valid.txt"], ["dev_test.txt", "devtest.txt"]),
    "within train": (["train/train/x"], ["train/dev/x"], ["test/train/x", "test/dev/x"]),
    "programs alone": (["train/a.py", "train/b.py"], ["valid/a.py"], ["test/a.py"]),
    "three programs": (["train.py"], ["valid.py"], ["test.py"]),
    "words in train": (["train/test_1.txt", "train/x.txt"], ["valid/train_1.txt"], ["test/x.txt"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_data(layout, tmp_path):
    names = LAYOUTS[layout]
    folder(tmp_path / "top", *names[0], *names[1], *names[2])
    got, by = found(tmp_path)
    wanted = [sorted(f"top/{name}" for name in part) for part in names]
    assert list(got.values()) == wanted and by.startswith("by names: 'top/")


CODE = {
    "tests and train.py": (["train.py", "model.py", "tests/test_a.py", "tests/test_b.py"],
                           "'tests' is trained on like the rest, though 'train.py' stands beside it"),
    "only tests and train.py": (["train.py", "tests/test_a.py", "tests/test_b.py"], "though 'train.py'"),
    "a text among programs": (["train.txt", "test.py", "main.py"], "a program like 'main.py'"),
    "a package and a script": ([*(f"p/train/{i}.py" for i in range(30)), "p/test.py",
                                "model.py"], "programs like 'model.py'"),
    "a page among pages": (["train.txt", "test.md", "README.md"], "a page like 'README.md'"),
    "a folder beside a page": (["docs/training.md", "docs/tests/a.txt", "docs/x.txt"], "though 'training"),
    "test and train.py": (["train.py", "test/a.txt", "README.md"], "'test' is trained on"),
    "scripts": (["src/train.py", "src/test.py", "src/model.py"], "programs like 'src/model.py'"),
    "scripts elsewhere": (["bin/train.sh", "bin/eval.sh", "src/model.py"], "for programs like"),
    "packages": (["p/train/a.py", "p/eval/a.py", "m.py", "n.py", "o.py"], "for programs like"),
    "many": ([f"{i}/{n}.py" for i in range(300) for n in ("train", "test", "x")], "programs like"),
    "pages": (["docs/training.md", "docs/testing.md", "docs/index.md"], "for pages like"),
    "words inside words": (["strain/a", "contest/a", "latest/a", "device/a", "interval/a"], None),
    "test alone": (["a.txt", "b.txt", "heldout/c.txt"], "'heldout' is trained on like the rest"),
    "apart": (["a/train/x", "b/test/x"], "'b/test' is trained on like the rest"),
    "both words": (["train_test.txt", "test_train.txt", "a.txt"], None),
}


@pytest.mark.parametrize("name", CODE)
def test_layouts_of_programs_and_of_no_splits(name):
    names, note = CODE[name]
    got = splits.assign(sorted(names), "auto")
    assert not got.named and got.by == "by a hash of the file's path"
    if note is None:
        assert not got.notes
    else:
        assert note in got.notes[0]
    assert got.splits == {n: splits.split_of(n) for n in names}


JOINED = {
    "train.txt test.md": "test.md", "train.txt test.rst": "test.rst", "train.txt test.m": "test.m",
    "train.txt eval.yaml": "eval.yaml", "train/a.md train/b.md test.md": "test.md",
    "train/a.txt test.md": "test.md", "train.md test.txt": "test.txt",
    "train.txt valid.txt test.md": "valid.txt test.md", "a/train.txt a/test.md b/train.txt b/test.md":
    "a/test.md b/test.md", "train.en train.r test.en test.r": "test.en test.r",
    "train.en train.cs dev.en dev.cs test.en test.cs": "dev.en dev.cs test.en test.cs",
    "train.en-de.txt newstest2014.txt newsdev2013.txt": "newstest2014.txt newsdev2013.txt",
    "train/x newsdiscussdev2015/x newsdiscusstest2015/x": "newsdiscussdev2015/x newsdiscusstest2015/x",
    "trainval/a trainval/b test/c": "test/c", "trainval2007.txt test2007.txt": "test2007.txt",
}


@pytest.mark.parametrize("names", JOINED)
def test_what_is_held_out_by_its_name_is_not_trained_on(names):
    got = splits.assign(sorted(names.split()), "auto")
    held = {name: split for name, split in got.splits.items() if split != "train"}
    assert got.named and not got.notes and held.keys() == set(JOINED[names].split())
    for name, split in held.items():
        of_validation = any(word in name for word in ("dev", "valid", "eval"))
        assert split == ("validation" if of_validation else "test"), name


@pytest.mark.parametrize("names, other", [
    ("train/a test/b eval.py", "eval.py"), ("train/a test/b bin/train.sh bin/eval.sh", "bin/train.sh"),
    ("train.txt test.txt train.py test.py", "train.py"), ("train/a test/b test.md", "test.md"),
])
def test_scripts_beside_data_are_no_data(names, other, tmp_path):
    folder(tmp_path, *names.split())
    with pytest.raises(ValueError, match="data.split=hash ignores names"):
        load_corpus(f"path:{tmp_path}")
    got = splits.assign(sorted(names.split()), "auto")
    assert got.splits[other] is None


def test_validation_is_cut_out_of_trainval(tmp_path):
    folder(tmp_path, "trainval/a", "trainval/b", "test/c")
    got, by = found(tmp_path)
    assert by == "by names: 'trainval', 'test'; validation off the end of every train file"
    assert got["test"] == ["test/c"] and len(got["validation"]) == 2


def test_a_few_programs_beside_folders_of_programs_are_no_reason_to_train_on_test(tmp_path):
    names = [*(f"train/{i}.py" for i in range(9)), "test/a.py"]
    folder(tmp_path, *names, "load.py")
    with pytest.raises(ValueError, match="got 'load.py'; data.split=hash ignores names"):
        load_corpus(f"path:{tmp_path}")


@pytest.mark.parametrize("outside", ("README", "data/vocab.txt", "other/train_test.txt"))
def test_text_outside_the_names_is_one_sentence(outside, tmp_path):
    folder(tmp_path, "data/train/a", "data/test/b", outside)
    with pytest.raises(ValueError, match=f"got '{outside}'") as caught:
        load_corpus(f"path:{tmp_path}")
    assert "\n" not in str(caught.value)
    (tmp_path / outside).write_bytes(b"\0")
    with pytest.warns(UserWarning, match="1 of 3 files skipped"):
        found(tmp_path)


def test_the_rule_can_be_given(tmp_path):
    names = many("train", 60) + many("test", 60)
    folder(tmp_path, *names)
    got, by = found(tmp_path, split="hash")
    assert by == "by a hash of the file's path"
    assert all(splits.split_of(name) == split for split, part in got.items() for name in part)
    assert found(tmp_path, split="names") == found(tmp_path, split="auto")
    write(tmp_path, {"b/c.txt": TEXT, "b/d.txt": TEXT})
    with pytest.raises(ValueError, match="data.split: expected a train name beside a held-out one"):
        load_corpus(f"path:{tmp_path / 'b'}", "names")
    folder(tmp_path / "code", "train.py", "tests/a.py", "dev/x.txt")
    got, _ = found(tmp_path / "code", split="names")
    assert got == {"train": ["train.py"], "validation": ["dev/x.txt"], "test": ["tests/a.py"]}


@pytest.mark.parametrize("spec", ("sotu", "stdlib", "recall", "hf:a/b"))
def test_corpora_with_splits_of_their_own_take_no_rule(spec):
    for rule in ("names", "hash"):
        with pytest.raises(ValueError, match=f"data.split: expected 'auto' for '{spec}', .* got '"):
            make_dataset(corpus=spec, sequence_length=8, batch_size=2, seed=0, split=rule)
    with pytest.raises(ValueError, match="data.split: expected one of auto, names, hash, got 'no'"):
        make_dataset(corpus=spec, sequence_length=8, batch_size=2, seed=0, split="no")


def test_what_names_leave_out_is_taken_out_of_train(tmp_path):
    names = many("train", 200)
    folder(tmp_path, *names, "eval/x.txt")
    got, by = found(tmp_path)
    assert by == "by names: 'train', 'eval'; test by a hash of the train file's path"
    assert got["validation"] == ["eval/x.txt"]
    assert got["test"] == sorted(n for n in names if splits.split_of(n) == "test") != []
    assert sorted(got["train"] + got["test"]) == sorted(names)
    few = folder(tmp_path / "few", "train/1", "train/2", "test/c")
    assert {splits.split_of(f"train/{i}") for i in (1, 2)} == {"train"}
    corpus = load_corpus(f"path:{few}")
    by = "by names: 'train', 'test'; validation off the end of every train file"
    assert corpus.split_by == by
    for name, train, validation in zip(
        "12", corpus.splits["train"], corpus.splits["validation"], strict=True
    ):
        text = f"train/{name}\n{TEXT}".encode()
        assert train.data + validation.data == text
        assert 0.9 < len(train.data) / len(text) < 0.97 and train.data.endswith(b"\n")


@pytest.mark.parametrize(
    "train, held, rest",
    [
        ("train.txt", {"validation": ["valid.txt"]}, ["valid.csv", "valid.tokens", "other.txt"]),
        ("wiki.train.tokens", {"test": ["wiki.Test.tokens"]}, ["book.test.tokens", "test.tokens"]),
        ("train-00000-of-00009.txt", {"validation": ["dev-00000-of-00001.txt"]}, ["dev-1.txt"]),
        ("train.py", {"test": ["test.py"]}, ["README"]),
        ("en_train_set.txt", {"validation": ["en_dev_set.txt", "en_valid_set.txt"]}, ["en_dev.txt"]),
        ("train_data.txt", {"test": ["test.txt"]}, ["data.txt"]),
        ("train.txt", {"validation": ["valid.tokens"]}, []),
        ("train_set.txt", {"validation": ["valid.txt"]}, []),
        ("train", {"validation": ["VALID.TXT"]}, []),
    ],
)
def test_the_held_out_files_beside_a_train_file_are_read(train, held, rest, tmp_path):
    beside = [name for part in held.values() for name in part]
    folder(tmp_path, train, *beside, *rest)
    got, by = found(tmp_path / train)
    missing = next(split for split in SPLITS[1:] if split not in held)
    assert {split: part for split, part in got.items() if split in held} == held
    assert [name.partition("[")[0] for name in got["train"] + got[missing]] == [train, train]
    assert f"'{train}'" in by and by.endswith(f"; {missing} off the end of the train file")
    assert found(tmp_path / train, split="names")[0] == got
    got, by = found(tmp_path / train, split="hash")
    assert all(part[0].startswith(f"{train}[") for part in got.values()) and "by place" in by


@pytest.mark.parametrize("train, other", [
    ("train.txt", "test.jsonl"), ("train.en", "test.de"), ("train.txt", "test/a.txt"),
    ("train.en-de.txt", "newstest2014.txt"), ("wiki.train.tokens", "test.tokens"),
])
def test_a_held_out_name_beside_a_train_file_that_is_not_read_is_said(train, other, tmp_path):
    folder(tmp_path, train, other)
    name = other.partition("/")[0]
    with pytest.warns(UserWarning, match=f"'{name}' beside '{train}' is not read, for their names"):
        assert "by place" in found(tmp_path / train)[1]
    folder(tmp_path, train.replace("train", "test"))
    assert "by names" in found(tmp_path / train)[1]


def test_a_file_alone_has_no_names(tmp_path):
    folder(tmp_path, "train.py", "test.py", "model.py", "book.txt", "test.txt", "train/x.txt",
           "valid/y.txt")
    with pytest.warns(UserWarning, match="'train.py' is taken for a program like 'model.py'"):
        assert "by place" in found(tmp_path / "train.py")[1]
    assert "by place" in found(tmp_path / "book.txt")[1]
    with pytest.raises(ValueError, match="data.split: expected a train file with a held-out file"):
        load_corpus(f"path:{tmp_path / 'book.txt'}", "names")
    folder(tmp_path, *many("train", 200))
    with pytest.warns(UserWarning, match="'valid' beside the folder 'train' is not read"):
        found(tmp_path / "train")
    folder(tmp_path / "one", *many("train", 200), "test.md")
    with pytest.warns(UserWarning, match="'test.md' beside the folder 'train' is not read"):
        found(tmp_path / "one" / "train")


@pytest.mark.smoke
def test_links_are_followed_and_end(tmp_path):
    root = folder(tmp_path / "corpus", "train/a", "test/b", "test/deep/b")
    folder(tmp_path / "elsewhere", "c", "sub/d", ".hidden/e")
    folder(tmp_path, "alone.txt")
    for place, target in {
        "train/more": "elsewhere", "train/alone": "alone.txt", "train/sub/loop": "corpus/train",
        "train/up": "corpus", "train/above": ".", "test/twice": "elsewhere/sub",
        "test/deep/self": "corpus/test/deep/self", "train/gone": "nowhere", ".train": "elsewhere",
    }.items():
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).symlink_to(tmp_path / target)
    names, notes = walk(root)
    # What two links lead to is read by the first of them.
    assert names == ["test/b", "test/deep/b", "test/twice/d", "train/a", "train/alone",
                     "train/more/c"]
    assert notes == [
        "2 broken links left out, the first 'test/deep/self'",
        "4 links to folders that are read already left out, the first 'train/above'",
    ]
    with pytest.warns(UserWarning) as told:
        got, _ = found(root)
    assert got["test"] == names[:3] and len(told) == 2
    os.symlink(root, tmp_path / "link")
    with pytest.warns(UserWarning):
        assert found(tmp_path / "link")[0] == got


def test_linked_folders_have_the_names_of_links(tmp_path):
    folder(tmp_path / "store", "1/a", "2/b", "3/c")
    (tmp_path / "corpus").mkdir()
    for number, name in enumerate(("train", "valid", "test"), 1):
        (tmp_path / "corpus" / name).symlink_to(f"../store/{number}")
    got, _ = found(tmp_path / "corpus")
    assert got == {"train": ["train/a"], "validation": ["valid/b"], "test": ["test/c"]}


def test_what_is_no_text_is_skipped_and_counted(tmp_path):
    names = many("part", 120)
    folder(tmp_path, *names)
    whole = found(tmp_path)
    bad = {"a.png": b"\x89\0" * 99_999, "b/empty": b"", "z.txt": b"ab\xff"}
    write(tmp_path, bad | {"y": b"x" * 70_000 + b"\0"})
    with pytest.warns(UserWarning, match="4 of 124 files skipped, the first 'a.png', a binary"):
        assert found(tmp_path) == whole
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="expected text files in .*, got none: 'a.png' is a bin"):
        load_corpus(f"path:{tmp_path}")
    with pytest.raises(ValueError, match="expected text in .*'.*a.png', got a binary file"):
        load_corpus(f"path:{tmp_path / 'a.png'}")


@pytest.mark.parametrize("split", ("train", "valid", "test"))
def test_a_named_split_of_no_text_is_refused(split, tmp_path):
    folder(tmp_path, "train/a", "valid/a", "test/a")
    (tmp_path / split / "a").write_bytes(b"\0")
    with pytest.raises(ValueError, match=f"{split}/a', got a binary file"):
        load_corpus(f"path:{tmp_path}")


@pytest.mark.parametrize(
    "text",
    [
        "no line end at all, ", "é", "世界", "\U0001f600", "a line\n" + "then a long " * 99,
        "x" * 500 + "\n" + "é" * 999, "word " * 300 + "\n" + "word " * 9 + "\n",
    ],
)
def test_long_lines_are_cut_between_characters(text, tmp_path):
    data = (text * 20 if len(text) < 30 else text).encode()
    write(tmp_path, {"a.txt": data})
    corpus = load_corpus(f"path:{tmp_path / 'a.txt'}")
    parts = [corpus.splits[split][0].data for split in SPLITS]
    assert b"".join(parts) == data and all(part.decode() for part in parts)
    shares = np.array([len(part) / len(data) for part in parts])
    # A character is up to a share of the shortest of these.
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.051)
    assert shares[0] > 0.8


def test_every_cut_is_one_of_characters():
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(0, 40))
        text = "".join(rng.choice(list("aé世\U0001f600\n"), size, p=[0.3, 0.2, 0.2, 0.2, 0.1]))
        for parts in (SPLITS[1:], ("test",), ()):
            pieces = cut("x", text.encode(), parts)
            assert "".join(data.decode() for _, (_, data) in pieces) == text
            order = [("train", *parts).index(split) for split, _ in pieces]
            assert order == sorted(set(order))


def test_copies_of_train_files_among_held_out_ones_are_counted(tmp_path):
    folder(tmp_path, "train/a", "train/b", "valid/c", "test/d")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(tmp_path)
    write(tmp_path, {"test/copy": (tmp_path / "train/a").read_bytes()})
    said = "1 of 3 held-out documents are in train as well, byte for byte, the first 'test/copy'"
    with pytest.warns(UserWarning, match=said):
        found(tmp_path)


def test_splits_of_the_hub_are_found_by_their_words(monkeypatch):
    class Rows(dict):
        column_names = ["text"]

    rows = {name: Rows(text=[f"{name} {i}" for i in range(99)]) for name in (
        "train", "dev", "test_matched", "test_mismatched", "unsupervised")}
    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.util.spec_from_loader("datasets", None)
    fake.__version__, fake.load_dataset = "0", lambda *names: rows
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = load_corpus("hf:owner/name")
    got = {split: [d.name for d in corpus.splits[split]] for split in SPLITS}
    size = len(corpus.splits["train"][0].data)
    assert got == {"train": [f"train[0:{size}]"], "validation": ["dev"],
                   "test": ["test_matched", "test_mismatched"]}
    assert corpus.split_by == "by the data set's own splits"
    del rows["dev"]
    assert load_corpus("hf:owner/name").split_by.endswith("; validation off the end of train")
