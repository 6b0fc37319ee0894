"""What do the kernels need of an H100 or a TPU v5e? Compiled by its compiler, without one; nothing is run.

python -m experiments.checks.kernels --target=h100|v5e [--json=FILE] [--times=2048,32768]

needs the compiler (pip install "jax[cuda13]" or "jax[tpu]"). B 1, 16 heads of queries, 4 of keys, w 1024, 4 sinks. A
row per program (packed and linear attention, forward and backward; one new token of 8 rows), length, head width and
dtype: temporary memory, and of the GPU's kernels the most registers of a thread, all bytes that spill out of them, the
most shared memory of a block (of 227 KiB) and warps. A TPU's compiler refuses what does not fit the memory of a core.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
import site
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, Optional

from experiments.checks import chips

chips.alone()  # Before JAX starts.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from experiments import common as commands  # noqa: E402
from experiments.benchmarks import common  # noqa: E402
from experiments.benchmarks.kernels import program  # noqa: E402
from meta_attention_jax import targets  # noqa: E402
from meta_attention_jax.kernels import select, worklist  # noqa: E402
from meta_attention_jax.mechanisms import decode  # noqa: E402
from meta_attention_jax.mechanisms import linear as linear_attention  # noqa: E402
from meta_attention_jax.mechanisms.mechanism import Reach  # noqa: E402
from meta_attention_jax.targets import Target  # noqa: E402
from meta_attention_jax.types import AttentionSpec  # noqa: E402

HEADS, KV_HEADS, WINDOW, SINKS, ROWS = 16, 4, 1024, 4, 8
KINDS = {
    "h100": (
        (64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float16"), (64, "float32"), (128, "float32"),
    ),
    "v5e": ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32")),
}
"""(head width, dtype)."""
TARGETS = {"h100": (Target("gpu", 9.0), "h100"), "v5e": (Target("tpu", 0.0), "v5e:2x2")}
"""What is compiled for, and its topology, of which one chip is used."""


def packed(q, k, v, route):
    kernel = select.packed("pallas", q.shape, q.dtype)
    reaches = [Reach(), Reach(WINDOW, SINKS)]
    sizes = kernel.sizes(q.shape[1], reaches)
    work = worklist.build(route, None, causal=True, reaches=reaches, sizes=sizes)
    return kernel.attend(q, k, v, work, None)[0]


def linear(q, k, v, route):
    del route
    return linear_attention.attend(q, k, v, spec=AttentionSpec(kernel="pallas"))


def one_token(q, k, v, length):
    kernel = decode.kernel_for("pallas", q, k)
    if kernel is None:
        raise ValueError("kernel: expected a form for this cache, got none: left to the portable one.")
    return kernel.attend(q, k, v, 0, jnp.zeros_like(length), length, jnp.zeros_like(length))


PROGRAMS = {
    f"{name} {direction}": program(function, direction)
    for name, function in (("packed", packed), ("linear", linear)) for direction in common.DIRECTIONS
} | {"decode": one_token}


def assembler() -> str:
    """The vendor's `ptxas`, which comes with jax[cuda13]."""
    beside = (pathlib.Path(path) / "nvidia/cu13/bin/ptxas" for path in site.getsitepackages())
    found = shutil.which("ptxas") or next((str(path) for path in beside if path.is_file()), None)
    if found is None:
        raise ValueError("ptxas: expected it on PATH or with jax[cuda13] (pip install 'jax[cuda13]'), got neither.")
    return found


def needs(code: pathlib.Path, assemble: str) -> dict[str, int]:
    """Registers, spilled bytes and warps of one kernel, from its PTX."""
    with tempfile.NamedTemporaryFile() as out:
        command = [assemble, "-v", "-arch=sm_90a", str(code), "-o", out.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    threads = re.search(r"\.(?:req|max)ntid (\d+)", code.read_text())
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "warps": int(threads[1]) // 32,
    }


def row_of(
    name: str, time: int, dim: int, dtype: str, sharding: NamedSharding, assemble: Optional[str]
) -> common.Row:
    """Of one program; `assemble`: the assembler of a GPU, None for a TPU."""
    def abstract(*shape: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    q, k = abstract(1, time, HEADS, dim), abstract(1, time, KV_HEADS, dim)
    arguments = q, k, k, abstract(1, time, kind=jnp.int32)
    if name == "decode":
        stack = abstract(1, ROWS, KV_HEADS, time, dim, kind="uint16" if dtype == "bfloat16" else dtype)
        arguments = abstract(ROWS, HEADS, dim), stack, stack, abstract(ROWS, kind=jnp.int32)
    row = {"program": name, "T": time, "d": dim, "dtype": dtype}
    try:
        lowered = jax.jit(PROGRAMS[name]).lower(*arguments)
    except ValueError as error:  # What the kernel says it cannot do.
        return row | {"note": str(error)}
    if assemble is None:
        try:
            compiled = lowered.compile()
        except Exception as error:  # Of a compiler: they have no common class.
            return row | {"note": common.sentence(error)}
        memory = compiled.memory_analysis()
        return row | {
            "kernels": lowered.as_text().count("@tpu_custom_call("),
            "code MiB": memory.generated_code_size_in_bytes / 2**20, "temporary MiB": memory.temp_size_in_bytes / 2**20,
        }
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        # Kernels of Pallas alone use the matrix units here.
        codes = [path for path in pathlib.Path(folder).glob("*.ptx") if "mma" in path.read_text()]
        found = [needs(path, assemble) for path in sorted(codes)]
        (thunks,) = pathlib.Path(folder).glob("*.thunk_sequence.txt")
        shared = re.findall(r"kCustomKernel .* shared_memory: (\d+) bytes", thunks.read_text())
    return row | {
        "kernels": len(found), "registers": max(one["registers"] for one in found),
        "spilled bytes": sum(one["spilled"] for one in found), "shared KiB": max(map(int, shared)) / 2**10,
        "warps": ", ".join(str(one["warps"]) for one in found),
        "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def rows(target: str, times: list[int]) -> Iterator[list[common.Row]]:
    """A row per program, length and kind."""
    compiled_for, topology = TARGETS[target]
    mesh = Mesh(np.array(chips.devices_of(topology)[:1]), ("x",))
    sharding, assemble = NamedSharding(mesh, PartitionSpec()), assembler() if target == "h100" else None
    with targets.compiling_for(*compiled_for), contextlib.ExitStack() as stack:
        if target == "v5e":  # Pallas asks which TPU it is.
            stack.enter_context(jax.set_mesh(mesh))
        for dim, dtype in KINDS[target]:
            for time in times:
                for name in PROGRAMS:
                    yield [row_of(name, time, dim, dtype, sharding, assemble)]


def line(part: list[common.Row]) -> str:
    (row,) = part
    said = f"{row['program']:24} T {row['T']:<7} d {row['d']:<4} {row['dtype']:9}"
    if "note" in row:
        return f"{said} {row['note']}"
    if "registers" in row:
        said += f" {row['registers']} registers, {row['spilled bytes']} bytes spilled,"
        said += f" {row['shared KiB']:.0f} KiB shared, warps {row['warps']};"
    return f"{said} {row['kernels']} kernels, {row['temporary MiB']:.1f} MiB"


def main() -> None:
    with commands.user_mistakes():
        times = common.numbers("times", TIMES.value, "at least 128", lambda x: x >= 128)
        common.tell(rows(TARGET.value, times), JSON.value, line)


if __name__ == "__main__":
    JSON = commands.define_path("json", None, "Where the rows go.")
    TARGET = flags.DEFINE_enum("target", "h100", list(TARGETS), "Which chip.")
    TIMES = flags.DEFINE_list("times", ["2048", "8192", "32768", "131072"], "Lengths.")
    commands.run(main, prints=True)
