"""Printing that never ends a run: a reader that has gone away, a closed stream or an encoding without a
letter costs the words, not the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, Optional, TextIO


class Tolerant(io.TextIOBase):
    """A text stream that loses what its own stream cannot take.

    Characters that the encoding lacks become "?". After the first failure (a closed pipe, a terminal
    that is gone, not a full disk) all is lost in silence.
    """

    def __init__(self, stream: Optional[TextIO]):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            if self._stream is not None:
                self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed.
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # A full disk may have room again.
        stream, self._stream = self._stream, None
        try:
            # For all else that writes there: libraries, children, what is in its buffer when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

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
