"""The schedules that a TPU's compiler writes when it is asked to: bundles of instructions, one a cycle."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from typing import NamedTuple

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|\d+) +(?:L[BHE]|P[BF]|CT)? *:")
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_JUMP = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")


def ask(folder: pathlib.Path) -> None:
    """Has the compiler write its schedules to a folder; before JAX starts it."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


class Step(NamedTuple):
    """Cycles of one step of a kernel's grid."""

    always: int
    parts: tuple[int, ...]  # Of those that only some steps go through, in the order of the program.


def taken(folder: pathlib.Path) -> list[Step]:
    """Of the kernels of what was compiled last, in its order; the folder is emptied, for schedules are large."""
    found = []
    for analysis in sorted(folder.glob("*-schedule-analysis_final_bundles.txt"), key=_number):
        # The program around the kernels names them too.
        if not re.search(r"<|-TLP-", analysis.name) and "tpu_custom_call" in analysis.read_text():
            name = re.sub(r"-\d+-schedule-analysis_final_bundles.txt$", "", analysis.name)
            (bundles,) = (path for path in folder.glob(f"{_plain(name)}-*-final_bundles.txt") if path != analysis)
            found.append(step_of(bundles.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _number(path: pathlib.Path) -> int:
    return int(path.name.split("-")[0])


def _plain(name: str) -> str:
    """A name in which a pattern means itself."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def step_of(text: str) -> Step:
    """Of the text of a kernel's final bundles. Parts are what a jump forward leaves out, the outermost of them; the
    body of the loop itself, which only the last turn leaves out, is none."""
    bundles = [line for line in text.splitlines() if _BUNDLE.match(line)]
    starts: dict[str, int] = {}
    for i, line in enumerate(bundles):
        for kind, region in _REGION.findall(line):
            if kind != "End":
                starts.setdefault(region, i)
    found = ((i, _JUMP.search(line)) for i, line in enumerate(bundles))
    jumps = [(i, starts[region[1]]) for i, region in found if region and region[1] in starts]
    end, begin = next((i, to) for i, to in jumps if to < i)
    inside = [(i, to) for i, to in jumps if begin <= i < to <= end + 1 and to - i < 0.8 * (end - begin)]
    outer = [
        (i, to) for i, to in inside if not any(j <= i and to <= other and (i, to) != (j, other) for j, other in inside)
    ]
    parts = tuple(to - i for i, to in outer)
    return Step(end - begin - sum(parts), parts)
