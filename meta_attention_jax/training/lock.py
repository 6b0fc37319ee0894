"""One process at a time trains a run."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

LOCK = ".lock"


class Busy(ValueError):
    """Another process writes into the run directory."""


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """This process alone trains the run in `path`, until the end of the block.

    The lock is the kernel's and goes with the process, however it ends; the file stays.

    Raises:
      Busy: another one does.
    """
    with open(path / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"workdir: expected a run that no other process trains, got {str(path)!r}."
            ) from None
        except OSError:
            pass  # A file system without locks: nothing is promised there.
        yield


def busy(path: pathlib.Path) -> bool:
    """Whether another process trains the run."""
    try:
        with hold(path):
            return False
    except Busy:
        return True
