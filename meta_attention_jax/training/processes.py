"""What several processes of one run have to agree on, which does nothing where there is one; and the lock on a run's
directory; in a bucket, what takes its place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Optional, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, in_bucket

Result = TypeVar("Result")

_LONGEST = 1024  # Bytes of a sentence that travel.


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def start(
    coordinator: Optional[str] = None, num_processes: Optional[int] = None, process_id: Optional[int] = None
) -> None:
    """Joins the processes of a run, this one by its number, from 0; before anything else is asked of JAX. `coordinator`
    is host:port of process 0; None finds it, and the rest, where the environment tells (TPU pods, Slurm, ...)."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        for name, value in given.items():
            if value is None:
                raise ValueError(f"{name}: expected a value, as {', '.join(given)} go together, got none.")
        expect(num_processes >= 1 and 0 <= process_id < num_processes, "process_id",
               f"a number from 0 to num_processes - 1 = {num_processes - 1}", process_id)
        expect(":" in coordinator, "coordinator", "HOST:PORT", coordinator)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            "multihost: expected a TPU pod, a cluster that JAX knows, or coordinator, num_processes "
            f"and process_id, got: {reason}"
        ) from error


def agree(error: Optional[BaseException]) -> None:
    """Raises in every process what went wrong in any, the first process's sentence: the error itself where it came up,
    in the others ValueError, or OSError for a full disk."""
    if not several():
        if error is not None:
            raise error
        return
    words = b"" if error is None else (str(error).encode() or repr(error).encode())[:_LONGEST]
    mine = np.zeros(_LONGEST, np.uint8)
    mine[: len(words)] = np.frombuffer(words, np.uint8)
    for index, other in enumerate(multihost_utils.process_allgather(mine)):
        text = bytes(np.asarray(other)).rstrip(b"\0").decode(errors="ignore")
        if text and index == jax.process_index():
            raise error
        if text:
            full = isinstance(error, OSError) or os.strerror(errno.ENOSPC) in text
            raise OSError(errno.ENOSPC, text) if full else ValueError(text)


def together(function: Callable[[], Result]) -> Result:
    """function() in every process; what goes wrong in one goes wrong in all."""
    result, error = None, None
    try:
        result = function()
    except Exception as caught:  # Of any kind: the others are waiting.
        error = caught
    agree(error)
    return result


def in_turn(function: Callable[[], Result]) -> Result:
    """function() in process 0, then in the others: they find what it has written."""
    result = together(function) if not several() or leads() else together(lambda: None)
    if not several():
        return result
    other = together(lambda: None if leads() else function())
    return result if leads() else other


def check_same(field: str, text: str) -> None:
    """Raises ValueError in all processes unless all have the same text."""
    if not several():
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests: Any = multihost_utils.process_allgather(digest)
    different = [i for i, other in enumerate(digests) if (other != digests[0]).any()]
    if different:
        raise ValueError(
            f"{field}: expected the same in all {jax.process_count()} processes, got another in process {different[0]}."
        )


LOCK = ".lock"


TAKEN_OVER = "in a bucket, without locks: a process that starts later takes the run over, this one stops at a save"

_held: dict[Place, str] = {}  # What this process has written into the locks of runs in buckets.


class Busy(ValueError):
    """Another process writes into the run directory."""


class Taken(Busy):
    """Another process has taken over a run in a bucket."""


def check_held(path: Place) -> None:
    """Raises Taken if this process held a run in a bucket, and another one does now. What that one does between the
    look and what the caller then writes, nobody sees."""
    if path in _held and (not (path / LOCK).is_file() or (path / LOCK).read_text() != _held[path]):
        raise Taken(f"workdir: expected a run that no other process trains, got {str(path)!r}, which one took over.")


@contextlib.contextmanager
def hold(path: Place) -> Iterator[None]:
    """This process alone trains the run in `path`, until the end of the block; Busy if another one does. The lock is
    the kernel's and goes with the process, however it ends; the file stays. A bucket has none, and cannot tell a
    process that is dead from one that trains: there who comes last has the run, and the other one hears of it by
    `check_held`."""
    if in_bucket(path):
        _held[path] = uuid.uuid4().hex
        (path / LOCK).write_text(_held[path])
        try:
            yield
        finally:
            del _held[path]
        return
    import fcntl  # Of Unix; a run is also opened elsewhere.

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path / LOCK, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"workdir: expected a run that no other process trains, got {str(path)!r}.") from None
        except OSError:
            pass  # A file system without locks: nothing is promised there.
        yield
