"""Which file of a corpus is of which split.

`data.split`, for a folder or file of one's own:

* ``auto``: names where they say it, else ``hash``;
* ``names``: names, or an error;
* ``hash``: whatever the names, 90/5/5 by a hash of the path below the folder; one file is cut, 5 %
  of its bytes off the end for each of validation and test.

Names say it where a train word and a held-out word stand side by side in one folder, at any depth: ``data/train`` and
``data/test``, ``en.train.txt`` and ``en.dev.txt``. A word is a whole part of the name, between signs, digits or a
change to capitals, in any case, also with "set", "data" or "split" behind it: train, training, trainval; valid,
validation, val, dev, devel, development, eval, evaluation, newsdev; test, testing, tests, heldout, held-out, holdout,
newstest. Train with a held-out word in one name says nothing; of two held-out words it is test. What lies below is of
the same split; within train, names side by side may say more. Every text has to lie under one of the names. A split
that they leave out is taken out of train (`data/texts.py`).

In a program or a page (`TOPICAL`) the words are topics. Under ``auto``, ``train.py`` and ``test.py`` count only if no
other program lies outside of such pairs, folders of programs only if most programs lie in them, and a folder ``tests``
never goes with a file ``train.py``. Beside text that says train, ``test.md`` or ``eval.yaml`` counts where nothing else
is held out and no other page or program lies outside; so does text beside ``train.md``. What is not used is said in a
note.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence

SPLITS = ("train", "validation", "test")
RULES = ("auto", "names", "hash")

VALIDATION_FROM, TEST_FROM = 0.90, 0.95  # Of files or of bytes, where nothing else says the split.

TOPICAL = {
    **dict.fromkeys(
        ".py .pyi .ipynb .js .ts .jsx .tsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cu .cs .go "
        ".rs .rb .php .pl .lua .jl .r .m .swift .sh .bash .bat .ps1 .sql .yaml .yml .toml .ini "
        ".cfg .cmake .gin".split(),
        "program",
    ),
    **dict.fromkeys(".md .rst .adoc .html .htm".split(), "page"),
}

_WORDS = {
    "train": re.compile(r"train(ing|val|valid)?(set|data|split)?"),
    "validation": re.compile(
        r"(val(id(ate|ation)?)?|dev(el|elop|elopment)?|eval(s|uation)?|news(discuss)?dev)"
        r"(set|data|split)?"
    ),
    "test": re.compile(r"(dev|news(discuss)?)?test(s|ing)?(set|data|split|[ab])?|(held|hold)out(set|data|split)?"),
}
_PART = re.compile(r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+")  # A camelCase word, a number.
_BARE = ("set", "data", "split")  # Parts of a name that say no more than that it is one of a split.

_TEXTS = (".txt", ".text", ".tokens", ".tok", ".raw")  # Endings of text without a form of its own.

_SHARD = re.compile(r"\d+-of-\d+")


def split_of(path: str) -> str:
    """The split of a file without one of its own: 90/5/5 by a hash of its relative path. It depends on nothing but the
    path, so adding a file never moves another."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if u < VALIDATION_FROM else "validation" if u < TEST_FROM else "test"


def split_word(name: str) -> str | None:
    """The split that the name of a file or folder says, without its place; None if it says none."""
    said = {_word(part) for part in _parts(name)} - {None}
    if "train" in said:
        return "train" if len(said) == 1 else None
    return "test" if "test" in said else "validation" if said else None


def _parts(name: str) -> list[str]:
    """The words and numbers of a name, in small letters; "held out" is one."""
    parts = [part.lower() for part in _PART.findall(_SHARD.sub("", name))]
    for i in range(len(parts) - 1, 0, -1):
        if parts[i - 1] in ("held", "hold") and parts[i].startswith("out"):
            parts[i - 1 : i + 1] = [parts[i - 1] + parts[i]]
    return parts


def _word(part: str) -> str | None:
    return next((split for split, words in _WORDS.items() if words.fullmatch(part)), None)


def same_but_split(a: str, b: str, *, loosely: bool = False) -> bool:
    """Whether names are the same but for the words of their splits and the numbers of shards. `loosely`: and for
    `_BARE` parts and the endings of plain text."""
    rests = []
    for name in (a, b):
        stem, ending = os.path.splitext(name)
        parts = _parts(stem if loosely and ending.lower() in _TEXTS and stem else name)
        bare = _BARE if loosely else ()
        rests.append([part for part in parts if _word(part) is None and part not in bare])
    return rests[0] == rests[1]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Entries of one folder that say train and something held out."""

    folder: str  # Its path below the corpus with "/" at the end; "" is the corpus itself.
    said: Mapping[str, str]  # Split by entry.
    files: tuple[str, ...]  # All that are or lie below the entries.
    kind: str | None  # In `TOPICAL`, of most of the files that are or lie below text and folders; None of text.
    folders: bool  # Whether folders are among the entries.


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The split of every file."""

    splits: Mapping[str, str | None]  # By file; None where the names of others say theirs, and its own nothing.
    by: str  # What says it, in words.
    named: bool  # Whether names do.
    notes: tuple[str, ...] = ()  # What may surprise, a sentence each.


def assign(names: Sequence[str], rule: str) -> Assigned:
    """The split of every file of a folder, by its path below it, by the rule at the head of this module."""
    notes: list[str] = []
    groups = [] if rule == "hash" else _groups(names, mixed=rule == "names")
    if rule == "auto":
        groups, notes = _data(groups, names)
    if groups:
        return Assigned(_said(groups, names), f"by names: {_listed(groups)}", True, tuple(notes))
    if rule == "names":
        raise ValueError(
            "data.split: expected a train name beside a held-out one (valid, dev, test, ...) for "
            "'names', got none; 'hash' splits by the paths."
        )
    splits = {name: split_of(name) for name in names}
    if rule == "auto" and not notes:
        notes = _lonely(splits)
    return Assigned(splits, "by a hash of the file's path", False, tuple(notes))


def topic(name: str) -> str | None:
    """What the words of splits are in this file, by its ending; None where they are splits."""
    return TOPICAL.get(os.path.splitext(name)[1].lower())


def _spoken(name: str) -> bool:
    """Whether a file ends in the code of a language, like train.en."""
    ending = os.path.splitext(name)[1].lower()
    return bool(re.fullmatch(r"\.[a-z]{2,3}", ending)) and ending not in (*_TEXTS, ".csv", ".tsv", ".log")


def _below(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Files by folder and entry of the folder: what is or lies below it."""
    entries: dict[str, dict[str, list[str]]] = {}
    for name in names:
        folder = ""
        for part in name.split("/"):
            entries.setdefault(folder, {}).setdefault(part, []).append(name)
            folder += f"{part}/"
    return entries


def _folders(folder: str) -> list[str]:
    """A folder and all that it lies in, with "/" at the end."""
    return [folder[: i + 1] for i, letter in enumerate(folder) if letter == "/"]


def _kind(files: Iterable[str]) -> str | None:
    return collections.Counter(map(topic, files)).most_common(1)[0][0]


def _groups(names: Iterable[str], *, mixed: bool) -> list[_Group]:
    """All that stand side by side; `mixed`: a program with a folder as well."""
    entries = _below(names)
    found = []
    for folder, below in entries.items():
        alike: dict[str | None, dict[str, str]] = {}
        folders = {entry for entry in below if f"{folder}{entry}/" in entries}
        for entry in below:
            if word := split_word(entry):
                text = mixed or entry in folders
                alike.setdefault(None if text else topic(entry), {})[entry] = word
        _join(alike, folders)
        for kind, said in alike.items():
            if "train" in said.values() and len(set(said.values())) > 1:
                files = tuple(file for entry in said for file in below[entry])
                if kind is None:
                    own = [e for e in said if mixed or e in folders or topic(e) is None]
                    kind = _kind(file for entry in own for file in below[entry])
                found.append(_Group(folder, said, files, kind, bool(folders.intersection(said))))
    return found


def _join(alike: dict[str | None, dict[str, str]], folders: Iterable[str]) -> None:
    """Puts held-out pages and programs with the text that says train, and held-out text files with pages that do, where
    these have nothing that is held out themselves; in place."""
    text, pages = alike.get(None, {}), alike.get("page", {})
    lone = set(text.values()) == {"train"}
    for kind in ("page", "program") if "train" in text.values() else ():
        said = alike.get(kind, {})
        guests = set(said.values()) - set(text.values())
        if "train" not in said.values() and (lone or (kind == "page" and guests)):
            text |= {entry: word for entry, word in said.items() if word in guests}
    if set(pages.values()) == {"train"} and "train" not in text.values():
        pages |= {entry: word for entry, word in text.items() if entry not in folders}


def _data(groups: list[_Group], names: Sequence[str]) -> tuple[list[_Group], list[str]]:
    """The groups whose words are splits, not topics, and a note of one that is left out."""
    above = {f"{group.folder}{entry}/" for group in groups for entry in group.said}
    outer = [group for group in groups if not above.intersection(_folders(group.folder))]
    covered = {file for group in outer for file in group.files}
    inside = collections.Counter(map(topic, covered))
    outside: dict[str | None, list[str]] = {}
    for name in names:
        if name not in covered:
            outside.setdefault(topic(name), []).append(name)
    kept, notes, outermost = [], [], set(map(id, outer))
    for group in groups:
        others = outside.get(group.kind, []) if group.kind else []
        if id(group) not in outermost and group.kind:
            continue
        held = [entry for entry, word in group.said.items() if word != "train"]
        script = group.kind == "program" and all(topic(entry) == "program" for entry in held)
        if others and (not group.folders or script or len(others) >= inside[group.kind]):
            notes.append(f"{_listed([group])} are taken for {group.kind}s like {others[0]!r}, not for splits")
            continue
        # Pages and programs among text.
        guests = {
            entry: topic(entry) for entry in group.said
            if topic(entry) not in (None, group.kind) and f"{group.folder}{entry}" in group.files
        }
        bad = {entry: kind for entry, kind in guests.items() if outside.get(kind)}
        for entry, kind in bad.items():
            like = outside[kind][0]
            notes.append(f"{group.folder + entry!r} is taken for a {kind} like {like!r}, not for a split")
        said = {entry: word for entry, word in group.said.items() if entry not in bad}
        if len(set(said.values())) > 1:
            kept.append(dataclasses.replace(group, said=said))
    if texts := [group for group in kept if group.kind is None]:
        # Beside train.en and test.en, train.cs and test.cs are Czech; what else there is, is refused.
        spoken = {group.folder for group in texts if all(map(_spoken, group.said))}
        return [group for group in kept if group.kind is None or group.folder in spoken], []
    return ([], notes[:1]) if notes else (kept, [])


def _lonely(splits: Mapping[str, str]) -> list[str]:
    """A note of what is trained on though its name says that it is held out: with a train name beside it, or by all of
    its own."""
    for folder, below in _below(splits).items():
        words = {entry: split_word(entry) for entry in below}
        train = [entry for entry, word in words.items() if word == "train"]
        for entry, word in words.items() if train else ():
            if word in SPLITS[1:] and any(splits[file] == "train" for file in below[entry]):
                name = folder + entry
                return [f"{name!r} is trained on like the rest, though {train[0]!r} stands beside it"]
        for entry, files in below.items():
            words = [part for part in _parts(entry.partition(".")[0]) if not part.isdigit()]
            held = len(words) == 1 and _word(words[0]) in SPLITS[1:] and _kind(files) is None
            if held and any(splits[file] == "train" for file in files):
                name = folder + entry
                return [f"{name!r} is trained on like the rest, for no train name stands beside it"]
    return []


def _said(groups: Iterable[_Group], names: Iterable[str]) -> dict[str, str | None]:
    by_folder: dict[str, dict[str, str]] = {}
    for group in groups:
        by_folder.setdefault(group.folder, {}).update(group.said)
    splits: dict[str, str | None] = {}
    for name in names:
        split, folder = None, ""
        for part in name.split("/"):
            split = by_folder.get(folder, {}).get(part, split)
            if split not in ("train", None):
                break  # Nothing below what is held out can lead back to train.
            folder += f"{part}/"
        splits[name] = split
    return splits


def _listed(groups: Iterable[_Group]) -> str:
    """Their entries by split, a few of them."""
    entries = [(SPLITS.index(s), g.folder + entry) for g in groups for entry, s in g.said.items()]
    shown = [repr(name) for _, name in sorted(entries)]
    more = [f"{len(shown) - 5} more"] if len(shown) > 6 else []
    return ", ".join(shown[:5] + more if more else shown)
