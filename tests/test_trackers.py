"""What a run tells its trackers: all of it to each, whatever becomes of the others; and never in their time."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import sys
import threading

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from configs import smoke
from experiments.studies import final
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
        with pytest.warns(UserWarning, match=f"stuck is left out from here on, {why}.") as said:
            with opened(("stuck",)) as all:
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
