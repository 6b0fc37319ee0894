"""Where files are and how they are written: addresses, devices, links, other processes, odd names."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import jax.numpy as jnp
import pytest

from configs import smoke
from experiments import common
from experiments.benchmarks.common import write_json as write_benchmark
from experiments.studies import pinned, quick
from meta_attention_jax import analysis, load_run
from meta_attention_jax.config import config_to_dict
from meta_attention_jax.data.corpora import load_corpus
from meta_attention_jax.files import local, run_directory, write_whole
from meta_attention_jax.training import processes
from meta_attention_jax.training.checkpoint import Checkpoints
from meta_attention_jax.training.job import open_workdir, prepare
from meta_attention_jax.training.restore import read_run
from tests.test_commands import ROOT, check_mistake, command  # noqa: F401


@pytest.mark.parametrize("given, found", [
    ("~/x", "{home}/x"),
    ("~", "{home}"),
    ("file:///a/b", "/a/b"),
    ("file://localhost/a/b%20c", "/a/b c"),
    ("file:/a/b", "/a/b"),
    (pathlib.Path("~/x"), "{home}/x"),
    ("a~b", "{here}/a~b"),
    ("x y#?%20", "{here}/x y#?%20"),
    ("/a/c:d", "/a/c:d"),
])
def test_home_and_file_are_understood(given, found, monkeypatch):
    monkeypatch.setenv("HOME", "/some/where")
    assert str(local("workdir", given)) == found.format(home="/some/where", here=os.getcwd())


@pytest.mark.parametrize("given", [
    "az://bucket/x", "HDFS://a", "hdfs://a/b", "https://a.b/c", "file://host/x",
    "file://x", "~nobody-of-this-name/x", "a\0b", pathlib.Path("hdfs://bucket/x"),
])
def test_other_places_are_refused_in_one_sentence(given):
    for where in (local, run_directory):
        with pytest.raises(ValueError, match="^out: expected [^\n]*, got") as error:
            where("out", given)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["caf\udce9", "a\\b"])
def test_names_that_checkpoints_could_not_be_kept_under_are_refused_first(tmp_path, name):
    path = tmp_path / name
    assert local("json", path) == path
    for call in (
        lambda: prepare(smoke.get_config(), path),
        lambda: load_run(path),
        lambda: pinned.pin(path / "sweep.json", {"config": {}}, "this sweep"),
    ):
        with pytest.raises(ValueError, match="workdir: expected a path [^\n]*, got"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    ("train", "--config=configs/smoke.py", "--workdir=hdfs://bucket/x"),
    ("train", "--config=configs/smoke.py", "--workdir=az://bucket/x"),
    ("train", "--config=configs/smoke.py", "--workdir=new", "--config.train.init_from=hdfs://bucket/x"),
    ("evaluate", "--workdir=https://bucket/x"),
    ("evaluate", "--workdir=x", "--json=hdfs://bucket/x.json"),
    ("generate", "--workdir=hdfs://b", "--prompt=a"),
    ("report", "--workdir=x", "--out=https://a.b/c"),
    ("sweep", "--config=configs/sweep_concentration.py", "--workdir=hdfs://b"),
    ("benchmarks.mechanisms", "--json=gs://b/x.json"),
])
def test_no_command_takes_an_address_for_a_folder(command, flags, monkeypatch):  # noqa: F811
    before = set(os.listdir(ROOT))
    check_mistake(command(*flags), "expected a path of this machine")
    assert set(os.listdir(ROOT)) == before


def test_a_corpus_is_found_in_a_home_and_at_no_address(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("~/a.txt", f"file://{tmp_path}/a.txt"):
        assert load_corpus(f"path:{place}").splits["train"]
    with pytest.raises(ValueError, match="data.corpus: expected a path of this machine"):
        load_corpus("path:s3://bucket/a.txt")


def test_library_calls_say_the_same():
    for call in (lambda: load_run("hdfs://bucket/x"), lambda: prepare(smoke.get_config(), "az://b/x")):
        with pytest.raises(ValueError, match="workdir: expected a path of this machine"):
            call()


WRITERS = {
    "text": lambda path: analysis.write_text(path, "words"),
    "json": lambda path: analysis.write_json(path, {"a": 1}),
    "benchmark": lambda path: write_benchmark(path, [{"a": 1}]),
    "picture": lambda path: analysis.save(analysis.canvas.new_figure(1, 1), path, dpi=20),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_is_written_through_and_a_link_to_its_target(name, tmp_path):
    write = WRITERS[name]
    suffix = ".png" if name == "picture" else ".json"
    fifo = tmp_path / f"fifo{suffix}"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write(fifo)
    reader.join(10)
    assert read[0] and fifo.is_fifo()

    target, link = tmp_path / "deep" / f"target{suffix}", tmp_path / f"link{suffix}"
    link.symlink_to(target)
    write(link)  # The target is not there yet.
    assert link.is_symlink() and target.stat().st_size
    target.write_bytes(b"old")
    target.chmod(0o640)
    write(link)
    assert link.is_symlink() and target.read_bytes() == link.read_bytes() != b"old"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("place", ["pipe", "file"])
def test_standard_output_by_its_name_keeps_what_was_printed(place, tmp_path):
    script = ("import sys; from meta_attention_jax.files import write_whole; print('before', flush=True);"
              "write_whole('/dev/stdout', 'words\\n'); print('after')")
    out = tmp_path / "out"
    with open(out, "wb") as file:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True,
                              stdout=subprocess.PIPE if place == "pipe" else file)
    said = done.stdout if place == "pipe" else out.read_bytes()
    assert said == b"before\nwords\nafter\n"
    assert pathlib.Path("/dev/stdout").is_symlink()


def test_a_device_folder_has_ordinary_files(tmp_path):
    """A regular file is replaced wherever it lies; one that somebody holds open is written into."""
    folder = pathlib.Path("/dev/shm")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for words in ("first", "second"):
            write_whole(f"{root}/words", words)
        assert [path.name for path in pathlib.Path(root).iterdir()] == ["words"]
        assert pathlib.Path(root, "words").read_text() == "second"
    out = tmp_path / "out"
    with open(out, "wb") as file:
        write_whole(f"/dev/fd/{file.fileno()}", "words")
        assert os.path.samestat(out.stat(), os.fstat(file.fileno())) and out.read_text() == "words"


def test_standard_output_by_the_name_of_its_file_keeps_what_was_printed(tmp_path):
    script = ("import sys; from meta_attention_jax.files import write_whole; print('before');"
              "write_whole(sys.argv[1], 'words\\n'); print('after')")
    out = tmp_path / "out"
    with open(out, "wb") as file:
        subprocess.run([sys.executable, "-c", script, out], cwd=ROOT, check=True, stdout=file)
    assert out.read_bytes() == b"before\nwords\nafter\n"


def failing(number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_modes_takes_a_file(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "chmod", failing(number))
    for words in ("first", "second"):
        write_whole(tmp_path / "x", words)
    assert (tmp_path / "x").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path, monkeypatch, number):
    (tmp_path / "x").write_text("before, and longer")
    monkeypatch.setattr(os, "replace", failing(number))
    write_whole(tmp_path / "x", "words")
    assert (tmp_path / "x").read_text() == "words" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        write_whole(tmp_path / "new", "words")
    assert not (tmp_path / "new").exists()


def test_a_file_in_a_folder_that_takes_none_is_written_in_place(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("before, and longer")
    write, access = pathlib.Path.write_bytes, os.access

    def no_new(self, data):
        if not self.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return write(self, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", no_new)
    monkeypatch.setattr(os, "access", lambda path, mode: not os.path.isdir(path) and access(path, mode))
    common.check_output("json", tmp_path / "x")
    write_whole(tmp_path / "x", "words")
    assert (tmp_path / "x").read_text() == "words"
    with pytest.raises(ValueError, match="json: expected a file in a folder that can be written"):
        common.check_output("json", tmp_path / "new")


@pytest.mark.parametrize("name", WRITERS)
def test_writers_know_a_home_and_no_address(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    suffix = ".png" if name == "picture" else ".json"
    for place in ("~/a", f"file://{tmp_path}/b", f"FILE://{tmp_path}/c"):
        WRITERS[name](place + suffix)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{x}{suffix}" for x in "abc"]
    with pytest.raises(ValueError, match="path: expected a path of this machine"):
        WRITERS[name](f"hdfs://bucket/x{suffix}")
    assert len(list(tmp_path.iterdir())) == 3


def test_flags_and_notebooks_know_a_home_and_no_address(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parse = common._PathParser().parse
    for given in ("FILE:///tmp/q.json", "File:/tmp/q.json", "file:///tmp/q.json"):
        assert parse(given) == "/tmp/q.json"
    assert parse("~/q.json") == f"{tmp_path}/q.json" and parse("q.json") == "q.json"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(quick, "load_run", lambda path: path)
    assert quick.quick_run(tmp_path / "new", existing="~/run") == "~/run"
    with pytest.raises(ValueError, match="existing: expected a path of this machine"):
        quick.quick_run(tmp_path / "new", existing="s3://bucket/run")


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    for good in (tmp_path / "new" / "x", tmp_path / "file", tmp_path / "fifo", "/dev/null"):
        common.check_output("json", good)
    (tmp_path / "link").symlink_to(tmp_path / "file" / "x")
    for bad in (tmp_path, tmp_path / "file" / "x", tmp_path / "link"):
        with pytest.raises(ValueError, match="json: expected a file"):
            common.check_output("json", bad)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_comparison_starts_where_there_are_no_hard_links(tmp_path, monkeypatch, number):
    def no_links(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "sweep" / "sweep.json"
    for _ in range(2):
        pinned.pin(path, {"config": {"a": 1}, "points": {"x": {}}}, "this sweep", grows=["points"])
    pinned.pin(path, {"config": {"a": 1}, "points": {"x": {}, "y": {}}}, "this sweep", grows=["points"])
    assert json.loads(path.read_text())["points"].keys() == {"x", "y"}
    with pytest.raises(ValueError, match="config.a: expected 1"):
        pinned.pin(path, {"config": {"a": 2}, "points": {"x": {}, "y": {}}}, "this sweep", ["points"])


@pytest.mark.parametrize("left", ["config.tmp", ".config.json.4711.tmp"])
def test_what_is_left_of_a_killed_first_write_does_not_refuse_the_same_command(tmp_path, left):
    (tmp_path / left).write_text("{")
    path = open_workdir(tmp_path, smoke.get_config())
    assert json.loads((path / "config.json").read_text()) == config_to_dict(smoke.get_config())


def test_a_full_disk_leaves_nothing_of_the_first_file(tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError):
        write_whole(tmp_path / "config.json", "{}")
    assert not list(tmp_path.iterdir())


def saved(directory, step, nll=1.0):
    checkpoints = Checkpoints(directory, keep_latest=1)
    checkpoints.save(step, {"params": {"w": jnp.arange(4.0)}}, config={}, nll=nll)
    checkpoints.close()


def test_several_processes_read_a_run_whatever_its_name(tmp_path, monkeypatch):
    directory = tmp_path / "a#b%20c?d|e" / "checkpoints"
    saved(directory, 3)
    monkeypatch.setattr(processes, "several", lambda: True)
    checkpoints = Checkpoints(directory)
    step, state = checkpoints.restore_newest({"params": {"w": jnp.zeros(4)}})
    checkpoints.close()
    assert step == 3 and state["params"]["w"].tolist() == [0, 1, 2, 3]


# Orbax lets go of files, when one of them has gone, in a loop of its own that has ended by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("step", ["latest", "best"])
def test_a_run_opens_while_it_trains(tmp_path, step):
    """Its trainer writes checkpoints and deletes the ones before all the time."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(smoke.get_config())))
    saved(tmp_path / "checkpoints", 0)
    ended = threading.Event()

    def trains():
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep_latest=1)
        number = 1
        while not ended.is_set():
            state = {"params": {"w": jnp.full(4, float(number))}}
            checkpoints.save(number, state, config={}, nll=1.0 / number)
            number += 1
        checkpoints.close()

    trainer = threading.Thread(target=trains)
    trainer.start()
    try:
        for _ in range(15):
            _, found, steps, params = read_run(tmp_path, step)
            assert found in steps
            assert found == 0 or params["w"].tolist() == [float(found)] * 4
    finally:
        ended.set()
        trainer.join()


def test_a_damaged_checkpoint_is_still_called_damaged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(smoke.get_config())))
    saved(tmp_path / "checkpoints", 3)
    for file in (tmp_path / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a complete checkpoint"):
        read_run(tmp_path, "latest")
