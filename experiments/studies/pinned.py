"""What all runs of a comparison share, written once and checked ever after. No flags."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Optional

from meta_attention_jax.config import completed, config_difference, may_change, read_stored
from meta_attention_jax.data.manifest import check_manifest, digest
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, in_bucket, partial, run_directory, write_whole


@dataclasses.dataclass(frozen=True)
class Data:
    """What runs of a comparison read."""

    dataset: Dataset
    runs: Iterable[Place]  # Their directories, of those that are not there yet too.

    def check(self) -> None:
        """Raises ValueError if one of the runs has read other data."""
        for path in self.runs:
            check_manifest(self.dataset, path)


DATA = "data_digests.json"
"""Beside a pinned file: the digest of the data of every run, by name."""


def pin(
    path: Place, shared: Mapping[str, Any], what: str, grows: Collection[str] = (),
    data: Optional[Mapping[str, Data]] = None,
) -> None:
    """Writes what all runs below the folder of `path` share, or checks that it is the same.

    Created whole or not at all, so that processes that start at the same moment agree on one. Fields
    of "config" that a run may set anew differ as they like, and stay as they were; the dicts at `grows` may
    gain entries, but lose and change none; the data of the runs, by name in `DATA`, may move and gain names,
    but have to stay the same. `what` it is, for the error.
    """
    run_directory("workdir", path.parent)
    mine = json.loads(json.dumps(shared))
    if not path.exists():
        others = [entry for entry in path.parent.glob("*") if not entry.name.startswith(f".{path.name}")]
        free = not others or path.exists()
        expect(free, "workdir", f"a new directory or one of {what}", str(path.parent))
        _create(path, json.dumps(mine, indent=1) + "\n")
    stored = read_stored(path)
    if any(isinstance(value, dict) and not isinstance(stored.get(key), dict) for key, value in mine.items()):
        raise ValueError(f"workdir: expected {what} in {str(path)!r}, got something else.")
    known, compared = dict(stored), dict(mine)
    for plain in (known, compared):  # Of versions with fewer fields.
        if isinstance(plain.get("config"), dict):
            plain["config"] = completed(plain["config"])
    for name in grows:
        compared[name] = {k: v for k, v in mine[name].items() if k in stored[name]}
        if lost := stored[name].keys() - mine[name].keys():
            raise ValueError(f"{name}: expected {min(lost)!r} still, as in {str(path)!r}, got none.")
    for field, old, new in config_difference(known, compared):
        free = field.startswith("config.") and may_change(field.removeprefix("config."), old, new)
        expect(free, field, f"{old!r}, as in {str(path)!r}", new)
    if data:
        _pin_data(path.with_name(DATA), data)
    if any(mine[name].keys() != stored[name].keys() for name in grows):
        write_whole(path, json.dumps({**stored, **{name: mine[name] for name in grows}}, indent=1) + "\n")


def _pin_data(path: Place, data: Mapping[str, Data]) -> None:
    datasets = {id(one.dataset): one.dataset for one in data.values()}
    digests = {key: digest(dataset.manifest()) for key, dataset in datasets.items()}
    given = {name: digests[id(one.dataset)] for name, one in data.items()}
    if not path.exists():
        for one in data.values():  # Of a version that did not write it: what is trained says more.
            one.check()
        _create(path, json.dumps(given, indent=1) + "\n")
    stored = read_stored(path, "digests of data")
    for name, found in given.items():
        if stored.get(name, found) != found:
            data[name].check()  # Knows in what they differ.
            begun = f"the data that {str(path.parent)!r} was begun with"
            raise ValueError(f"data: expected {begun}, got other data; use another workdir.")
    if given.keys() - stored.keys():
        write_whole(path, json.dumps({**stored, **given}, indent=1) + "\n")


def _create(path: Place, text: str) -> None:
    """Writes a file whole, unless it is there already or another process is first; in a bucket the last one is it."""
    if in_bucket(path):
        write_whole(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = partial(path)
    written.write_text(text, encoding="utf-8")
    try:
        os.link(written, path)
    except FileExistsError:
        pass
    except OSError:  # A file system without hard links: two processes at the same moment may differ.
        if not path.exists():
            os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
