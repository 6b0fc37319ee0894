"""Text files of one's own: those below a folder, or one and what stands beside it, by split."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from meta_attention_jax.data.parts import Parts, beside, cut, fill
from meta_attention_jax.data.splits import SPLITS, assign, split_word

_LOOKED_AT = 1 << 16


class NotText(ValueError):
    """A file that is empty, binary or not UTF-8; `got` says which."""

    def __init__(self, path: pathlib.Path, expected: str, got: str):
        super().__init__(f"corpus: expected {expected} in {str(path)!r}, got {got}.")
        self.got = got


def read_text(path: pathlib.Path) -> bytes:
    """The bytes of a text file.

    Raises:
      NotText: an empty file, or what is no UTF-8 or has zeros in it.
    """
    with open(path, "rb") as file:
        data = file.read(_LOOKED_AT)  # Not all of a film, to see that it is none.
        data += b"" if b"\0" in data else file.read()
    if not data:
        raise NotText(path, "text", "an empty file")
    if b"\0" in data:
        raise NotText(path, "text", "a binary file")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotText(path, "UTF-8", f"something else at byte {error.start}") from None
    return data


def read_folder(root: pathlib.Path, rule: str) -> tuple[Parts, str, list[str]]:
    """(texts by split, what says the split, notes) of the files below a folder.

    Files that are no text are skipped, and counted in a note.
    """
    names, notes = walk(root)
    if not names:
        raise ValueError(f"corpus: expected text files in {str(root)!r}, got an empty folder.")
    assigned = assign(names, rule)
    parts: Parts = {split: [] for split in SPLITS}
    bad: dict[str, NotText] = {}
    for name in sorted(names, key=lambda name: assigned.splits[name] is not None):
        split = assigned.splits[name]
        try:
            text = name, read_text(root / name)
        except NotText as error:
            bad[name] = error
            continue
        if split is None:
            raise ValueError(
                f"corpus: expected train, valid or test in the name of every file, or of a folder "
                f"above it, as others have it in {str(root)!r}, got {name!r}; "
                "data.split=hash ignores names."
            )
        parts[split].append(text)
    if len(bad) == len(names):
        first, error = next(iter(bad.items()))
        raise ValueError(f"corpus: expected text files in {str(root)!r}, got none: {first!r} is {error.got}.")
    by = assigned.by
    if assigned.named:
        for name, error in bad.items():
            if assigned.splits[name] and not parts[assigned.splits[name]]:
                raise error  # All there was of a split.
        filled = fill(parts)
        by += f"; {filled}" if filled else ""
    if bad:
        first, error = next(iter(bad.items()))
        notes.append(f"{len(bad)} of {len(names)} files skipped, the first {first!r}, {error.got}")
    return parts, by, [*notes, *assigned.notes, *_held_beside(root, rule)]


def _held_beside(root: pathlib.Path, rule: str) -> list[str]:
    """A note of what is held out beside a train folder that was given alone."""
    root = root.resolve()
    if rule != "auto" or split_word(root.name) != "train" or not os.access(root.parent, os.R_OK):
        return []
    around = sorted(root.parent.iterdir(), key=lambda p: (not p.is_dir(), p.name))
    held = [p.name for p in around if p.name[0] != "." and split_word(p.name) in SPLITS[1:]]
    if not held:
        return []
    return [f"{held[0]!r} beside the folder {root.name!r} is not read; the folder above has both"]


def read_file(path: pathlib.Path, rule: str) -> tuple[Parts, str, list[str]]:
    """As `read_folder`: a train file with held-out files beside it, else one file cut in three."""
    held, notes = beside(path, rule)
    parts: Parts = {split: [] for split in SPLITS}
    if not held:
        for split, text in cut(path.name, read_text(path)):
            parts[split].append(text)
        return parts, "by place: the last 5 % are test, the 5 % before validation", notes
    for split, files in {"train": [path], **held}.items():
        parts[split] += [(file.name, read_text(file)) for file in files]
    named = ", ".join(repr(name) for texts in parts.values() for name, _ in texts)
    filled = fill(parts)
    return parts, f"by names: {named}" + (f"; {filled}" if filled else ""), notes


def walk(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """All files below a folder, and what was left out, a sentence each.

    Links are followed, every real folder once, so that cycles end. What is hidden (a dot in front) is left out, as are
    pipes and the like.

    Returns:
      Paths below `root`, sorted, with "/"; notes on links that lead nowhere, or where we were.

    Raises:
      OSError: a folder that cannot be read.
    """
    names: list[str] = []
    broken: list[str] = []
    again: list[str] = []
    seen: set[str] = set()
    top = os.path.realpath(root)
    # Links come last: a folder that is here has its own name, whatever else leads to it.
    folders, links = [("", str(root))], []
    while folders or links:
        if not folders:
            links.sort()
            folders.append(links.pop(0))
        prefix, path = folders.pop()
        real = os.path.realpath(path)
        if real in seen or (prefix and os.path.commonpath([top, real]) == real):
            again.append(prefix[:-1])
            continue
        seen.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name, linked = prefix + entry.name, entry.is_symlink()
                # Not the entry's own methods: they raise where links run in a circle.
                if os.path.isdir(entry.path):
                    (links if linked else folders).append((f"{name}/", entry.path))
                elif os.path.isfile(entry.path):
                    names.append(name)
                elif linked and not os.path.exists(entry.path):
                    broken.append(name)
    notes = []
    if broken:
        notes.append(f"{_count(broken, 'broken link')} left out, the first {min(broken)!r}")
    if again:
        what = _count(again, "link")
        notes.append(f"{what} to folders that are read already left out, the first {min(again)!r}")
    return sorted(names), notes


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'s' if len(things) != 1 else ''}"
