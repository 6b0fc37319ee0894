"""Measured costs, frozen: one `costs.json` in a run directory, written once and read ever after."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from meta_attention_jax.cost import CostSetting, MeasuredCosts, measure_costs
from meta_attention_jax.fields import expect
from meta_attention_jax.files import at, write_whole

FILE = "costs.json"


def freeze_costs(directory: str | os.PathLike[str], setting: CostSetting, *, batch: int) -> np.ndarray:
    """c of the run in `directory`, for this setting: as frozen there, else measured now, `batch` sequences a call, and
    frozen. Of several processes, which must call together, the first one does it and the others get its numbers."""
    if jax.process_count() == 1:
        return _freeze(directory, setting, batch)
    costs, failure = np.full(len(setting.mechanisms), np.nan, np.float32), None
    if jax.process_index() == 0:
        try:
            costs = _freeze(directory, setting, batch)
        except Exception as error:  # The others are waiting: they must hear of it.
            failure = error
    costs = np.asarray(multihost_utils.broadcast_one_to_all(costs), np.float32)
    if failure is not None:
        raise failure
    if np.isnan(costs).any():
        raise ValueError(f"{FILE}: expected the costs of process 0, got its error.")
    return costs


def read_costs(directory: str | os.PathLike[str], setting: CostSetting) -> np.ndarray:
    """c as frozen in `directory`; never measures, never writes."""
    path = at(directory) / FILE
    if not path.exists():
        raise ValueError(f"{FILE}: expected the run's measured costs in {str(path)!r}, got none.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # Files from before the field hold for the runs that froze them.
        stored["setting"].setdefault("segments", setting.segments)
        record = _from_json(stored)
        costs = record.costs
        sound = bool(np.all(np.isfinite(record.seconds) & (costs > 0)))
        sound &= stored["costs"] == _named(record, costs)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        sound = False
    if not sound:
        raise ValueError(f"{FILE}: expected measured costs in {str(path)!r}, got something else.")
    for field in dataclasses.fields(CostSetting):
        wanted, got = getattr(setting, field.name), getattr(record.setting, field.name)
        expect(wanted == got, FILE, f"costs for {field.name} {wanted!r}, as in the config, in {str(path)!r}", got)
    return costs


def _freeze(directory: str | os.PathLike[str], setting: CostSetting, batch: int) -> np.ndarray:
    path = at(directory) / FILE
    if path.exists():
        return read_costs(directory, setting)
    record = measure_costs(setting, batch=batch)
    write_whole(path, json.dumps(_to_json(record), indent=2) + "\n")
    return record.costs


def _named(record: MeasuredCosts, values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(record.setting.mechanisms, values)}


def _to_json(record: MeasuredCosts) -> dict[str, Any]:
    named = {"costs": _named(record, record.costs), "seconds": _named(record, record.seconds)}
    return {**named, **{name: value for name, value in dataclasses.asdict(record).items() if name not in named}}


def _from_json(stored: dict[str, Any]) -> MeasuredCosts:
    setting = dict(stored["setting"])
    mechanisms = tuple(setting.pop("mechanisms"))
    return MeasuredCosts(
        setting=CostSetting(mechanisms=mechanisms, **setting), batch=stored["batch"],
        seconds=tuple(stored["seconds"][name] for name in mechanisms), device=stored["device"],
        versions=stored["versions"],
    )
