"""Where files are, and how they are written: whole, and never in the place of what is no file."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import stat
import sys
from typing import Optional

_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+):/")
"""`pathlib` folds the two slashes of an address into one. A scheme of one letter is a drive."""


def local(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path on this machine: `~` is a home, `file://` understood, nothing else resolved.

    Raises:
      ValueError: an address of any other scheme, another host's file, or a home that nobody has;
        names `field`.
    """
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
            f"{field}: expected a path of this machine (~ and file:// are understood), got the address "
            f"{text!r}."
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
    """`local`, of a folder that checkpoints can be kept in.

    Raises:
      ValueError: as `local`; a path that is not Unicode, or with a backslash, which the checkpoint
        library takes for a separator and so writes elsewhere.
    """
    found = local(field, path)
    try:
        str(found).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{field}: expected a path whose name is Unicode, got {str(found)!r}.") from None
    if "\\" in str(found):
        raise ValueError(f"{field}: expected a path without a backslash, got {str(found)!r}.")
    return found


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, then renamed. Missing folders
    are made.

    What is no regular file (a terminal, a pipe, /dev/null) is written through, as is a standard stream
    by its name in /dev; of a symbolic link the target is written.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    path = pathlib.Path(path)
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
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def partial(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_partial(path: pathlib.Path, name: str) -> bool:
    """Whether `path` is what is left of a process that was killed while it wrote the file `name`."""
    return path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def _stream(path: pathlib.Path) -> Optional[int]:
    """The standard stream that a path is, for a file that is opened anew has a place of its own."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if os.path.samestat(os.stat(path), os.fstat(number)):
                stream.flush()
                return os.dup(number)
        except (OSError, AttributeError):  # It is closed.
            continue
    return None


def _through(path: pathlib.Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    # /dev/stdout may be a regular file that the shell holds open: another in its place is lost.
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.parts[:2] in (("/", "dev"), ("/", "proc"))
