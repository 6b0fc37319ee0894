"""What should the packed kernels take where no chip has run them? A model of their tiles, and what it predicts.

python -m experiments.benchmarks.kernel_model [--out=experiments/results/kernel_model.json]

**GPU.** A program takes `fixed + steps x tile`; programs are dealt out to 132 multiprocessors, the longest first, and a
kernel takes what the busiest of them does, after the lists that it reads have been made. Of every kernel and shape that
an H200 has timed at T 16,384 (experiments/results/gpu; an H100 has the same multiprocessors), `tile` is from all tokens
on full attention and `fixed` from all local; 10 % full and 45 % local were timed as well, and say how far the model is
off. Making a list takes what it took there at any length, for it is many small programs that wait to be started. The
kernels have been changed since (fewer masks, queries read ahead), so what is predicted is of those of that day.

**TPU.** One core goes through all steps; a step takes as long as its cycles, or as what it moves: latency + bytes /
bandwidth. Cycles are those of the compiled schedules (experiments/results/schedule_v5e.json). The latency is the one
constant that is not the compiler's or the data sheet's: the mean of what four public timings of jax's flash attention
say, at lengths of 512 to 4,096 (jax-ml/jax#24633). That the model gives those back says that time goes with the number
of steps, and no more: their steps are all alike, and short, so they say nothing of cycles, nor whether a wait hides
behind work. So every prediction is made twice, the second time with waits added to work. The peer is splash attention,
its backward pass by two kernels, by the same model, in the better of two tile sizes.

**Both**: what has neither been timed nor scheduled counts as twice the time of its bytes: the GPU's linear attention,
transposing and packing on a TPU, choosing among outputs. A list is charged to a TPU as it was timed on the GPU.
Decoding: bytes alone. B 1, H = G = 16, d 128, w 1,024, 4 sinks, bfloat16.
"""

from __future__ import annotations

import functools
import heapq
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments import common as commands
from experiments.benchmarks import common, kernels
from experiments.benchmarks.kernel_shapes import PRODUCTS, SHARES, SIZES, work_of
from experiments.benchmarks.kernels import FULL, HEADS, LOCAL, SINKS, WINDOW, Case
from meta_attention_jax.kernels import gpu, gpu_rows, tpu, tpu_steps, worklist
from meta_attention_jax.kernels.worklist import WorkList
from meta_attention_jax.mechanisms import linear_gpu, triton
from meta_attention_jax.mechanisms.mechanism import Reach

RESULTS = pathlib.Path(__file__).parent.parent / "results"
TIMED = 16384  # T of the recorded timings.
NAMES = {"forward": "fwd", "dq": "dq", "dkv": "dkv"}  # In the record.
BYTES = 2  # Of a number.
UNTIMED = 2.0
"""Times the time of its bytes is what has never been timed taken for."""


class Chip(NamedTuple):
    """Figures of data sheets."""

    units: int  # Multiprocessors, or cores.
    bandwidth: float  # Bytes a second.


H100, V5E = Chip(132, 3.35e12), Chip(1, 819e9)
CLOCK = 197e12 / (4 * 128 * 128 * 2)  # Of a v5e: its FLOP/s over those of a cycle.
CUDNN = {"forward": 657e12, "forward+backward": 550e12}
"""FLOP/s of full attention, d 128: the public best forward, and what the H200 was timed at."""
FLASH = ((512, 2.36e-3), (1024, 9.49e-3), (2048, 37.61e-3), (4096, 144.97e-3))
"""(T, seconds) of jax's flash attention on a v5e, without a mask, tiles of 128 x 128; from FLOPs and seconds B H d is
16,384, and so B H 128 at d 128."""


class Cost(NamedTuple):
    """Seconds of one kernel in one shape."""

    before: float
    fixed: float  # Of a program.
    tile: float  # Of a step.


# ---------------------------------------------------------------------------------------------------------------- GPU


def programs_of(work: WorkList, kernel: str, shape: tuple[int, ...]) -> Float[np.ndarray, "programs"]:
    """Steps of every program of one head; a small tile for sinks counts as the part of a tile that it is."""
    queries, keys = shape[:2]
    time, block = work.slot.shape[1], work.sizes[0].block
    if kernel == "dkv":
        spans = np.asarray(gpu_rows.spans(work, time))
        steps = (spans[..., 3] // queries - spans[..., 0] // queries).sum(-1).ravel()
        return np.repeat(steps, work.sizes[0].tile // keys).astype(float)
    sinks = jnp.zeros_like(work.first) if work.sink_last is None else work.sink_last
    order, first, last, sinks = (np.asarray(x)[0] for x in (work.order, work.first, work.last, sinks))
    found = []
    for blocks in work.blocks:
        for slot in np.asarray(blocks.slot)[: int(blocks.count)]:
            for begin in range(slot, slot + block, queries):
                if order[begin] < time:
                    part = np.s_[begin : begin + queries]
                    low, high = first[part].min() // keys, last[part].max() // keys + 1
                    early = min(-(-sinks[part].max() // triton.LEAST), low * (keys // triton.LEAST))
                    found.append(high - low + early * triton.LEAST / keys)
    return np.asarray(found, float)


def busiest(steps: Float[np.ndarray, "programs"], cost: Cost, units: int, heads: int = HEADS) -> float:
    """Seconds of the unit that is done last."""
    loads = [0.0] * units
    for one in np.sort(np.repeat(steps, heads))[::-1]:
        heapq.heappush(loads, heapq.heappop(loads) + cost.fixed + cost.tile * float(one))
    return cost.before + max(loads)


def fit(row: dict[str, Any], kernel: str, before: float, works: dict[str, WorkList]) -> Cost:
    """tile and fixed of a recorded shape, by turns: each timing says one of them, given the other."""
    steps = {name: programs_of(works[name], kernel, row["shape"]) for name in ("all full", "all local")}
    cost = Cost(before, 0.0, 1e-6)
    for _ in range(20):
        for name, field, key in (("all full", "tile", "all"), ("all local", "fixed", "local")):
            without = cost._replace(**{field: 0.0})
            rest, one = busiest(steps[name], without, H100.units), busiest(steps[name], cost, H100.units)
            share = (1e-3 * row[key] - rest) / max(one - rest, 1e-12)
            step = getattr(cost, field) * max(share, 0.0) if getattr(cost, field) else 1e-6
            cost = cost._replace(**{field: step})
    return cost


@functools.lru_cache(maxsize=None)
def recorded() -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(milliseconds of what is made before kernels, rows of shapes)."""
    rows = json.loads((RESULTS / "gpu/first_run.json").read_text(encoding="utf-8"))["timings"]
    before: dict[str, float] = {}
    for row in rows:
        if "ms" in row and "shape" not in row:
            before.setdefault(row["what"], row["ms"])
    return before, [row for row in rows if "shape" in row and "all" in row]


def before_of(kernel: str) -> float:
    return 1e-3 * recorded()[0]["spans" if kernel == "dkv" else "table"]


@functools.lru_cache(maxsize=None)
def costs(dim: int) -> dict[str, Cost]:
    """Of the three kernels as `gpu.tuning_for` cuts them."""
    works, tuning = timed_works(), gpu.tuning_for(dim, "bfloat16", TIMED)
    shapes = {"forward": tuning.forward, "dq": tuning.dq, "dkv": tuning.dkv}
    return {
        kernel: fit(shape_row(kernel, dim, tuple(shape)), kernel, before_of(kernel), works)
        for kernel, shape in shapes.items()
    }


def shape_row(kernel: str, dim: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return next(
        row for row in recorded()[1]
        if (row["what"], row["d"], tuple(row["shape"])) == (NAMES[kernel], dim, shape)
    )


@functools.lru_cache(maxsize=None)
def timed_works() -> dict[str, WorkList]:
    return {name: work_of(TIMED, shares) for name, shares in SHARES.items()}


def checks() -> Iterator[common.Row]:
    """Of every kernel as it is cut: what the model says, over what was timed, of routes that it was not fitted to."""
    for dim in (128, 64):
        tuning = gpu.tuning_for(dim, "bfloat16", TIMED)
        for kernel, shape in (("forward", tuning.forward), ("dq", tuning.dq), ("dkv", tuning.dkv)):
            row, cost = shape_row(kernel, dim, tuple(shape)), costs(dim)[kernel]
            for name, key in (("10 % full", "f10"), ("45 % local", "l45")):
                model = 1e3 * busiest(programs_of(timed_works()[name], kernel, row["shape"]), cost, H100.units)
                yield {"part": "check", "chip": "H200", "what": f"{kernel}, {name}", "T": TIMED, "d": dim,
                       "model ms": model, "timed ms": row[key], "model / timed": model / row[key]}


def work_for(case: Case, sizes: list[Any]) -> WorkList:
    """Of a case's routes."""
    route = np.asarray(kernels.routes(case))
    group = np.where(route == FULL, 0, np.where(route == LOCAL, 1, -1)).astype(np.int32)
    build = functools.partial(worklist.build, causal=True, reaches=reaches(case), sizes=sizes)
    return jax.jit(build, static_argnums=1)(group, None)


def reaches(case: Case) -> list[Reach]:
    return [Reach(), Reach(case.window, case.sinks)]


def gpu_seconds(case: Case) -> dict[str, float]:
    """Of the parts of a routed layer on an H100."""
    parts = {"list": 1e-3 * recorded()[0]["worklist"]}
    work, tuning = work_for(case, [SIZES] * 2), gpu.tuning_for(case.dim, "bfloat16", case.time)
    shapes = {"forward": tuning.forward, "dq": tuning.dq, "dkv": tuning.dkv}
    for kernel in directions(case):
        parts[kernel] = busiest(programs_of(work, kernel, shapes[kernel]), costs(case.dim)[kernel], H100.units)
    parts["choosing"] = choosing(case, H100)
    if case.shares[1]:
        parts["linear"] = UNTIMED * linear_bytes(case) / H100.bandwidth
    return parts


def directions(case: Case) -> tuple[str, ...]:
    return tuple(PRODUCTS) if case.direction != "forward" else ("forward",)


def linear_bytes(case: Case) -> float:
    """Of the GPU's kernels: states (float32, of every chunk) written, carried and read, and arrays of the size of q; of
    all tokens, whatever their routes."""
    chunk = linear_gpu.shapes_for(case.dim, "bfloat16").chunk
    states = -(-case.time // chunk) * HEADS * (case.dim + 1) * case.dim * 4
    # Backward: states of gradients too, read by dK and dV each.
    arrays, times = (4, 4) if case.direction == "forward" else (12, 11)
    return arrays * array_bytes(case) + times * states


def array_bytes(case: Case) -> float:
    return case.time * HEADS * case.dim * BYTES


def choosing(case: Case, chip: Chip) -> float:
    """Each token's output among those of the mechanisms."""
    return UNTIMED * 4 * array_bytes(case) / chip.bandwidth


def gpu_peer(case: Case) -> float:
    """cuDNN, full and causal; its window by the same FLOP/s, which its own window of 1,024 does not reach."""
    pairs = case.time * (case.time + 1) / 2 if case.peer == "full" else case.time * min(case.window, case.time)
    products = 2 if case.direction == "forward" else 7
    return products * 2 * case.dim * HEADS * pairs / CUDNN[case.direction]


# ---------------------------------------------------------------------------------------------------------------- TPU


@functools.lru_cache(maxsize=None)
def schedule() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(kernel, head width) -> its rows, bfloat16, a row for each size that it was cut to."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in json.loads((RESULTS / "schedule_v5e.json").read_text(encoding="utf-8"))["rows"]:
        if row["dtype"] == "bfloat16":
            found.setdefault((row["kernel"], row["d"]), []).append(row)
    return found


class Waits(NamedTuple):
    """How a step waits for what it moves."""

    latency: float  # Seconds.
    added: bool  # To what it computes; else behind it.


def step_seconds(cycles: float, products: float, moved: float, waits: Waits) -> float:
    """Of a step: what it computes and what it waits for, the longer of them or both."""
    parts = max(cycles, products) / CLOCK, waits.latency + moved / V5E.bandwidth
    return sum(parts) if waits.added else max(parts)


@functools.lru_cache(maxsize=None)
def waits(added: bool) -> Waits:
    """The latency is what public timings leave of a step beside its bytes, and its cycles where those are added."""
    step = float(np.mean([took / flash_steps(time) for time, took in FLASH]))
    cycles = schedule()[FLASH_NAME, 128][0]["whole"] / CLOCK if added else 0.0
    return Waits(step - 2 * 128 * 128 * BYTES / V5E.bandwidth - cycles, added)


FLASH_NAME = "flash attention of jax, forward"


def flash_steps(time: int) -> int:
    return 128 * (time // 128) ** 2


def flash_checks() -> Iterator[common.Row]:
    (row,) = schedule()[FLASH_NAME, 128]
    for time, took in FLASH:
        step = step_seconds(row["whole"], row["products"], 2 * 128 * 128 * BYTES, waits(False))
        model = flash_steps(time) * step
        yield {"part": "check", "chip": "v5e", "what": "jax's flash attention", "T": time, "d": 128,
               "model ms": 1e3 * model, "timed ms": 1e3 * took, "model / timed": model / took}


def tpu_kernel(kernel: str, dim: int, flags: Float[np.ndarray, "steps"], wait: Waits) -> float:
    """Of all heads, from the flags of the steps of one."""
    (row,) = schedule()[kernel, dim]
    block, tile = row["block"], row["tile"]
    # Forward and dQ: another tile of keys every step; dK and dV: another block of queries and of cotangents.
    moved = 2 * (block if kernel == "dkv" else tile) * dim * BYTES
    seconds = functools.partial(step_seconds, products=row["products"], moved=moved, waits=wait)
    kinds = tpu_steps.WHOLE, tpu_steps.FIRST, tpu_steps.LAST
    whole, first, last = (tpu_steps.flag(flags, kind).sum() for kind in kinds)
    steps = whole * seconds(row["whole"]) + (len(flags) - whole) * seconds(row["masked"])
    return HEADS * (steps + (first * row["first"] + last * row["last"]) / CLOCK)


def tpu_seconds(case: Case, wait: Waits) -> dict[str, float]:
    """Of the parts of a routed layer on a v5e."""
    work = work_for(case, [tpu.sizes_for(case.dim, case.time, reaches(case))] * 2)
    parts = {"list": 1e-3 * recorded()[0]["worklist"]}
    for kernel in directions(case):
        steps = (tpu_steps.by_tile if kernel == "dkv" else tpu_steps.by_block)(work)
        flags = np.asarray(tpu_steps.of(steps.packed)[2])[: int(steps.count)]
        parts[kernel] = tpu_kernel(kernel, case.dim, flags, wait)
    both = case.direction != "forward"
    # q, k, v, and the output back; then these again, cotangents, and three gradients back.
    turned = 11 if both else 4
    parts["choosing"] = choosing(case, V5E)
    if case.shares[1]:
        parts["linear"] = sum(tpu_linear(kernel, case, wait) for kernel in directions(case))
        turned += 8 if both else 4
    parts["packing"] = UNTIMED * turned * 2 * array_bytes(case) / V5E.bandwidth
    return parts


def tpu_linear(kernel: str, case: Case, wait: Waits) -> float:
    """A chunk of a head a step: q, k, v and the output; q, k, v, dO and dQ, of which two numbers a token are left in
    eight rows; these and dK and dV."""
    (row,) = schedule()[f"linear, {kernel}", case.dim]
    arrays = {"forward": 4, "dq": 5, "dkv": 6}[kernel]
    numbers = 0 if kernel == "forward" else 2 * 8 * 4
    moved = row["block"] * (arrays * case.dim * BYTES + numbers)
    return HEADS * -(-case.time // row["block"]) * step_seconds(row["whole"], row["products"], moved, wait)


def tpu_peer(case: Case, wait: Waits) -> float:
    """Splash attention, which goes through the tiles that are not empty; every kernel in its better size."""
    names = [f"splash attention of jax, {kernel}" for kernel in directions(case)]
    return sum(min(splash_seconds(case, row, wait) for row in schedule()[name, case.dim]) for name in names)


def splash_seconds(case: Case, row: dict[str, Any], wait: Waits) -> float:
    by_tile = row["kernel"].endswith("dkv")
    rows, tiles = -(-case.time // row["block"]), -(-case.time // row["tile"])
    met = sum(-(-(i + 1) * row["block"] // row["tile"]) for i in range(rows))
    moved = 2 * (row["block"] if by_tile else row["tile"]) * case.dim * BYTES
    ends = (tiles if by_tile else rows) * (row["first"] + row["last"]) / CLOCK
    return HEADS * (met * step_seconds(row["whole"], row["products"], moved, wait) + ends)


# -------------------------------------------------------------------------------------------------------------- tables


def cases() -> Iterator[tuple[str, Case]]:
    """(chip, case), the goals of the kernels' benchmark."""
    found = kernels.cases([16384, 32768, 131072])
    found += [Case("10 % full, 90 % local", 32768, (0.1, 0.0, 0.9), direction) for direction in common.DIRECTIONS]
    for case in found:
        if case.dim == 128:
            yield "H100", case
    for direction in common.DIRECTIONS:
        yield "v5e", Case("10 % full", 32768, kernels.mixed(0.1), direction, 3.0 if direction == "forward" else None)
        yield "v5e", Case("10 % full, 90 % local", 32768, (0.1, 0.0, 0.9), direction)


def predicted(chip: str, case: Case) -> common.Row:
    """One row: speed against the fastest full attention, and what the routed layer spends its time on."""
    more = {}
    if chip == "H100":
        parts, peer = gpu_seconds(case), gpu_peer(case)
    else:
        parts, peer = tpu_seconds(case, waits(False)), tpu_peer(case, waits(False))
        more = {"waits added": tpu_peer(case, waits(True)) / sum(tpu_seconds(case, waits(True)).values())}
    whole = sum(parts.values())
    return {
        "part": "prediction", "chip": chip, "what": case.name, "T": case.time, "direction": case.direction,
        "speedup": peer / whole, **more, "goal": case.goal, "ms": 1e3 * whole, "peer ms": 1e3 * peer,
        **{f"{name} ms": 1e3 * value for name, value in parts.items()},
    }


def decoding(time: int = 32768, share: float = 0.1) -> common.Row:
    """A new token on an H100, by the bytes of keys, values and states that rows of these shares read, on average; every
    row's state is written too. Reading the past of all rows is the peer."""
    number = HEADS * 128 * BYTES
    past, window, state = 2 * time * number, 2 * (WINDOW + SINKS) * number, 2 * HEADS * 129 * 128 * 4
    full, _, local = kernels.mixed(share)
    read = full * past + local * window + state
    return {"part": "prediction", "chip": "H100", "what": f"decode, {share:.0%} full", "T": time,
            "speedup": past / read, "goal": 5.0, "MiB a row": read / 2**20, "peer MiB a row": past / 2**20}


def rows() -> Iterator[list[common.Row]]:
    yield list(checks())
    yield list(flash_checks())
    for chip in ("H100", "v5e"):
        yield [predicted(name, case) for name, case in cases() if name == chip]
    yield [decoding()]


def main() -> None:
    with commands.user_mistakes():
        common.tell(rows(), OUT.value)


if __name__ == "__main__":
    OUT: Optional[Any] = commands.define_path("out", None, "Where the rows go.")
    commands.run(main, prints=True)
