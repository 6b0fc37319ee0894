"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Optional

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all",
         "collective-permute", "collective-broadcast", "send", "recv")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?)\b({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place of a program where devices exchange something."""

    kind: str  # one of KINDS
    shape: str  # of the result, as XLA writes it
    size: int  # bytes of the whole array on one device: what is gathered, summed, or scattered
    group: int  # devices that take part
    # turns of the loops around it, outermost first; None where a loop's turns follow the data
    loops: tuple[Optional[int], ...]

    @property
    def times(self) -> int:
        """How often it runs in one call of the program; loops that follow the data count once."""
        return math.prod(turns or 1 for turns in self.loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, around a ring: (n - 1) / n of the size, for a sum twice; all of it from
        one device to another."""
        if self.kind in ("collective-permute", "collective-broadcast", "send", "recv"):
            return self.size
        once = self.size * (self.group - 1) / self.group
        return 2 * once if self.kind == "all-reduce" else once


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised HLO module. What the TPU compiler spreads over other work (its asynchronous
    collective fusions) counts once, where it starts."""
    computations, entry = _computations(text)
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:10_000])]
    everybody = math.prod(counts)
    callers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            for called in _called(line):
                callers[called].append((name, line))
    loops = _Loops(computations, callers, entry)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            place = name
            if spread := _spread(name, callers):
                if "async-collective-start" not in spread[1]:
                    continue  # A later part of one that has been counted.
                place = spread[0]
            shape, kind = _shape(match.group(1), match.group(3)), match.group(2)
            group = _group(line) or everybody
            size = _size(shape) * (group if kind == "reduce-scatter" else 1)
            found += [Collective(kind, shape, size, group, turns) for turns in loops.around(place)]
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    name, entry = None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header.group(2)
            computations[name] = []
            entry = name if header.group(1) else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            computations[name].append(line)
    return computations, entry


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from re.findall(r"[\w.\-]+", branches)


def _spread(name: str, callers: dict[str, list[tuple[str, str]]]) -> Optional[tuple[str, str]]:
    """(computation, line) that calls one part of an asynchronous collective fusion; None if it is none."""
    for caller, line in callers[name]:
        if name.startswith("async_collective_fusion") or "async-collective-" in line.split("=")[0]:
            return caller, line.split("=")[0]
    return None


class _Loops:
    """Turns of the loops around every computation."""

    def __init__(self, computations: dict[str, list[str]], callers: dict[str, list[tuple[str, str]]], entry: str):
        self.computations, self.callers, self.entry = computations, callers, entry

    def around(self, name: str) -> list[tuple[Optional[int], ...]]:
        """One tuple for each way from the entry to this computation."""
        if name == self.entry:
            return [()]
        ways = []
        for caller, line in self.callers[name]:
            own: tuple[Optional[int], ...] = ()
            if re.search(rf"(body|condition)=%?{re.escape(name)}\b", line):
                own = (self._turns(line),)
            ways += [outer + own for outer in self.around(caller)]
        return ways

    def _turns(self, line: str) -> Optional[int]:
        """What the loop itself says, or the one constant that its condition compares with."""
        if known := re.search(r'known_trip_count[^0-9}]*"?n"?[^0-9}]*(\d+)', line):
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self.computations.get(condition.group(1), []) if condition else []
        constants = {int(n) for text in lines for n in re.findall(r" s32\[\][^=]* constant\((\d+)\)", text)}
        return constants.pop() if len(constants) == 1 else None


def _shape(text: str, start: Optional[str]) -> str:
    """Without layouts; of a "-start", which names its operand too, the result."""
    text = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text).strip()
    parts = re.findall(r"\w+\[[\d,]*\]", text)
    if start and len(parts) > 1:
        parts = parts[len(parts) // 2 :]
    return ", ".join(parts)


def _size(shape: str) -> int:
    total = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        total += _BYTES.get(kind, 4) * math.prod(int(n) for n in sides.split(",") if n)
    return total


def _group(line: str) -> Optional[int]:
    """Devices of the first group, which XLA writes {{0,1},{2,3}} or [groups,devices]<=[...]; None where it names none
    and means all."""
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(short.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed.group(1).split(",")) if listed else None
