"""Text files of one's own: those below a folder, or one and what stands beside it, by split."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from meta_attention_jax.data.splits import (
    SPLITS,
    TEST_FROM,
    VALIDATION_FROM,
    assign,
    same_but_split,
    split_of,
    split_word,
    topic,
)

_LOOKED_AT = 1 << 16


class NotText(ValueError):
    """A file that is empty, binary or not UTF-8; `got` says which."""

    def __init__(self, path: pathlib.Path, expected: str, got: str):
        super().__init__(f"corpus: expected {expected} in {str(path)!r}, got {got}.")
        self.got = got


def read_text(path: pathlib.Path) -> bytes:
    """The bytes of a text file; NotText if it is empty, no UTF-8 or has zeros in it."""
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
    """(texts by split, what says the split, notes) of the files below a folder. Files that are no text are skipped, and
    counted in a note."""
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
    """All files below a folder, and what was left out, a sentence each. Links are followed, every real folder once, so
    that cycles end. What is hidden (a dot in front) is left out, as are pipes and the like; notes are on links that
    lead nowhere, or where we were. OSError if a folder cannot be read."""
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


Text = tuple[str, bytes]  # Name and content.

Parts = dict[str, list[Text]]  # Texts by split.


def beside(path: pathlib.Path, rule: str) -> tuple[dict[str, list[pathlib.Path]], list[str]]:
    """Held-out files by split in the folder of a train file, named like it but for that word, and notes of one that is
    not; where there is none of a split, `loosely`. None for the rule "hash", and, with a note, for "auto" where the
    train file is a program or page and others are in its folder."""
    held: dict[str, list[pathlib.Path]] = {}
    notes: list[str] = []
    if rule != "hash" and split_word(path.name) == "train":
        around = [p for p in sorted(path.parent.iterdir()) if p.name[0] != "."]
        files = [p for p in around if p.is_file()]
        for loosely in (False, True):
            found: dict[str, list[pathlib.Path]] = {}
            for file in files:
                word = split_word(file.name)
                if word not in ("train", None) and same_but_split(path.name, file.name, loosely=loosely):
                    found.setdefault(word, []).append(file)
            held = found | held
        kind = topic(path.name) if rule == "auto" else None
        mine = {path.name, *(file.name for found in held.values() for file in found)}
        outside = [f.name for f in files if kind and topic(f.name) == kind and f.name not in mine]
        if held and outside:
            held = {}
            notes = [f"{path.name!r} is taken for a {kind} like {outside[0]!r}, not for a split"]
        unread = [p.name for p in around if split_word(p.name) in set(SPLITS[1:]) - held.keys()]
        if unread and not notes:
            notes = [f"{unread[0]!r} beside {path.name!r} is not read, for their names differ in more than the split"]
    if rule == "names" and not held:
        raise ValueError(
            f"data.split: expected a train file with a held-out file beside it for 'names', got "
            f"{str(path)!r} alone; 'hash' cuts it in three."
        )
    return held, notes


def fill(parts: Parts) -> str:
    """Takes the splits that are missing out of train, in place, and says what was done, "" for nothing: by the hash of
    the train files' paths; where that leaves a split without a file, 5 % of the bytes off the end of every train file.
    """
    missing = [split for split in SPLITS[1:] if not parts[split]]
    if not missing:
        return ""
    hashed = [split_of(name) for name, _ in parts["train"]]
    pieces = [(split if split in missing else "train", text)
              for split, text in zip(hashed, parts["train"], strict=True)]
    by = "by a hash of the train file's path"
    if {split for split, _ in pieces} != {"train", *missing}:
        pieces = [p for name, data in parts["train"] for p in cut(name, data, missing)]
        by = "off the end of " + ("every train file" if len(hashed) > 1 else "the train file")
    for split in ("train", *missing):
        parts[split] = [text for part, text in pieces if part == split]
    return f"{' and '.join(missing)} {by}"


def cut(name: str, data: bytes, splits: Sequence[str] = SPLITS[1:]) -> list[tuple[str, Text]]:
    """One UTF-8 text cut at line ends: 5 % of its bytes off the end for each of `splits`, in order. A hash of one file
    cannot split it, and scattered lines would put neighbours in two splits. Where lines are so long that a part would
    be empty or train less than half, it is cut at the last line end of the 5 % before, or, without one there, between
    two characters."""
    share = TEST_FROM - VALIDATION_FROM
    goals = [round(len(data) * (1.0 - share * (len(splits) - i))) for i in range(len(splits))]
    starts = [0]
    for goal in goals:
        starts.append(max(data.rfind(b"\n", 0, goal) + 1, starts[-1]))
    ends = [*starts[1:], len(data)]
    if any(a == b for a, b in zip(starts, ends, strict=True)) or ends[0] < len(data) / 2:
        starts = [0]
        for goal in goals:
            least = max(goal - int(share * len(data)), starts[-1])
            place = data.rfind(b"\n", least, goal) + 1
            while not place and starts[-1] < goal < len(data) and data[goal] & 0xC0 == 0x80:
                goal -= 1  # To the start of a character.
            starts.append(place or goal)
        ends = [*starts[1:], len(data)]
    pieces = zip(("train", *splits), starts, ends, strict=True)
    return [(s, (f"{name}[{a}:{b}]", data[a:b])) for s, a, b in pieces if b > a]
