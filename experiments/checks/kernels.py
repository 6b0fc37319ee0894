"""What do the GPU's kernels need of an H100? Compiled by its compiler, without one; nothing is run.

JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=-1 python -m experiments.checks.kernels [--json=FILE] [--times=2048,32768]

needs the CUDA compiler (pip install "jax[cuda13]"). B 1, 16 heads of queries, 4 of keys, w 1024, 4 sinks. A row per
program (packed attention, and linear; forward and backward), length, head width and dtype: of its kernels the most
registers of a thread, all bytes that spill out of them, warps; and temporary memory.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import site
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import common as commands
from experiments.benchmarks import common
from experiments.benchmarks.kernels import program
from experiments.checks.chips import devices_of
from meta_attention_jax import targets
from meta_attention_jax.kernels import select, worklist
from meta_attention_jax.mechanisms import linear_gpu
from meta_attention_jax.mechanisms.mechanism import Reach
from meta_attention_jax.targets import Target

HEADS, KV_HEADS, WINDOW, SINKS = 16, 4, 1024, 4
KINDS = ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float16"), (64, "float32"), (128, "float32"))
"""(head width, dtype)."""


def packed(q, k, v, route):
    kernel = select.packed("pallas", q.shape, q.dtype, Target("gpu", 9.0))
    reaches = [Reach(), Reach(WINDOW, SINKS)]
    sizes = kernel.sizes(q.shape[1], reaches)
    work = worklist.build(route, None, causal=True, reaches=reaches, sizes=sizes)
    return kernel.attend(q, k, v, work, None)[0]


def linear(q, k, v, route):
    del route
    return linear_gpu.attend(q, k, v)


PROGRAMS = {
    f"{name} {direction}": program(function, direction)
    for name, function in (("packed", packed), ("linear", linear)) for direction in common.DIRECTIONS
}


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


def row_of(name: str, time: int, dim: int, dtype: str, sharding: NamedSharding, assemble: str) -> common.Row:
    """Of one program."""
    def abstract(*shape: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    q, k = abstract(1, time, HEADS, dim), abstract(1, time, KV_HEADS, dim)
    route = abstract(1, time, kind=jnp.int32)
    with tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(PROGRAMS[name]).lower(q, k, k, route)
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        # Kernels of Pallas alone use the matrix units here.
        codes = [path for path in pathlib.Path(folder).glob("*.ptx") if "mma" in path.read_text()]
        found = [needs(path, assemble) for path in sorted(codes)]
    return {
        "program": name, "T": time, "d": dim, "dtype": dtype, "kernels": len(found),
        "registers": max(one["registers"] for one in found), "spilled bytes": sum(one["spilled"] for one in found),
        "warps": ", ".join(str(one["warps"]) for one in found),
        "temporary MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def rows(times: list[int]) -> Iterator[list[common.Row]]:
    sharding = NamedSharding(Mesh(np.array(devices_of("h100")), ("x",)), PartitionSpec())
    assemble = assembler()
    with targets.compiling_for("gpu", 9.0):
        for dim, dtype in KINDS:
            for time in times:
                for name in PROGRAMS:
                    yield [row_of(name, time, dim, dtype, sharding, assemble)]


def line(part: list[common.Row]) -> str:
    (row,) = part
    return (f"{row['program']:24} T {row['T']:<7} d {row['d']:<4} {row['dtype']:9} {row['registers']} registers, "
            f"{row['spilled bytes']} bytes spilled, warps {row['warps']}; {row['temporary MiB']:.1f} MiB")


def main() -> None:
    with commands.user_mistakes():
        times = common.numbers("times", TIMES.value, "at least 128", lambda x: x >= 128)
        common.tell(rows(times), JSON.value, line)


if __name__ == "__main__":
    JSON = commands.define_path("json", None, "Where the rows go.")
    TIMES = flags.DEFINE_list("times", ["2048", "8192", "32768", "131072"], "Lengths.")
    commands.run(main, prints=True)
