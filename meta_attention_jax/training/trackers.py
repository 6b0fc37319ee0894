"""Where a run is shown: TensorBoard, Weights & Biases and MLflow behind one small interface.

`metrics.jsonl` is what a run has measured; these are views of it. Each works in a thread of its own, for all runs of
one program: one that is slow keeps nobody waiting, and one that fails is left out from then on, with one warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
import pathlib
import queue
import struct
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar, text

from meta_attention_jax.config import flat
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, Stage, staged, write_whole

PATIENCE = 30.0  # Seconds in which all trackers have to be through, once training has ended.
BEHIND = 1000  # Records that a tracker may be behind.
PROJECT = "meta_attention_jax"


@dataclasses.dataclass(frozen=True)
class Final:
    """What is shown of a run that has come to its end."""

    pictures: Mapping[str, bytes]  # PNG, by name.
    table: Sequence[Mapping[str, Any]]  # Rows of words and numbers, by heading; all of the same columns.


class Tracker(Protocol):
    """One run in one tracker. Made in the tracker's thread with the run's directory (of a run in a bucket, with what
    stands for it on this machine), its plain config, and the step that it goes on from; what went wrong is an exception
    of any kind."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One record."""

    def show(self, step: int, final: Final) -> None:
        """Pictures and table of the end."""

    def close(self, whole: bool) -> None:
        """Keeps what was told; `whole`: the run has come to its end, and was not only interrupted."""


class TensorBoard:
    """Event files in `tensorboard/`. TensorBoard drops what an interrupted run had logged after step `start`."""

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], start: int):
        (run / "tensorboard").mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever.
        # By its own name a file is of a second, and a second sitting in it would write over the first.
        self._writer = EventsWriter(str(run / "tensorboard" / "events"), filename_suffix=f".{time.time_ns()}")
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(start, summary=text("config", f"```\n{json.dumps(config, indent=1)}\n```"))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step, summary=scalar(name, value))
        self._writer.flush()

    def show(self, step: int, final: Final) -> None:
        for name, png in final.pictures.items():
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
            self._add(step, summary=Summary(value=[Summary.Value(tag=f"pictures/{name}", image=image)]))
        heads = list(final.table[0]) if final.table else []
        lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in final.table)]
        self._add(step, summary=text("table", "\n".join(f"| {' | '.join(line)} |" for line in lines)))

    def close(self, whole: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in `wandb/`; its own variables (WANDB_MODE, WANDB_PROJECT, ...) count. Steps are a
    number of the record: those of W&B may not go back, as a resumed run does."""

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], start: int):
        import wandb

        # Asked for here: else `init` asks the terminal, from this thread.
        online = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no account; run 'wandb login' or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", run.name),
            dir=os.environ.get("WANDB_DIR", str(run)), config=dict(config), reinit="create_new",
            id=_kept(run, "wandb") or _keep(run, "wandb", uuid.uuid4().hex), resume="allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def show(self, step: int, final: Final) -> None:
        import wandb
        from PIL import Image

        shown: dict[str, Any] = {
            f"pictures/{name}": wandb.Image(Image.open(io.BytesIO(png))) for name, png in final.pictures.items()
        }
        heads = list(final.table[0]) if final.table else []
        shown["table"] = wandb.Table(columns=heads, data=[[row[head] for head in heads] for row in final.table])
        self._run.log({**shown, "step": step})

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class MLflow:
    """A run of MLflow: where MLFLOW_TRACKING_URI says, in the experiment MLFLOW_EXPERIMENT_NAME; without it in
    `mlflow/mlflow.db`, an SQLite file of the run's own."""

    LIMIT = 100  # Parameters that one request may have; of metrics 1,000.

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], start: int):
        import mlflow
        from mlflow.entities import Param
        from mlflow.utils.file_utils import path_to_local_sqlite_uri

        for chatty in ("mlflow.store.db.utils", "urllib3.connectionpool"):  # Of new tables, and of every retry.
            logging.getLogger(chatty).setLevel(logging.ERROR)
        place = uri = None
        if not mlflow.is_tracking_uri_set():
            (run / "mlflow").mkdir(exist_ok=True)
            uri = path_to_local_sqlite_uri(str(run / "mlflow" / "mlflow.db"))
            place = (run / "mlflow" / "artifacts").as_uri()
        self._client = mlflow.MlflowClient(uri)
        self._id = _kept(run, "mlflow")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(self._experiment(place), run_name=run.name)
        self._id = _keep(run, "mlflow", made.info.run_id)
        params = [Param(name, str(value)) for name, value in flat(config)]
        for i in range(0, len(params), self.LIMIT):
            self._client.log_batch(self._id, params=params[i : i + self.LIMIT])
        self._client.log_dict(self._id, dict(config), "config.json")

    def _experiment(self, place: Optional[str]) -> str:
        from mlflow import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return self._client.create_experiment(name, artifact_location=place)
            except MlflowException:  # Another process has made it meanwhile.
                if (found := self._client.get_experiment_by_name(name)) is None:
                    raise
        return found.experiment_id

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
        for i in range(0, len(metrics), 10 * self.LIMIT):
            self._client.log_batch(self._id, metrics=metrics[i : i + 10 * self.LIMIT])

    def show(self, step: int, final: Final) -> None:
        from PIL import Image

        for name, png in final.pictures.items():
            self._client.log_image(self._id, Image.open(io.BytesIO(png)), artifact_file=f"pictures/{name}.png")
        heads = list(final.table[0]) if final.table else []
        columns = {head: [row[head] for row in final.table] for head in heads}
        self._client.log_table(self._id, columns, "table.json")

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if whole else "KILLED")


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def _kept(run: pathlib.Path, name: str) -> Optional[str]:
    """The id that the run has in a tracker, if it has been there before."""
    path = run / f"{name}.id"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _keep(run: pathlib.Path, name: str, identity: str) -> str:
    write_whole(run / f"{name}.id", identity + "\n")
    return identity


def check(names: Sequence[str]) -> None:
    """Checks `train.trackers`: known, each once, and installed."""
    expect(len(set(names)) == len(names), "train.trackers", "each tracker once", tuple(names))
    for name in names:
        expect(name in TRACKERS, "train.trackers", f"some of {tuple(TRACKERS)}", name)
        if name != "tensorboard":
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # Without an origin it is a mere folder, such as they leave.
                raise ValueError(f"train.trackers: expected the extra {name} (pip install {name}) for {name!r}, "
                                 "got none installed.")


def check_in_bucket(names: Sequence[str]) -> None:
    """Checks `train.trackers` of a run in a bucket: no database can be there."""
    if "mlflow" in names:
        import mlflow

        expect(mlflow.is_tracking_uri_set(), "train.trackers", "MLFLOW_TRACKING_URI for 'mlflow' in a bucket", "none")


class _Thread:
    """One tracker at work."""

    def __init__(self, name: str):
        self.name = name
        self._calls: queue.Queue[Any] = queue.Queue(BEHIND)
        self._failure: Optional[str] = None
        self._told = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        runs: dict[Place, Tracker] = {}
        try:
            while (call := self._calls.get()) is not None:
                run, method, arguments = call
                if method == "open":
                    runs[run] = TRACKERS[self.name](*arguments)
                else:
                    getattr(runs[run], method)(*arguments)
        except BaseException as error:  # Of any kind, and some call sys.exit.
            self._fail(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why

    def call(self, call: Any) -> None:
        """Never waits. None is the last one."""
        if self._failure is None:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._fail(f"it is {BEHIND} records behind")
        self._warn()

    def end(self, until: float) -> None:
        """Waits until it is through, but not beyond this time."""
        if self._failure is None:
            self._thread.join(max(until - time.monotonic(), 0.0))
            if self._thread.is_alive():
                self._fail(f"it is not through after {PATIENCE:g} seconds")
        self._warn()

    def _warn(self) -> None:
        """In the caller's thread, not in its own: what becomes of warnings is the caller's."""
        if self._failure is not None and not self._told:
            self._told = True
            why = self._failure.rstrip(". ")
            warnings.warn(f"train.trackers: {self.name} is left out from here on, {why}.", stacklevel=4)


class Trackers:
    """The trackers of the runs of one program."""

    def __init__(self, names: Sequence[str]):
        self._threads = [_Thread(name) for name in names]
        self._whole: dict[Place, bool] = {}
        self._stages: dict[Place, Stage] = {}
        self._stack = contextlib.ExitStack()

    def _call(self, run: Place, method: str, *arguments: Any) -> None:
        for thread in self._threads:
            thread.call((run, method, arguments))

    def open(self, run: Place, config: Mapping[str, Any], start: int) -> None:
        """A run goes on from step `start`, or begins."""
        self._whole[run] = False
        if self._threads:
            ids = {f"{name}.id" for name in TRACKERS}
            self._stages[run] = self._stack.enter_context(staged(run, ids.__contains__))
            self._call(run, "open", self._stages[run].folder, config, start)

    def keep(self, run: Place) -> None:
        """Brings what trackers have written of a run into its bucket, if it is in one; a failure is but a warning."""
        try:
            if run in self._stages:
                self._stages[run].push()
        except Exception as error:  # Of any kind; and what is being written may be gone.
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('. ')}"
            warnings.warn(f"train.trackers: {str(run)!r} has not all of their files, {why}.", stacklevel=2)

    def write(self, run: Place, step: int, scalars: Mapping[str, float]) -> None:
        """One record of a run, if it was opened."""
        if run in self._whole:
            self._call(run, "write", step, scalars)

    def finish(self, run: Place, step: int, final: Optional[Callable[[Place], Final]]) -> None:
        """A run has come to its end; `final` makes of its directory what is shown of it."""
        self._whole[run] = True
        if self._threads and final is not None:
            self._call(run, "show", step, final(run))

    def end(self) -> None:
        for run, whole in self._whole.items():
            self._call(run, "close", whole)
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.call(None)
        for thread in self._threads:
            thread.end(until)
        for run in self._stages:
            self.keep(run)
        self._stack.close()


@contextlib.contextmanager
def opened(names: Sequence[str]) -> Iterator[Trackers]:
    """The trackers of these names. At the end of the block they may take `PATIENCE` seconds to get through; what is
    not to wait for them belongs inside."""
    trackers = Trackers(names)
    try:
        yield trackers
    finally:
        trackers.end()
