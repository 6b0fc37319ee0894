"""A run that is ready to start: its config and data checked, its directory made.

A run directory holds `config.json`, `data_manifest.json`, the tokenizer, `metrics.jsonl`, `checkpoints/`, `costs.json`
when costs are measured, and what its trackers write: `tensorboard/`, `wandb/`, `mlflow/`, and by `wandb.id` and
`mlflow.id` which run it is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Optional

import jax
from ml_collections import ConfigDict

from meta_attention_jax import files
from meta_attention_jax.config import config_difference, config_to_dict, may_change, read_config
from meta_attention_jax.data.manifest import MANIFEST, check_manifest, write_manifest
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.fields import expect
from meta_attention_jax.training import backbone, build, processes, trackers
from meta_attention_jax.training.checkpoint import newest
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.restore import initial_params
from meta_attention_jax.training.step import Hypers, StepSpec


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to start: checked, and with its directory made. `initial`: parameters to start from, of
    `train.init_from`, on the host, in the place of those that are drawn. `frozen`: those of a published model, which
    are not trained."""

    config: ConfigDict
    path: files.Place
    dataset: Dataset
    parallel: Parallel
    spec: StepSpec
    hypers: Hypers
    initial: Optional[Any] = None
    frozen: Optional[Any] = None


def open_workdir(workdir: str | os.PathLike[str], config: ConfigDict) -> files.Place:
    """Makes or checks the run directory; writes `config.json` when it is new."""
    path = files.run_directory("workdir", workdir)
    stored_at = path / "config.json"
    given = config_to_dict(config)
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir: expected a directory, got the file {str(workdir)!r}.")
    if stored_at.exists():
        stored = read_config(stored_at)
        for field, old, new in config_difference(stored, given):
            of_data = field.startswith("data.") and not (path / MANIFEST).is_file()
            if of_data or not may_change(field, old, new):
                raise ValueError(
                    f"{field}: expected {old!r}, as in {str(workdir)}/config.json, got {new!r}; "
                    "use another workdir or the same config."
                )
        return path
    left = ("config.tmp",)  # Of a process that was killed while it wrote the very first file.
    held = [p for p in path.iterdir() if p != path] if path.exists() else ()  # A bucket's console makes itself a file.
    if any(not files.is_partial(p, "config.json") and p.name not in left for p in held):
        raise ValueError(
            f"workdir: expected a new or empty directory or a run, got {str(workdir)!r}, which holds other files."
        )
    files.write_whole(stored_at, json.dumps(given, indent=2) + "\n")
    return path


def prepare(config: ConfigDict, workdir: str | os.PathLike[str], dataset: Optional[Dataset] = None) -> Job:
    """Checks the config, the data and the directory, in this order; only then writes anything. Of several processes the
    first is ahead of the others in each part, and what is wrong in one is said by all. `dataset`: of another run with
    the same data; None opens it."""
    workdir = files.run_directory("workdir", workdir)
    if files.in_bucket(workdir):
        one = not processes.several() or str(workdir).startswith("gs://")
        expect(one, "workdir", "gs:// or a shared folder for several processes", str(workdir))
        trackers.check_in_bucket(config.train.trackers)
    processes.check_same("config", json.dumps(config_to_dict(config), sort_keys=True))
    parallel, dataset, spec = processes.in_turn(lambda: _built(config, workdir, dataset))
    # Here they go together: reading a checkpoint and measuring, processes wait for each other.
    frozen = processes.together(lambda: backbone.load(config))
    initial = processes.together(lambda: _initial(config, workdir, spec, dataset, frozen))
    path = processes.in_turn(lambda: _opened(workdir, config))
    # Once trained upon, measured costs may only be read.
    trained = (path / "checkpoints").exists()
    hypers = processes.together(lambda: build.build_hypers(config, path, measure=not trained))
    processes.in_turn(lambda: _describe_data(dataset, path))
    processes.in_turn(lambda: backbone.keep(config, path))
    return Job(config, path, dataset, parallel, spec, hypers, initial, frozen)


def _built(
    config: ConfigDict, workdir: str | os.PathLike[str], dataset: Optional[Dataset]
) -> tuple[Parallel, Dataset, StepSpec]:
    build.check(config)
    parallel = build.build_parallel(config)
    rows = parallel.rows(config.data.batch_size)
    dataset = dataset or build.build_dataset(config, workdir, rows)
    dataset.check_training()
    check_manifest(dataset, workdir)
    workdir = files.at(workdir)
    if config.retrofit.backbone and (workdir / backbone.FILE).is_file():
        backbone.check_same(backbone.identity(config), backbone.stored(workdir))
    return parallel, dataset, build.build_spec(config, dataset)


def _initial(
    config: ConfigDict, workdir: str | os.PathLike[str], spec: StepSpec, dataset: Dataset, frozen: Optional[Any]
) -> Optional[Any]:
    # The folder alone says nothing: a run killed before its first save has one too.
    if not config.train.init_from or newest(files.at(workdir) / "checkpoints"):
        return None
    source = files.run_directory("train.init_from", config.train.init_from)
    if frozen is not None and (source / "config.json").is_file():
        backbone.check_same(backbone.identity(config), backbone.stored(source))
    model = spec.model.clone(shard_axis=None)
    return jax.device_get(initial_params(config.train.init_from, model, dataset.tokenizer, frozen))


def _opened(workdir: str | os.PathLike[str], config: ConfigDict) -> files.Place:
    if not processes.leads() and not (files.at(workdir) / "config.json").exists():
        raise ValueError(
            f"workdir: expected a directory that all processes see, got {str(workdir)!r}, which process "
            f"{jax.process_index()} does not."
        )
    return open_workdir(workdir, config)


def _describe_data(dataset: Dataset, path: files.Place) -> None:
    check_manifest(dataset, path)  # Before anything is written over.
    if processes.leads():
        dataset.tokenizer.save(path)
    write_manifest(dataset, path)
