"""Printing that never ends a run: a reader that has gone away, a closed stream or an encoding without a letter costs
the words, not the work."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import time
from typing import Any, Optional, TextIO

PATIENCE = 5.0
"""Seconds for which a pipe that does not block may be full before words are lost."""

_PIECE = 2048
"""Characters that fit into an empty buffer, whatever their encoding: what the buffer has taken is written by a later
`flush`, what it has not is lost."""

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Of a stream that nobody will read any more."""


class Tolerant(io.TextIOBase):
    """A text stream that loses what its own stream cannot take.

    Characters that the encoding lacks become "?". After a closed pipe or a terminal that is gone all is lost in
    silence; a full disk, or a full pipe that does not block, costs what it did not take.
    """

    def __init__(self, stream: Optional[TextIO]):
        self._stream = stream
        self._patience = PATIENCE
        # The first failure, but for that of a reader that has had enough.
        self.lost: Optional[Exception] = None

    def write(self, text: str) -> int:
        stream = self._stream  # Another thread may let go of it meanwhile.
        if stream is not None:
            blocks = _blocks(stream)
            size = len(text) if blocks else _PIECE
            for start in range(0, len(text), size or 1):
                self._write(stream, text[start : start + size], blocks)
        return len(text)

    def _write(self, stream: TextIO, text: str, blocks: bool) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            self._write(stream, text.encode(encoding, "replace").decode(encoding), blocks)
        except (BlockingIOError, InterruptedError):
            self._flush(stream)
        except (OSError, ValueError) as error:  # ValueError: it is closed.
            self._failed(stream, error)
        else:
            if not blocks:
                self._flush(stream)

    def flush(self) -> None:
        stream = self._stream
        if stream is not None:
            self._flush(stream)

    def _flush(self, stream: TextIO) -> None:
        until = time.monotonic() + self._patience
        while True:
            try:
                stream.flush()
            except (BlockingIOError, InterruptedError) as error:
                if _writable(stream, until - time.monotonic()):
                    continue
                self._patience = 0.0  # The next one does not wait again for a reader that sleeps.
                self._failed(stream, error)
            except (OSError, ValueError) as error:
                self._failed(stream, error)
            else:
                self._patience = PATIENCE
            return

    def _failed(self, stream: TextIO, error: Exception) -> None:
        number = getattr(error, "errno", None)
        if self.lost is None and number != errno.EPIPE:
            self.lost = error
        if number not in _GONE and not isinstance(error, ValueError):
            return  # A full disk may have room again.
        self._stream = None
        try:
            # For all else that writes there: libraries, children, what is in its buffer when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass

    def isatty(self) -> bool:
        stream = self._stream
        try:
            return stream is not None and stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        stream = self._stream
        if stream is None:
            raise io.UnsupportedOperation("fileno")
        return stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:
        return "replace"

    def __getattr__(self, name: str) -> Any:  # `buffer` and the like.
        return getattr(self.__dict__["_stream"], name)


def _blocks(stream: TextIO) -> bool:
    try:
        return os.get_blocking(stream.fileno())
    except (OSError, ValueError, AttributeError):  # It is no file.
        return True


def _writable(stream: TextIO, seconds: float) -> bool:
    """Whether a stream takes more within some seconds."""
    try:
        return seconds > 0 and bool(select.select([], [stream.fileno()], [], seconds)[1])
    except (OSError, ValueError, AttributeError):
        return False


def tolerant_streams() -> None:
    """Makes stdout and stderr of this process `Tolerant`, also those that were closed at its start."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # The next file that is opened would take this number, and be printed into.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # The lowest that is free.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))


def say(text: str) -> None:
    """Prints a line, if there is anybody to read it."""
    stream = sys.stdout if isinstance(sys.stdout, Tolerant) else Tolerant(sys.stdout)
    print(text, file=stream, flush=True)
