"""The texts of each split: what lies beside a train file, and what is cut off where a split is missing."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from meta_attention_jax.data.splits import (
    SPLITS,
    TEST_FROM,
    VALIDATION_FROM,
    same_but_split,
    split_of,
    split_word,
    topic,
)

Text = tuple[str, bytes]
"""Name and content."""

Parts = dict[str, list[Text]]
"""Texts by split."""


def beside(path: pathlib.Path, rule: str) -> tuple[dict[str, list[pathlib.Path]], list[str]]:
    """Held-out files by split in the folder of a train file, named like it but for that word, and notes of one that is
    not; where there is none of a split, `loosely`.

    None for the rule "hash", and, with a note, for "auto" where the train file is a program or page and others are in
    its folder.
    """
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
    """Takes the splits that are missing out of train, in place.

    By the hash of the train files' paths; where that leaves a split without a file, 5 % of the bytes off the end of
    every train file.

    Returns:
      What was done, in words; "" for nothing.
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
    """One UTF-8 text cut at line ends: 5 % of its bytes off the end for each of `splits`, in order.

    A hash of one file cannot split it, and scattered lines would put neighbours in two splits. Where lines are so long
    that a part would be empty or train less than half, it is cut at the last line end of the 5 % before, or, without
    one there, between two characters.
    """
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
