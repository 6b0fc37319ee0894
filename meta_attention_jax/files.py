"""Where files are, and how they are written: whole, and never in the place of what is no file."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import stat
import sys
from typing import Optional

_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+):/")
"""`pathlib` folds the two slashes of an address into one. A scheme of one letter is a drive."""

_DESCRIPTOR = re.compile(r"/dev/fd/|/proc/[^/]+(/task/[^/]+)?/fd/")
"""Names of what a process holds open."""

_NOT_REPLACED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
"""Of a folder that takes no new file, and of a file that is a mount of its own."""


def local(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path on this machine: `~` is a home, `file://` understood, nothing else resolved."""
    text = os.fspath(path)
    address = _ADDRESS.match(text)
    if address and address[1].lower() == "file":
        here = re.fullmatch(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", text, re.IGNORECASE | re.DOTALL)
        if here is None:
            raise ValueError(f"{field}: expected file:///folder of this machine, got {text!r}.")
        # "#" and "?" are a part of the name: a file has no query.
        text = re.sub(r"(?:%[0-9A-Fa-f]{2})+", _decoded, here[1])
    elif address:
        raise ValueError(
            f"{field}: expected a path of this machine (~ and file:// are understood), got the address {text!r}."
        )
    if "\0" in text:
        raise ValueError(f"{field}: expected a path, got {text!r}.")
    try:
        return pathlib.Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{field}: expected a path in a home that is known, got {text!r}.") from None


def _decoded(escaped: re.Match[str]) -> str:
    return bytes.fromhex(escaped[0].replace("%", "")).decode("utf-8", "surrogateescape")


def run_directory(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """`local`, of a folder that checkpoints can be kept in."""
    found = local(field, path)
    try:
        str(found).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{field}: expected a path whose name is Unicode, got {str(found)!r}.") from None
    if "\\" in str(found):  # The checkpoint library takes it for a separator, and so writes elsewhere.
        raise ValueError(f"{field}: expected a path without a backslash, got {str(found)!r}.")
    return found


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, then renamed. Missing folders are made; `path`
    is resolved as by `local`.

    What is no regular file (a terminal, a pipe, /dev/null) is written through, as is a standard stream by any of its
    names; of a symbolic link the target is written. A file that cannot be replaced, but written (it is mounted by
    itself, or nothing new may be made in its folder), is written in place.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    path = local("path", path)
    if _through(path):
        with open(_stream(path) or path, "ab", buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        return
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(path)
    try:
        temporary.write_bytes(content)
        if path.exists():
            with contextlib.suppress(OSError):  # A file system without modes.
                shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _NOT_REPLACED or not path.is_file():
            raise
        path.write_bytes(content)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def partial(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_partial(path: pathlib.Path, name: str) -> bool:
    """Whether `path` is what is left of a process that was killed while it wrote the file `name`."""
    return path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def _stream(path: pathlib.Path) -> Optional[int]:
    """The standard stream that a path is, for a file that is opened anew has a place of its own."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if _is_open_as(path, number):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # It is closed, or none.
                stream.flush()
            return os.dup(number)
    return None


def _is_open_as(path: pathlib.Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except OSError:  # It is closed.
        return False


def _through(path: pathlib.Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        return not stat.S_ISDIR(mode)
    # What somebody holds open may be a regular file: another in its place is lost.
    return any(_is_open_as(path, number) for number in (1, 2)) or bool(_DESCRIPTOR.match(str(path)))
