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
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path / LOCK, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"workdir: expected a run that no other process trains, got {str(path)!r}.") from None
        except OSError:
            pass  # A file system without locks: nothing is promised there.
        yield
