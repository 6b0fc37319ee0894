"""Compiles a config's programs for devices that need not be there: do they fit, and what do they send?

python -m experiments.checks.compile --config=configs/pod_v5e_256.py --topology=v5e:16x16
    [--programs=soft,packed,decode] [--json=FILE] [--config.data.batch_size=512] ...

python -m experiments.checks.compile --config=configs/recall.py --topology=h100
    --config.model.dtype=bfloat16

Needs the compiler, `pip install 'jax[tpu]'` or `'jax[cuda13]'`, and no device. Exit code 1, after one sentence, when a
program does not fit into a chip's memory, or devices wait for each other where they should not.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any, Optional

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import common
from experiments.checks import chips

chips.alone()  # Before JAX starts.

import jax  # noqa: E402

from experiments.benchmarks import common as benchmarks  # noqa: E402
from meta_attention_jax.analysis.hlo import Collective, collectives  # noqa: E402
from meta_attention_jax.fields import expect  # noqa: E402
from meta_attention_jax.targets import compiling_for  # noqa: E402
from meta_attention_jax.training import aot, backbone, build  # noqa: E402
from meta_attention_jax.training.backbone import merge  # noqa: E402

PROGRAMS = {"soft": "train step, soft", "packed": "train step, packed hard", "decode": "decode step, hard"}
HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "NVIDIA H100 80GB HBM3": 80}
"""GiB per chip (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""
RESERVED = 0.25
"""GiB of it that programs cannot have; the compiler calls a v5e's memory 15.75G."""
SHORT = 64
"""Tokens at which attention has no loops, so that XLA's own FLOP count, which sees a loop's body once, is
that of the whole program."""
GIB = 2**30

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, e.g. v5e:16x16, v4:2x2x4; or h100, one.")
PROGRAM = flags.DEFINE_list("programs", list(PROGRAMS), f"Some of {', '.join(PROGRAMS)}.")
JSON = common.define_path("json", None, "Write the report here.")
flags.mark_flags_as_required(["config", "topology"])


class DoesNotFit(Exception):
    """More memory than a chip has."""


def vocabulary(config: ConfigDict) -> int:
    """V, without the corpus."""
    if config.retrofit.backbone:
        return backbone.described(config)[0].vocab_size
    if config.data.corpus == "recall":
        return build.build_dataset(config).vocab_size
    return config.data.vocab_size if config.data.tokenizer == "bpe" else 256


def compiled(name: str, lowered: Any, limit: str) -> Any:
    """The executable, or `DoesNotFit` where the compiler finds no room."""
    try:
        return lowered.compile()
    except Exception as error:
        for words in (
            r"Used (?P<got>[\d.]+[KMGT]?) of (?P<has>[\d.]+[KMGT]?) hbm",
            r"\((?P<got>[\d.]+[KMGT]?)\) exceeds available HBM \((?P<has>[\d.]+[KMGT]?)\)",
        ):
            if used := re.search(words, str(error)):
                room = f"at most {used['has']} per device for the {name}"
                raise DoesNotFit(f"memory: expected {room}, got {used['got']}.") from None
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            reason = str(error).splitlines()[0][:200]
            raise DoesNotFit(f"memory: expected the {name} to fit into {limit} per device, got: {reason}") from None
        raise


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def amounts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount(size)}" for name, size in parts.items())


def memory_of(executable: Any) -> dict[str, int]:
    """Bytes per device as the compiler counts them; outputs that reuse arguments count once."""
    found = executable.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def sent_rows(found: list[Collective]) -> list[dict[str, Any]]:
    """One row per kind and place: inside loops, or outside all of them."""
    rows: dict[Any, dict[str, Any]] = {}
    for collective in found:
        turns = " x ".join("?" if n is None else str(n) for n in collective.loops)
        place = {"kind": collective.kind, "in loops of": turns or "-"}
        row = rows.setdefault((collective.kind, turns), {**place, "places": 0, "times": 0, "MB": 0.0, "MB sent": 0.0})
        row["places"] += 1
        row["times"] += collective.times
        row["MB"] += collective.times * collective.size / 1e6
        row["MB sent"] += collective.times * collective.sent / 1e6
    return sorted(rows.values(), key=lambda row: -row["MB"])


def too_deep(found: list[Collective], config: ConfigDict, program: str = "soft") -> list[Collective]:
    """Collectives inside loops other than those over micro-batches and scanned layers: of the sampler,
    of attention or of dispatch, where nothing may wait for another device."""
    allowed: list[int] = []
    if program != "decode":
        allowed += [config.optimizer.accumulate - 1] * (config.optimizer.accumulate > 1)
        allowed += [config.model.num_layers] * config.model.scan_layers

    def fits(loops: tuple[Optional[int], ...]) -> bool:
        rest = iter(allowed)  # In this order, some left out.
        return all(turns in rest for turns in loops)

    return [c for c in found if not fits(c.loops)]


def flop_rows(config: ConfigDict, vocab: int) -> list[dict[str, Any]]:
    """Analytic FLOPs per token of a forward pass, by what spends them."""
    count = build.build_flops(config, vocab)
    parts = {
        "projections": count.projections, "MLP": count.mlp, "logits": count.logits,
        "controller": count.controller,
        **{f"attention, {name}, on all tokens": n for name, n in count.mechanisms.items()},
        "soft, all mechanisms": build.soft_flops(config, count),
    }
    for name in count.mechanisms:
        parts[f"hard, all tokens {name}"] = count.routed({name: 1.0})
    return [{"forward": name, "GFLOP per token": value / 1e9} for name, value in parts.items()]


def counted(config: ConfigDict, device: jax.Device) -> Optional[dict[str, float]]:
    """FLOPs per token of one more layer at SHORT tokens: the compiler's count, and ours; None where
    the compiler counts nothing, as the one for GPUs does without one."""
    if config.retrofit.backbone:  # Which has as many layers as it has.
        return None
    small = config.copy_and_resolve_references()
    small.update_from_flattened_dict(
        {"data.sequence_length": SHORT, "model.window": min(config.model.window, SHORT // 2)}
    )
    vocab, totals = 256, []
    for layers in (1, 2):
        small.model.num_layers = layers
        lowered = aot.lower_forward(small, vocab, device, SHORT)
        ours = build.soft_flops(small, build.build_flops(small, vocab))
        found = lowered.compile().cost_analysis()
        if not found:
            return None
        totals.append((found["flops"] / SHORT, ours))
    (first, ours_first), (second, ours_second) = totals
    return {"compiler": second - first, "analytic": ours_second - ours_first}


def report(config: ConfigDict, topology: str, programs: list[str]) -> dict[str, Any]:
    """Compiles, prints as it goes, and returns everything that was printed; raises `DoesNotFit`."""
    for program in programs:
        expect(program in PROGRAMS, "programs", f"some of {tuple(PROGRAMS)}", program)
    devices = chips.devices_of(topology)
    backbone.complete(config)
    build.validate_without_devices(config)
    target = ("gpu", 9.0) if topology == "h100" else ("tpu", 0.0)
    with compiling_for(*target):
        return _report(config, topology, programs, devices)


def _report(config: ConfigDict, topology: str, programs: list[str], devices: list[jax.Device]) -> dict[str, Any]:
    """`report`, once it is known for which devices."""
    if config.controller.name == "fixed":
        programs = [program for program in programs if program != "packed"]
    vocab = vocabulary(config)
    parallel = build.check_parallel(config, devices)
    kind = devices[0].device_kind
    has = HBM[kind] - RESERVED if kind in HBM else None
    limit = f"{has} GiB" if has else "a chip's memory"
    state = aot.abstract_state(config, vocab)
    whole = merge(aot.abstract_frozen(config, vocab), state.params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(whole))
    mesh = " x ".join(f"{name} {size}" for name, size in parallel.mesh.shape.items())
    tokens = f"{config.data.batch_size} x {config.data.sequence_length:,} tokens a step"
    print(f"{config.name}: {parameters:,} parameters, full attention {build.full_attention(config)}, "
          f"{tokens}, {len(devices)} x {kind} ({mesh}), {limit} each\n", flush=True)
    flops = flop_rows(config, vocab)
    print(benchmarks.markdown(flops) + "\n", flush=True)
    results: dict[str, Any] = {
        "config": config.name, "topology": topology, "device": kind, "mesh": mesh,
        "parameters": parameters, "flops": flops, "programs": {},
    }
    for number, program in enumerate(programs, 1):
        name = PROGRAMS[program]
        print(f"[{number}/{len(programs)}] {name}: compiling (minutes, for large models) ...", flush=True)
        began = time.monotonic()
        if program == "decode":
            lowered = aot.lower_decode(config, devices, vocab)
        else:
            lowered = aot.lower_train(config, devices, vocab, packed=program == "packed")
        executable = compiled(name, lowered, limit)
        told = _told(program, config, devices, vocab, executable, has, time.monotonic() - began)
        results["programs"][program] = told
        # Not every program that is too large is refused by the compiler; the chip would.
        if has and (total := told["memory"]["total"]) > has * GIB:
            raise DoesNotFit(f"memory: expected at most {limit} per device for the {name}, got {amount(total)}.")
        if told["collectives_in_inner_loops"] or told.get("gathered", 0) > 1.01 * told.get("needed", 0):
            results["wrong"] = name
    results["count"] = counted(config, devices[0])
    if results["count"] is not None:
        ratio = results["count"]["compiler"] / results["count"]["analytic"]
        print(f"FLOPs of a layer at T = {SHORT}, where it has no loops: the compiler counts {ratio:.3f} of "
              "the analytic number (it counts more than matrix products).")
    return results


def _told(
    program: str, config: ConfigDict, devices: list[jax.Device], vocab: int, executable: Any,
    has: Optional[float], seconds: float,
) -> dict[str, Any]:
    """Prints and returns what one executable needs and sends."""
    memory = memory_of(executable)
    share = f", {memory['total'] / has / GIB:.0%} of {has} GiB" if has else ""
    parts = {name: size for name, size in memory.items() if name != "total"}
    print(f"memory per device: {amount(memory['total'])}{share} ({amounts(parts)})")
    result: dict[str, Any] = {"memory": memory, "compile_seconds": seconds}
    if program != "decode":
        model = aot.training_bytes(config, devices, vocab)
        result["model"] = model
        print(f"memory model: {amount(sum(model.values()))}, "
              f"{sum(model.values()) / memory['total']:.2f} of the compiler's ({amounts(model)})")
    text = executable.as_text()
    if calls := re.findall(r'custom_call_target="(__cudnn[^"]*)"', text):
        result["cudnn"] = {name: calls.count(name) for name in sorted(set(calls))}
        print("calls of cuDNN: " + ", ".join(f"{name} {n}" for name, n in result["cudnn"].items()))
    found = collectives(text)
    result["collectives"] = sent_rows(found)
    print(benchmarks.markdown(result["collectives"]) if found else "collectives: none")
    if program != "decode" and (needed := aot.gathered_bytes(config, vocab)):
        gathered = sum(c.times * c.size for c in found if c.kind == "all-gather")
        result["gathered"], result["needed"] = gathered, needed
        print(f"gathered: {gathered / 1e6:.1f} MB, {gathered / needed:.3f} of what the split parameters need")
    deep = too_deep(found, config, program)
    result["collectives_in_inner_loops"] = len(deep)
    print("collectives inside loops of sampler, attention or dispatch: "
          + (", ".join(f"{c.kind} {c.shape}" for c in deep) or "none")
          + f"\n({seconds:.0f} s)\n", flush=True)
    return result


def main() -> None:
    with common.user_mistakes():
        try:
            results = report(CONFIG.value, TOPOLOGY.value, PROGRAM.value)
        except DoesNotFit as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    if JSON.value:
        benchmarks.write_json(JSON.value, [results])
    if "wrong" in results:
        print(f"error: collectives: expected none in inner loops and no gather beyond need, got others "
              f"in the {results['wrong']}.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    common.run(main, prints=True)
