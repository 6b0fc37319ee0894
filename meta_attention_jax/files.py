"""Where files are, and how they are written: whole, and never in the place of what is no file. Of this machine, or of a
bucket: whatever knows of addresses is here."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Optional, Union

import fsspec
from etils import epath

Place = Union[pathlib.Path, epath.Path]
"""On this machine, or in a bucket."""

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of buckets, and the packages of the extra `buckets` that open them."""

os.environ.setdefault("EPATH_USE_TF", "false")  # Or epath would open them by TensorFlow, where that is installed.

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


def place(field: str, path: str | os.PathLike[str]) -> Place:
    """`local`, or what is at an address of a bucket, gs:// or s3://; nothing is asked of the bucket."""
    text = os.fspath(path)
    address = _ADDRESS.match(text)
    scheme = address[1].lower() if address else None
    if scheme in (None, "file"):
        return local(field, path)
    if scheme not in BUCKETS:
        raise ValueError(f"{field}: expected a path of this machine, gs:// or s3://, got the address {text!r}.")
    # The library of checkpoints takes "?" and "#" for the end of a name, fsspec the others for patterns.
    name = re.fullmatch(r"/*([^/]+(?:/+[^/]+)*)/*", text[address.end() :])
    if name is None or re.search(r"[?#*\[\]\\\s]", text) or ".." in text.split("/"):
        raise ValueError(f"{field}: expected {scheme}://BUCKET/NAME without spaces, '..' and ?#*[]\\, got {text!r}.")
    if importlib.util.find_spec(BUCKETS[scheme]) is None:
        raise ValueError(f"{field}: expected the extra buckets (pip install gcsfs s3fs) for {text!r}, "
                         f"got no {BUCKETS[scheme]}.")
    for protocol in ("gs", "gcs", "s3"):  # Others write there too: no list of objects is kept.
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return epath.Path(f"{scheme}://{name[1]}")


def at(path: str | os.PathLike[str]) -> Place:
    """What `place` has found, from its text; a path of this machine stays as it is."""
    text = os.fspath(path)
    return epath.Path(text) if text.startswith(tuple(f"{scheme}://" for scheme in BUCKETS)) else pathlib.Path(path)


def in_bucket(path: Place) -> bool:
    """Whether it is no path of this machine."""
    return isinstance(path, epath.Path)


def check_reached(field: str, path: Place) -> None:
    """Raises ValueError unless the bucket of a path, if it is in one, is there and answers."""
    if in_bucket(path):
        _check_bucket(field, "/".join(str(path).split("/")[:3]))


@functools.cache
def _check_bucket(field: str, bucket: str) -> None:
    got = "none"
    try:
        if epath.Path(bucket).exists():
            return
    except Exception as error:  # Of no account, no network, no permission: every library has its own.
        got = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('. ')}"
    raise ValueError(f"{field}: expected a bucket {bucket!r} that can be reached, got {got}.")


def run_directory(field: str, path: str | os.PathLike[str]) -> Place:
    """`place`, of a folder that checkpoints can be kept in; a bucket is asked for."""
    found = place(field, path)
    try:
        str(found).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{field}: expected a path whose name is Unicode, got {str(found)!r}.") from None
    if "\\" in str(found):  # The checkpoint library takes it for a separator, and so writes elsewhere.
        raise ValueError(f"{field}: expected a path without a backslash, got {str(found)!r}.")
    check_reached(field, found)
    return found


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside it, then renamed. Missing folders are made; `path`
    is resolved as by `place`. In a bucket an object is whole anyway.

    What is no regular file (a terminal, a pipe, /dev/null) is written through, as is a standard stream by any of its
    names; of a symbolic link the target is written. A file that cannot be replaced, but written (it is mounted by
    itself, or nothing new may be made in its folder), is written in place.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    path = place("path", path)
    if in_bucket(path):
        path.write_bytes(content)
        return
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


def move(path: Place, to: Place) -> None:
    """Renames a folder to what is not there yet; in a bucket one object after the other."""
    if in_bucket(path):
        system, root = fsspec.core.url_to_fs(str(path))
        found = system.find(root)  # What stands for folders cannot be copied.
        system.copy(found, [str(to) + name.removeprefix(root) for name in found])
        system.rm(root, recursive=True)
        return
    to.parent.mkdir(exist_ok=True)
    path.rename(to)


class Stage:
    """A folder of this machine in the place of one in a bucket, for what needs to append, to rename or to open files by
    name. What is there comes by `fetch` and goes by `push`. Of a folder of this machine it is the folder itself, and
    the two do nothing."""

    def __init__(self, path: Place, folder: pathlib.Path):
        self.path, self.folder = path, folder
        self._same: dict[str, tuple[int, int]] = {}  # Size and time of files that are in the bucket as they are here.

    def names(self) -> list[str]:
        """All that is in the bucket, relative to the folder."""
        system, root = fsspec.core.url_to_fs(str(self.path))
        return [name.removeprefix(f"{root}/") for name in system.find(root)]

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        """Brings the files whose names are `wanted`, but those that are here."""
        if not in_bucket(self.path):
            return
        names = [name for name in self.names() if wanted(name) and not (self.folder / name).exists()]
        system, root = fsspec.core.url_to_fs(str(self.path))
        if names:  # fsspec takes no list for one of nothing.
            system.get([f"{root}/{name}" for name in names], [str(self.folder / name) for name in names])
        self._same |= {name: self._now(name) for name in names}

    def push(self, last: str = "") -> None:
        """Brings all that is new or has changed into the bucket; files called `last` when the others are there."""
        if not in_bucket(self.path):
            return
        files = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()]
        changed = {name: self._now(name) for name in files}
        changed = {name: now for name, now in changed.items() if self._same.get(name) != now}
        system, root = fsspec.core.url_to_fs(str(self.path))
        for names in (
            [name for name in changed if pathlib.Path(name).name != last],
            [name for name in changed if pathlib.Path(name).name == last],
        ):
            if names:
                system.put([str(self.folder / name) for name in names], [f"{root}/{name}" for name in names])
        self._same |= changed

    def _now(self, name: str) -> tuple[int, int]:
        found = (self.folder / name).stat()
        return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def staged(path: Place, wanted: Callable[[str], bool] = lambda name: False) -> Iterator[Stage]:
    """A `Stage` until the end of the block, with what is `wanted` from the start. Whoever wants to keep what is new in
    it pushes."""
    if not in_bucket(path):
        yield Stage(path, path)
        return
    with tempfile.TemporaryDirectory(prefix="meta_attention_jax-", ignore_cleanup_errors=True) as above:
        stage = Stage(path, pathlib.Path(above) / path.name)
        stage.folder.mkdir()
        stage.fetch(wanted)
        yield stage


def partial(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_partial(path: Place, name: str) -> bool:
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
