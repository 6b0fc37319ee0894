"""Corpora that are tokens on disk: the same batches as from memory, of which next to nothing stays resident."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from configs import smoke
from meta_attention_jax.config import completed, config_to_dict, default_config, may_change
from meta_attention_jax.data import token_files
from meta_attention_jax.data.corpora import load_corpus
from meta_attention_jax.data.manifest import check_manifest, write_manifest
from meta_attention_jax.data.parts import in_parts
from meta_attention_jax.data.pipeline import make_dataset
from meta_attention_jax.data.tokenizer import ByteTokenizer
from meta_attention_jax.training import processes
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from tests.fuzz_harness import call, snapshot

T, B = 32, 6


def make(spec, **changes):
    return make_dataset(**{**dict(corpus=spec, sequence_length=T, batch_size=B, seed=3), **changes})


def assert_same_batches(a, b, splits=("validation", "test")):
    batches = [(a.train_batch(step), b.train_batch(step)) for step in (0, 5, 400)]
    for split in splits:
        batches += zip(a.eval_batches(split, max_batches=3), b.eval_batches(split, max_batches=3), strict=True)
    for x, y in batches:
        jax.tree.map(np.testing.assert_array_equal, x, y)


def words(number, count):
    rng = np.random.default_rng(number)
    return " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(count)) + ".\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, a file that is none, and one of a single byte."""
    root = tmp_path_factory.mktemp("texts")
    for split, first, count in (("train", 0, 5), ("valid", 5, 2), ("test", 7, 2)):
        (root / split).mkdir()
        for i in range(count):
            (root / split / f"{i}.txt").write_text(words(first + i, 20 + 50 * i))
    (root / "train" / "film.txt").write_bytes(b"\0\1\2")
    (root / "train" / "tiny.txt").write_bytes(b"x")
    return root


def written(folder, out, **flags):
    told = call("tokenize", f"--corpus=path:{folder}", f"--out={out}", "--workers=1",
                *(f"--{flag}={value}" for flag, value in flags.items()))
    assert (told.code, told.err) == (0, ""), told
    return told.out


@pytest.fixture(scope="module")
def tokens(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "out"
    said = written(folder, out)
    assert "1 files that are no text left out" in said and "100 %" in said
    return out


def test_token_files_give_the_batches_of_the_texts(folder, tokens):
    with pytest.warns(UserWarning, match="1 of 11 files skipped"):
        texts = make(f"path:{folder}")
    files = make(f"tokens:{tokens}")
    assert_same_batches(texts, files)
    for order in ({"order": 1}, {"tasks": ("repeat", "prose"), "shares": (1, 1), "window": 4}):
        with pytest.warns(UserWarning, match="skipped"):
            texts = make(f"path:{folder}", **order)
        assert_same_batches(texts, make(f"tokens:{tokens}", **order))
    assert files.about()["split"].startswith("by names")


def test_parts_of_any_size_are_one_sequence_and_tokenizers_are_kept(folder, tmp_path):
    parts = in_parts(f"path:{folder}", "auto", 300)
    assert len(parts.parts) > 5 and len({part.name for part in parts.parts}) == len(parts.parts)
    for name, size in (("a", 300), ("b", 10**6)):
        parts = in_parts(f"path:{folder}", "auto", size)
        token_files.begin(tmp_path / name, {}, ByteTokenizer())
        lines = [token_files.write_part(tmp_path / name, p.name, p.split, p.read) for p in parts.parts]
        token_files.finish(tmp_path / name, {"source": "", "split_by": ""}, lines)
    assert_same_batches(make(f"tokens:{tmp_path}/a"), make(f"tokens:{tmp_path}/b"))
    written(folder, tmp_path / "bpe", tokenizer="bpe", vocab_size=270)
    for spec in (f"tokens:{tmp_path}/a", f"tokens:{tmp_path}/bpe"):
        kind = dict(tokenizer="bpe", vocab_size=270) if spec.endswith("bpe") else {}
        assert make(spec, **kind).train_batch(0).loss_mask.any()
    written(folder, tmp_path / "again", tokenizer_from=tmp_path / "bpe")
    files = [(tmp_path / name / "train-00000.tokens").read_bytes() for name in ("bpe", "again")]
    assert files[0] == files[1]


def test_what_was_stopped_goes_on_and_ends_the_same(folder, tokens, tmp_path, monkeypatch):
    whole, made = token_files.write_part, []

    def stops(*args):
        if made:
            (args[0] / f".{args[1]}.tokens.0.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(whole(*args))
        return made[-1]

    monkeypatch.setattr(token_files, "write_part", stops)
    told = call("tokenize", f"--corpus=path:{folder}", f"--out={tmp_path}/out", "--workers=1")
    assert told.code == 128 + signal.SIGINT and len(made) == 1
    with pytest.raises(ValueError, match="not finished; the same experiments.tokenize goes on"):
        make(f"tokens:{tmp_path}/out")
    first = (tmp_path / "out" / "train-00000.tokens").stat().st_mtime_ns
    monkeypatch.setattr(token_files, "write_part", whole)
    written(folder, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tokens)
    assert (tmp_path / "out" / "train-00000.tokens").stat().st_mtime_ns == first
    assert "complete already" in written(folder, tmp_path / "out")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_sentence_and_costs_its_part(tmp_path):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for i in range(100):
        (texts / f"{i}.txt").write_text(words(i, 10_000))
    command = [sys.executable, "-m", "experiments.tokenize", f"--corpus=path:{texts}", f"--out={out}",
               "--part_mb=1", "--workers=2", "--tokenizer=bpe", "--vocab_size=300"]
    where = dict(cwd=pathlib.Path(__file__).parent.parent)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **where) as process:
        while not list(out.glob("train-*.json")) and process.poll() is None:
            time.sleep(0.02)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {c: pathlib.Path(f"/proc/{c}/cmdline").read_text() for c in children}
        os.kill(int(next(c for c, line in commands.items() if "spawn_main" in line)), signal.SIGKILL)
        said = process.communicate(timeout=60)
    assert process.returncode == 2 and said[1].startswith("error: workers: expected"), said
    assert said[1].count("\n") == 1 and not (out / "manifest.json").exists(), said
    subprocess.run(command, check=True, capture_output=True, timeout=120, **where)
    assert not token_files.damaged(str(out))
    lines = json.loads((out / "manifest.json").read_text())["documents"]
    assert sum(line["text_bytes"] for line in lines) == sum(p.stat().st_size for p in texts.iterdir())


def test_damage_is_found(tokens, tmp_path):
    place = shutil.copytree(tokens, tmp_path / "out")
    assert call("tokenize", f"--out={place}", "--verify").code == 0
    path = place / "test-00000.tokens"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    told = call("tokenize", f"--out={place}", "--verify")
    assert told.code == 2 and told.err.endswith("got 'test-00000'.\n") and told.err.count("\n") == 1
    (place / "tokenizer.json").write_text('{"kind":  "bytes"}')
    assert call("tokenize", f"--out={place}", "--verify").err.endswith("got 'tokenizer.json, test-00000'.\n")
    path.write_bytes(data[:-2])
    with pytest.raises(ValueError, match="corpus: expected .* bytes of test-00000.tokens and .offsets"):
        make(f"tokens:{place}")


def test_a_run_knows_its_tokens_wherever_they_lie(tokens, folder, tmp_path):
    place = shutil.copytree(tokens, tmp_path / "elsewhere")
    write_manifest(make(f"tokens:{tokens}"), tmp_path / "run")
    assert check_manifest(make(f"tokens:{place}"), tmp_path / "run")
    assert may_change("data.corpus", f"tokens:{tokens}", f"tokens:{place}")
    assert not may_change("data.corpus", f"path:{folder}", f"tokens:{place}")
    stored = json.loads((place / "manifest.json").read_text())
    stored["documents"][0]["sha256"] = "0" * 64
    (place / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="got other data"):
        check_manifest(make(f"tokens:{place}"), tmp_path / "run")


def resident():
    """Mebibytes of files that are mapped and in memory."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux says what is resident")
def test_what_is_read_does_not_stay_in_memory(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(64 << 20)
    tokens = token_files.Tokens(paths, np.dtype("<u2"))
    assert len(tokens) == 64 << 20
    before = resident()
    for start in range(0, len(tokens), 1 << 16):
        assert len(tokens[start : start + (1 << 16)]) == 1 << 16
    assert resident() - before < 32, "of 128 that were read"


ROWS = [np.random.default_rng(i).integers(0, 256, T + 1 - i % 3) for i in range(40)]


def write_rows(root, scheme, split, rows):
    (root / split).mkdir(parents=True)
    if scheme == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet")
        table = sys.modules["pyarrow"].table({"text": ["-"] * len(rows), "tokens": [row.tolist() for row in rows]})
        parquet.write_table(table, root / split / "0.parquet", row_group_size=7)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(root / split / "0.array_record"), "group_size:1")
        for row in rows:
            writer.write(row if isinstance(row, bytes) else row.astype("<u2").tobytes())
        writer.close()


@pytest.mark.parametrize("scheme", ["arrayrecord", pytest.param("parquet", marks=pytest.mark.parquet)])
def test_rows_of_other_formats_are_windows(scheme, tmp_path):
    for split in ("train", "valid", "test"):
        write_rows(tmp_path, scheme, split, ROWS)
    spec = f"{scheme}:{tmp_path}"
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer.json"):
        make(spec)
    assert make(spec, tokenizer=ByteTokenizer()).vocab_size == 256
    ByteTokenizer().save(tmp_path)
    dataset = make(spec, batch_size=len(ROWS))
    batch = dataset.train_batch(1)
    found = sorted((*b.tokens[m].tolist(), int(b.targets[m][-1])) for b, m in (
        (jax.tree.map(lambda leaf, r=r: leaf[r], batch), batch.loss_mask[r]) for r in range(len(ROWS))))
    assert found == sorted(tuple(row.tolist()) for row in ROWS)
    (held,) = dataset.eval_batches("test")
    np.testing.assert_array_equal(held.tokens[0], ROWS[0][:-1])
    assert dataset.about()["train"]["files"] == 1 and check_same(dataset, spec, tmp_path)
    with pytest.raises(ValueError, match="data.sequence_length: expected rows of 2 to T [+] 1 = 21 tokens, got 33"):
        make(spec, sequence_length=20)
    with pytest.raises(ValueError, match="data.order: expected 2 for"):
        make(spec, order=1)
    with pytest.raises(ValueError, match=r"data.tasks: expected \('prose',\) for"):
        make(spec, tasks=("repeat",), window=2)
    with pytest.raises(ValueError, match="data.tokenizer: expected 'bytes', with which"):
        make(spec, tokenizer="bpe", vocab_size=300)
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(ValueError, match="whose name, or whose folder's, says validation"):
        make(spec)


def test_rows_that_are_none_are_one_sentence(tmp_path):
    ByteTokenizer().save(tmp_path)
    spec = f"arrayrecord:{tmp_path}"
    for split in ("train", "valid", "test"):
        write_rows(tmp_path, "arrayrecord", split, ROWS)
    shutil.rmtree(tmp_path / "train")
    write_rows(tmp_path, "arrayrecord", "train", [])
    with pytest.raises(ValueError, match="corpus: expected a row in split 'train' of .* got 'none'"):
        make(spec)
    shutil.rmtree(tmp_path / "train")
    write_rows(tmp_path, "arrayrecord", "train", [b"abc"])
    with pytest.raises(ValueError, match="corpus: expected ids of 2 bytes in row 0, got '3 bytes'"):
        make(spec).check_training()
    (tmp_path / "train" / "0.array_record").write_bytes(b"junk" * 99)
    with pytest.raises(ValueError, match="corpus: expected files of arrayrecord in"):
        make(spec)


@pytest.mark.parquet
@pytest.mark.parametrize("column, sentence", [
    (["a", "b"], "expected lists of whole numbers in the column 'tokens', got 'string'"),
    ([[1.5, 2.5]], "expected lists of whole numbers in the column 'tokens', got 'list<.*double>'"),
    ([None, [1, 2]], "expected tokens in row 0, got"),
    ([[1, None], [1, 2]], "expected tokens in row 0, got 'one that is missing'"),
    ([[-3, 2]], "expected ids of the 256 tokens that there are in row 0, got -3"),
    ([], "expected (a row in split|lists of whole)"),
])
def test_columns_that_are_no_tokens_are_one_sentence(column, sentence, tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    ByteTokenizer().save(tmp_path)
    for split in ("train", "valid", "test"):
        write_rows(tmp_path, "parquet", split, ROWS)
    parquet.write_table(pyarrow.table({"tokens": column}), tmp_path / "train" / "0.parquet")
    with pytest.raises(ValueError, match=sentence):
        make(f"parquet:{tmp_path}").check_training()


def test_two_commands_do_not_write_one_folder(folder, tmp_path):
    line = "tokenize", f"--corpus=path:{folder}", f"--out={tmp_path / 'out'}", "--workers=1"
    assert call(*line).code == 0
    (tmp_path / "out" / "manifest.json").unlink()
    with processes.hold(tmp_path / "out"):
        told = call(*line)
    assert told.code == 2 and told.err.count("\n") == 1 and "no other process" in told.err, told


def check_same(dataset, spec, root):
    write_manifest(dataset, root / "run")
    return check_manifest(make(spec), root / "run")


class Table:
    """As `datasets` has one."""

    column_names = ["text"]

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        return {"text": self.rows[which]} if isinstance(which, slice) else self.rows


@pytest.mark.parametrize("rows", [False, True])
def test_a_data_set_of_the_hub_is_written_to_token_files(rows, monkeypatch, tmp_path):
    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.util.spec_from_loader("datasets", None)
    fake.__version__ = "0"
    texts = [f"row {i}" for i in range(45_000)]
    fake.load_dataset = lambda *names: {"train": Table(texts), "test": Table(["held", "out"])}
    monkeypatch.setitem(sys.modules, "datasets", fake)
    told = call("tokenize", "--corpus=hf:owner/name", f"--out={tmp_path}/out", "--workers=1", *["--rows"] * rows)
    assert told.code == 0, told.err
    lines = json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]
    assert [line["split"] for line in lines] == ["train"] * 3 + ["validation", "test"]
    assert sum(line["documents"] for line in lines) == (45_002 if rows else 5)
    train = b"".join((tmp_path / "out" / f"{line['name']}.tokens").read_bytes() for line in lines[:4])
    ending = "" if rows else "\n"
    assert bytes(np.frombuffer(train, "<u2").astype(np.uint8)) == "".join(t + ending for t in texts).encode()
    if not rows:
        corpus = load_corpus("hf:owner/name")
        assert lines[-1]["text_bytes"] == len(corpus.splits["test"][0].data)
    assert make(f"tokens:{tmp_path}/out", sequence_length=8).train_batch(0).loss_mask.any()


def test_runs_from_before_the_order_keep_theirs():
    stored = config_to_dict(default_config())
    assert stored["data"].pop("order") == 2
    assert completed(stored)["data"]["order"] == 1


@pytest.mark.filterwarnings("ignore:corpus")  # Of the file that is no text.
def test_a_run_from_before_the_order_goes_on_in_its_own(folder, tmp_path):
    def trained(stop_after, **given):
        config = smoke.get_config()
        config.update_from_flattened_dict({
            "data.corpus": f"path:{folder}", "data.sequence_length": 8, "model.window": 4, "train.eval_batches": 1,
            "train.steps": 4, "parallel.devices": 1, **given,
        })
        train(prepare(config, tmp_path / "run"), progress=False, stop_after=stop_after)

    trained(2, **{"data.order": 1})
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["data"]["order"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="data.order: expected 1, as in .* got 2"):
        trained(None)
    trained(None, **{"data.order": 1})
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize("flags, sentence", [
    (["--corpus=tokens:x", "--out=new"], "corpus: expected a corpus of texts, got tokens"),
    (["--corpus=sotuu", "--out=new"], "did you mean 'sotu'?"),
    (["--out=new"], "corpus: expected a value"),
    (["--corpus=sotu"], "out: expected a value"),
    (["--corpus=stdlib", "--out=."], "out: expected a new or empty folder"),
    (["--corpus=sotu", "--out=new", "--workers=-1"], "workers: expected at least 0, got -1"),
    (["--corpus=sotu", "--out=new", "--part_mb=0"], "part_mb: expected at least 1, got 0"),
    (["--corpus=sotu", "--out=new", "--tokenizer_from=."], "tokenizer: expected tokenizer.json in"),
    (["--out=new", "--verify"], "corpus: expected token files in 'new', got none"),
    (["--corpus=path:.", "--out=new", "--rows"], "rows: expected a corpus hf:NAME with it, got 'path:.'"),
    (["--corpus=hf:a/b", "--out=new", "--split=hash"], "data.split: expected 'auto' for 'hf:a/b'"),
])
def test_mistakes_are_one_sentence(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").touch()
    told = call("tokenize", *flags)
    assert told.code == 2 and told.err.count("\n") == 1 and sentence in told.err, told
    assert not (tmp_path / "new").exists()
