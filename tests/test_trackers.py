"""What a run tells its trackers: all of it to each, whatever becomes of the others; and never in their time."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from configs import smoke
from experiments.studies import final
from meta_attention_jax.config import config_to_dict, flat
from meta_attention_jax.runs import load_run
from meta_attention_jax.sweeps import space as algebra
from meta_attention_jax.sweeps.together import train_together
from meta_attention_jax.training import loop, processes, trackers
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.trackers import Final, opened

CONFIG = {"name": "x", "train": {"steps": 4, "trackers": ["wandb"]}}
LIGHT = {"controller.name": "fixed", "controller.fixed": ("local",), "model.num_layers": 1, "train.steps": 4,
         "train.eval_every": 2, "train.checkpoint_every": 2, "train.log_every": 1, "train.eval_batches": 1,
         "parallel.devices": 1}


def light(*names, **changes):
    config = smoke.get_config()
    config.update_from_flattened_dict({**LIGHT, "train.trackers": names, **changes})
    return config


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "png")
    return buffer.getvalue()


END = Final({"red": png("red"), "blue": png("blue")}, [{"mode": "soft", "nats": 1.5}, {"mode": "hard", "nats": 2.0}])


def two_sittings(names, run):
    """A run that is interrupted after step 3 and goes on from step 2."""
    run.mkdir()
    with opened(names) as told:
        told.open(run, CONFIG, 0)
        for step in (1, 2, 3):
            told.write(run, step, {"train/nll": 4.0 - step, "train/x": float("nan")})
    with opened(names) as told:
        told.open(run, CONFIG, 2)
        for step in (3, 4):
            told.write(run, step, {"train/nll": 4.0 - step})
        told.finish(run, 4, lambda path: END)


def events(run):
    """All events of TensorBoard's files, in order."""
    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # Length, its checksum, the event, its checksum.
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_tensorboard_has_config_numbers_pictures_and_table(tmp_path):
    run = tmp_path / "run"
    two_sittings(("tensorboard",), run)
    found = events(run)
    values = [(event.step, value) for event in found for value in event.summary.value]
    numbers = [(step, value.simple_value) for step, value in values if value.tag == "train/nll"]
    assert numbers == [(1, 3.0), (2, 2.0), (3, 1.0), (3, 1.0), (4, 0.0)]
    starts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert starts == [1, 3], "what was logged from there on is dropped"
    said = {value.tag: value for _, value in values}
    assert '"steps": 4' in said["config/text_summary"].tensor.string_val[0].decode()
    assert "| hard | 2.0 |" in said["table/text_summary"].tensor.string_val[0].decode()
    image = said["pictures/red"].image
    assert (image.width, image.height, image.encoded_image_string) == (3, 2, png("red"))


class Fake:
    """Notes what it is told."""

    told: list = []

    def __init__(self, run, config, start):
        self.run = run.name
        self.note("open", start)

    def note(self, *words):
        self.told.append((self.run, *words))

    def write(self, step, scalars):
        self.note("write", step, *sorted({name.partition("/")[0] for name in scalars}))

    def show(self, step, final):
        self.note("show", step, *final.pictures)

    def close(self, whole):
        self.note("close", whole)


@pytest.fixture
def fakes(monkeypatch):
    """Adds classes of trackers; yields their making: (name, what to raise in which method) -> notes."""
    def make(name, **broken):
        def failing(error):
            def method(self, *arguments):
                raise error
            return method

        methods = {method: failing(error) for method, error in broken.items()}
        kind = type(name, (Fake,), {"told": [], **methods})
        monkeypatch.setitem(trackers.TRACKERS, name, kind)
        return kind.told

    monkeypatch.setattr(trackers, "check", lambda names: None)
    return make


@pytest.mark.parametrize("method", ["__init__", "write", "show", "close"])
def test_a_tracker_that_fails_warns_once_and_the_others_go_on(fakes, tmp_path, method):
    fine = fakes("fine")
    fakes("broken", **{method: SystemExit("no\nroom.")})  # Not even an Exception.
    with pytest.warns(UserWarning) as said, opened(("broken", "fine")) as told:
        for name in "ab":
            told.open(tmp_path / name, CONFIG, 0)
            for step in (1, 2):
                told.write(tmp_path / name, step, {"train/nll": 1.0})
            told.finish(tmp_path / name, 2, lambda path: END)
    assert [str(one.message) for one in said] == [
        "train.trackers: broken is left out from here on, SystemExit: no."
    ]
    one = [("open", 0), ("write", 1, "train"), ("write", 2, "train"), ("show", 2, "red", "blue")]
    assert fine == [(name, *words) for name in "ab" for words in one] + [(name, "close", True) for name in "ab"]


@pytest.mark.parametrize(
    "patience, behind, why",
    [(0.05, 1000, "it is not through after 0.05 seconds"), (60.0, 2, "it is 2 records behind")],
)
def test_a_tracker_that_never_answers_is_not_waited_for(fakes, monkeypatch, tmp_path, patience, behind, why):
    monkeypatch.setattr(trackers, "PATIENCE", patience)
    monkeypatch.setattr(trackers, "BEHIND", behind)
    answer, told = threading.Event(), fakes("stuck")
    monkeypatch.setattr(trackers.TRACKERS["stuck"], "write", lambda self, *_: answer.wait())
    try:
        with pytest.warns(UserWarning, match=f"stuck is left out from here on, {why}.") as said, opened(("stuck",)) as all:
            all.open(tmp_path, CONFIG, 0)
            for step in range(9):
                all.write(tmp_path, step, {"train/nll": 1.0})
        assert len(said) == 1 and not answer.is_set() and len(told) <= 1
    finally:
        answer.set()


def test_training_tells_all_that_is_logged_and_goes_on_where_it_was(fakes, monkeypatch, tmp_path):
    run, told = tmp_path / "run", fakes("fine")
    loop.train(prepare(light("fine"), run), progress=False, stop_after=2)
    first = [("open", 0), ("write", 0, "start"), ("write", 1, "train"), ("write", 2, "train"), ("write", 2, "eval")]
    assert told == [("run", *words) for words in (*first, ("close", False))]
    told.clear()
    loop.train(prepare(light("fine"), run), progress=False, final=final.of_run)
    then = [("open", 2), ("write", 2), ("write", 3, "train"), ("write", 4, "train"), ("write", 4, "eval"),
            ("show", 4, "training", "layers"), ("close", True)]
    assert told == [("run", *words) for words in then]
    told.clear()
    loop.train(prepare(light("fine"), run), progress=False, final=final.of_run)
    assert not told, "a finished run has nothing to tell"
    rows = final.of_run(run).table
    assert [row["mode"] for row in rows] == ["soft", "hard"] and rows[0]["nats"] == read_metrics(run)[-2]["soft"]["nll"]
    monkeypatch.setattr(processes, "leads", lambda: False)
    assert loop.trackers_of(light("fine")) == ()
    monkeypatch.undo()
    assert load_run(run).step == 4, "here there is no tracker of that name"


def test_points_of_one_program_are_runs_of_their_own_and_one_that_diverges_ends_badly(fakes, tmp_path):
    told = fakes("fine")
    rates = algebra.sweep("optimizer.learning_rate", (0.01, 1e38))
    config = light("fine", **{"optimizer.clip": 0.0, "optimizer.warmup": 0.0})
    jobs = [prepare(algebra.configured(config, point), tmp_path / str(i)) for i, point in enumerate(rates)]
    failures = train_together(jobs, label="x", names=["0", "1"], progress=False, final=lambda path: END)
    assert failures[0] is None and "NaN" in failures[1]
    assert [words for words in told if words[1] == "show"] == [("0", "show", 4, "red", "blue")]
    assert [words for words in told if words[1] == "close"] == [("0", "close", True), ("1", "close", False)]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_full_disk_costs_tensorboard_alone(monkeypatch, tmp_path):
    class Disk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 5000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def open_on_it(path, *arguments, **named):
        return Disk(path, "w") if "tfevents" in str(path) else before(path, *arguments, **named)

    before = open
    monkeypatch.setattr("builtins.open", open_on_it)
    with pytest.warns(UserWarning, match="tensorboard is left out from here on, OSError: .*No space left"):
        with opened(("tensorboard",)) as told:
            told.open(tmp_path, CONFIG, 0)
            for step in range(500):
                told.write(tmp_path, step, {"nll": 1.0})


@pytest.mark.parametrize(
    "names, sentence",
    [
        (("wnadb",), r"train.trackers: expected some of \('tensorboard', 'wandb', 'mlflow'\), got 'wnadb'"),
        (("tensorboard",) * 2, "train.trackers: expected each tracker once, got"),
        (("wandb",), r"train.trackers: expected the extra wandb \(pip install wandb\) for 'wandb', got none"),
        ("wandb", "train.trackers: expected names such as"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(monkeypatch, tmp_path, names, sentence):
    found = importlib.util.find_spec
    (tmp_path / "wandb").mkdir()  # As W&B leaves it: no package.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) if name == "wandb" else object())
    config = light()
    with config.ignore_type(), pytest.raises(ValueError, match=sentence) as error:
        config.train.trackers = names
        prepare(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# -- the real ones

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No account, no network."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def wandb_records(file):
    """Records of an offline run: blocks of 32 KiB after a header of 7 bytes, each record in one or several parts of
    checksum, length and kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.mark.wandb
@quiet
def test_wandb_offline_has_config_numbers_pictures_and_table_of_one_run(offline, tmp_path):
    run = tmp_path / "run"
    two_sittings(("wandb",), run)
    sittings = sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(sittings) == 2
    records = [record for path in sittings for record in wandb_records(next(path.glob("*.wandb")))]
    made = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {one.run_id for one in made} == {(run / "wandb.id").read_text().strip()}
    config = {one.key: json.loads(one.value_json) for one in made[-1].config.update}
    assert config["train"] == CONFIG["train"] and made[0].display_name == "run"
    rows = [{"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for record in records if record.WhichOneof("record_type") == "history"]
    numbers = [(int(row["step"]), float(row["train/nll"])) for row in rows if "train/nll" in row]
    assert numbers == [(1, 3.0), (2, 2.0), (3, 1.0), (3, 1.0), (4, 0.0)]
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [1, 0]
    pictures = {path.name.split("_")[0]: Image.open(path) for path in sittings[1].rglob("*.png")}
    assert pictures["red"].getpixel((0, 0)) == (255, 0, 0) and pictures.keys() == {"red", "blue"}
    table = json.loads(next(sittings[1].rglob("*.table.json")).read_text())
    assert (table["columns"], table["data"]) == (["mode", "nats"], [["soft", 1.5], ["hard", 2.0]])


@pytest.mark.wandb
@quiet
def test_wandb_without_an_account_is_said_and_asks_nobody(offline, monkeypatch, tmp_path):
    import wandb

    wandb.teardown()  # It has read its variables once and for all.
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.warns(UserWarning, match="wandb is left out .* no account; run 'wandb login' or set WANDB_MODE=offline."):
        two_sittings(("wandb",), tmp_path / "run")
    wandb.teardown()
    assert not (tmp_path / "run" / "wandb").exists()


def check_mlflow(client, run, status="FINISHED"):
    """What is told by `two_sittings` is there, of one run."""
    identity = (run / "mlflow.id").read_text().strip()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    assert [one.info.run_id for one in client.search_runs([experiment.experiment_id])] == [identity]
    found = client.get_run(identity)
    assert found.info.status == status and found.info.run_name == "run"
    assert found.data.params == {name: str(value) for name, value in flat(CONFIG)}
    numbers = [(one.step, one.value) for one in client.get_metric_history(identity, "train/nll")]
    assert sorted(numbers) == [(1, 3.0), (2, 2.0), (3, 1.0), (3, 1.0), (4, 0.0)]
    assert np.isnan(found.data.metrics["train/x"])
    fetched = pathlib.Path(client.download_artifacts(identity, "", str(run.parent)))
    assert json.loads((fetched / "config.json").read_text()) == CONFIG
    assert Image.open(fetched / "pictures" / "blue.png").getpixel((0, 0)) == (0, 0, 255)
    table = json.loads((fetched / "table.json").read_text())
    assert (table["columns"], table["data"]) == (["mode", "nats"], [["soft", 1.5], ["hard", 2.0]])


@pytest.mark.mlflow
@quiet
def test_mlflow_has_config_numbers_pictures_and_table_of_one_run_in_its_directory(offline, tmp_path):
    import mlflow

    run = tmp_path / "run"
    two_sittings(("mlflow",), run)
    check_mlflow(mlflow.MlflowClient(f"sqlite:///{run}/mlflow/mlflow.db"), run)


@contextlib.contextmanager
def server(folder, port):
    """An MLflow server on loopback, over SQLite, until the end of the block."""
    words = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept"),
             "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log,
                                   start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None and time.monotonic() < until, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 9)  # Its workers too.
        process.wait()


@pytest.mark.slow
@pytest.mark.mlflow
@quiet
def test_mlflow_on_a_server_that_then_goes_away(offline, monkeypatch, tmp_path):
    import mlflow

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with server(tmp_path, port):
        two_sittings(("mlflow",), tmp_path / "run")
        check_mlflow(mlflow.MlflowClient(), tmp_path / "run")
        lost = tmp_path / "lost"
        loop.train(prepare(light("mlflow", "tensorboard"), lost), progress=False, stop_after=2)
    with pytest.warns(UserWarning, match="mlflow is left out") as said:
        last = loop.train(prepare(light("mlflow", "tensorboard"), lost), progress=False)
    assert len(said) == 1 and last["hard"]["nll"] == read_metrics(lost)[-1]["hard"]["nll"]
    assert max(event.step for event in events(lost)) == 4
    with server(tmp_path, port):  # Its own again, at step 2.
        told = mlflow.MlflowClient().get_run((lost / "mlflow.id").read_text().strip())
        params = {name: str(value) for name, value in flat(config_to_dict(light("mlflow", "tensorboard")))}
        assert told.info.status == "KILLED" and told.data.params == params
        assert "train/nll" in told.data.metrics
