"""For test_fuzz.py: a command in this process, as `python -m` runs it, and what it may not do."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import os
import pathlib
import re
import runpy
import sys
import threading
from collections.abc import Iterator, Sequence

import grain  # noqa: F401  Its flags are defined on import alone, and calls put flags back.
from absl import flags

from experiments import common
from experiments.studies import reports, sweeps
from meta_attention_jax.run import Run
from meta_attention_jax.training import evaluation, loop

SENTENCE = re.compile(r"error: [\w.\-+ ]+: .*\bexpected .*\bgot\b.*[.?]")
"""One line that names a field, what was expected of it and what came."""

WORK = ((loop, "train"), (evaluation, "Evaluator"), (Run, "generate"), (sweeps, "train_points"),
        (reports, "run_page"))
"""Where the work of the commands begins."""


class Accepted(AssertionError):
    """A command has begun to work."""


def _accepted(*args: object, **kwargs: object) -> None:
    raise Accepted


@contextlib.contextmanager
def nothing_works() -> Iterator[None]:
    """Whatever is accepted raises `Accepted` instead of working."""
    kept = [(owner, name, getattr(owner, name)) for owner, name in WORK]
    for owner, name in WORK:
        setattr(owner, name, _accepted)
    hooks = threading.excepthook, sys.unraisablehook
    common.quiet_threads()  # What a damaged run has left may be collected in a later case.
    try:
        yield
    finally:
        gc.collect()
        threading.excepthook, sys.unraisablehook = hooks
        for owner, name, value in kept:
            setattr(owner, name, value)


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """The flags that a command defines go with it: the next one has its own of the same name. Those of
    commands that tests have imported come back."""

    def ours(name: str) -> bool:
        # One that has come back belongs to no module any more.
        return flags.FLAGS.find_module_defining_flag(name, "experiments").startswith("experiments")

    kept = {name: flags.FLAGS[name] for name in list(flags.FLAGS) if ours(name)}
    for name in kept:
        delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # The next file would be loaded on top of this one.
        for name, flag in kept.items():
            flags.FLAGS[name] = flag


@dataclasses.dataclass(frozen=True)
class Told:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(command: str, *argv: str) -> Told:
    """Runs `python -m experiments.<command> argv...` here.

    Raises:
      Accepted: below `nothing_works`, it has begun to work.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    hooks = threading.excepthook, sys.unraisablehook
    sys.argv = [f"experiments.{command}", *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _own_flags():
            try:
                runpy.run_module(f"experiments.{command}", run_name="__main__")
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv = before
        threading.excepthook, sys.unraisablehook = hooks
    return Told(code, out.getvalue(), err.getvalue())


def snapshot(root: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Name, mode and content of everything below `root`."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = pathlib.Path(folder, name)
            content = b"" if path.is_dir() or path.is_symlink() else path.read_bytes()
            kind = path.lstat().st_mode
            found[str(path.relative_to(root))] = kind, hashlib.sha1(content).hexdigest()
    return found


def wrong(root: pathlib.Path, command: str, argv: Sequence[str]) -> str | None:
    """What is wrong with how a command refuses a mistake; None if nothing is."""
    before = snapshot(root)
    try:
        told = call(command, *argv)
    except (Exception, KeyboardInterrupt) as error:  # A traceback is what is looked for.
        return f"{type(error).__name__}: {error}"
    after = snapshot(root)
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if changed:
        return f"changed {changed}, after {told.err!r}"
    if told.code != 2 or told.out:
        return f"exit code {told.code}, stdout {told.out!r}, stderr {told.err!r}"
    if told.err.count("\n") != 1 or not SENTENCE.fullmatch(told.err.rstrip("\n")):
        return f"not one sentence of a field, what was expected and what was got: {told.err!r}"
    return None
