"""What the real Weights & Biases and MLflow have kept of a run; nothing leaves this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from meta_attention_jax.config import config_to_dict, flat
from meta_attention_jax.training import loop, trackers
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from tests.test_trackers import CONFIG, events, light, two_sittings

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
    with pytest.warns(UserWarning, match="wandb is left out .* no account; run 'wandb login' or set WANDB_MODE"):
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
