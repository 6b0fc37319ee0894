"""Every table of recorded runs, from their raw rows.

python -m experiments.studies.records

`experiments/results/README.md` is what this writes; nothing in it is written by hand. What the tables
mean is said in `experiments/results/FINDINGS.md`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Optional

from experiments import common
from experiments.studies import arms, comparison, long, outcome, paper_report, residual_linear, routed
from experiments.studies.comparison import UNCERTAINTY_COLUMNS
from experiments.studies.pretrained import report
from experiments.studies.pretrained.study import read_rows
from meta_attention_jax import analysis
from meta_attention_jax.analysis import Column

RESULTS = pathlib.Path(__file__).parent.parent / "results"

Row = dict[str, Any]


def rows_table(stored: Mapping[str, Any]) -> str:
    """Rows of a benchmark; columns that say the same in all rows become a line above."""
    rows = [{k: v for k, v in row.items() if _scalar(v)} for row in stored["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    same = [key for key in columns if len(rows) > 1 and len({repr(row.get(key)) for row in rows}) == 1]
    said = ", ".join(f"{key} {_text(rows[0][key])}" for key in same)
    left = [key for key in columns if key not in same]
    shown = [{key: _text(row.get(key)) for key in left} for row in rows]
    words = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    shape = [Column(key, key, "" if key in words else "s") for key in left]  # Numbers to the right.
    table = analysis.markdown_table(shown, shape)
    return f"In all rows: {said}.\n\n{table}" if said else table


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _text(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return {True: "yes", False: "no", None: analysis.format_value(None)}.get(value, str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def demo_table(folder: pathlib.Path) -> str:
    """The arms of `experiments.demo`, a table per corpus, and one long sequence."""
    rows = analysis.comparison_rows(_read(folder / "table.json"))
    parts = [f"**{corpus}**, test split\n\n{analysis.markdown_table(own, columns)}\n{notes}"
             for corpus, own, columns, notes in comparison.demo_parts(rows)]
    timing = _read(folder / "timing.json")
    parts.append("One long sequence through the trained models of tiny_lm\n\n"
                 + analysis.markdown_table(timing, long.columns_of(timing)))
    return "\n".join(parts)


def long_table(stored: Mapping[str, Any]) -> str:
    """Evaluation of long sequences."""
    return analysis.markdown_table(stored["rows"], long.columns_of(stored["rows"]))


def ablation_table(folder: pathlib.Path) -> str:
    """Means over seeds of the arms of an ablation."""
    lines = comparison.table(_read(folder / "rows.json"), list(arms.DEFAULT))
    tuned = _read(folder / "tuning.json")
    for line in lines:
        line["tried"] = len(tuned.get(arms.base_arm(line["arm"]), {}).get("tried", ())) or None
    return analysis.markdown_table(*comparison.written(lines)) + _pictures(folder)


def sweep_table(folder: pathlib.Path) -> str:
    """Settings of a sweep."""
    rows, points = _read(folder / "rows.json"), _read(folder / "sweep.json")["points"]
    found = outcome.concluded(rows, len(points))
    chosen = f"\nChosen: {found.pick}, {outcome.RULE}.\n" if found.pick else ""
    return analysis.markdown_table(*outcome.shown(found)) + chosen + _pictures(folder)


def paper_table(folder: pathlib.Path) -> str:
    """The answer to each of the paper's four numbers, and the arms; every reading is on its own page."""
    rows = _read(folder / "rows.json")["rows"]
    parts = [f"{len(rows)} runs; [every reading](paper/README.md)\n", paper_report.answer_table(rows)]
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        parts.append(f"\n{corpus}\n\n{paper_report.arms_table(rows, corpus)}")
    return "\n".join(parts) + _pictures(folder)


def prices_table(folder: pathlib.Path) -> str:
    """One model at several prices of its decisions."""
    rows = _read(folder / "rows.json")
    shares = [Column(name, name.removeprefix("fraction/"), ".1%") for name in rows[0] if name.startswith("fraction/")]
    found = [Column("price", "lambda", "g"), Column("nll", "nats hard", ".4f"), Column("cost", "cost", ".1%")]
    columns = found + shares
    said = f"{rows[0]['split']} split, {rows[0]['tokens']:,} tokens, step {rows[0]['step']}"
    return f"{said}\n\n{analysis.markdown_table(rows, columns)}{_pictures(folder)}"


def routed_table(folder: pathlib.Path) -> str:
    """A routed published model against full attention, a window, fixed layers and disorder."""
    stored = _read(folder / "rows.json")
    said = ", ".join(f"{name} {value}" for name, value in {**stored["setting"], **stored["environment"]}.items())
    return f"{said}\n\n{analysis.markdown_table(routed.lines(stored['rows']), routed.COLUMNS)}{_pictures(folder)}"


def comparison_table(folder: pathlib.Path) -> str:
    """Arms on a published model, then on its longer texts; differences, settings and more are on their own pages."""
    parts = []
    for part in (folder, *sorted(folder.glob("T*"), key=lambda path: int(path.name[1:]))):
        choices, rows = _read(part / "choices.json"), read_rows(part / "rows.jsonl")
        if not rows:
            continue
        about, page = choices["about"], (part / "README.md").relative_to(RESULTS)
        commits = ", ".join(dict.fromkeys(session["commit"] for session in choices["sessions"]))
        said = f"T {about['length']:,}, window {about['window']}: {len(rows):,} readings, gone on with on {commits}"
        table = analysis.markdown_table(report.lines(rows), report.columns_of(rows))
        parts.append(f"{said}; differences and settings: [its page]({page})\n\n{table}")
    return "\n".join(parts) + _pictures(folder)


def linear_table(folder: pathlib.Path) -> str:
    """Full attention, a window, and a window with linear attention to all older keys."""
    stored = _read(folder / "rows.json")
    fitted = ", ".join(f"{form} {one['first']:.4f} to {one['last']:.4f}" for form, one in stored["fitted"].items())
    said = f"distance from full attention's output, fitted on {stored['fitted']['softmax']['steps']} windows: {fitted}"
    return f"{said}\n\n{analysis.markdown_table(routed.lines(stored['rows']), residual_linear.COLUMNS)}"


def controllers_table(folder: pathlib.Path) -> str:
    """What ships, and what it was made by."""
    rows = []
    for path in sorted(folder.glob("*/routing.json")):
        said = _read(path)
        size = (path.parent / "routing.safetensors").stat().st_size
        rows.append({"controllers": path.parent.name, "step": said["step"], "bytes": f"{size:,}", **said["note"],
                     "sha256": said["sha256"], "model": said["backbone"]["path"],
                     "sha256 of the model": said["backbone"]["sha256"]})
    return analysis.markdown_table(rows, [Column(key, key) for key in rows[0]])


def uncertainty_table(folder: pathlib.Path) -> str:
    """Whether uncertainty finds the tokens that hardening hurts."""
    parts = [f"{name}\n\n{analysis.markdown_table(_read(folder / f'{name}.json')['rows'], UNCERTAINTY_COLUMNS)}"
             for name in ("soft", "hardened")]
    return "\n".join(parts) + _pictures(folder)


def compiled_table(stored: Mapping[str, Any]) -> str:
    """Memory and collectives of the programs of `experiments.checks.compile`."""
    return "\n".join(_compiled(report) for report in stored["rows"])


def _compiled(report: Mapping[str, Any]) -> str:
    said = ", ".join(f"{k} {_text(v)}" for k, v in report.items() if _scalar(v))
    rows = []
    for name, program in report["programs"].items():
        rows.append({"program": name})
        for key, value in program.items():
            inner = {f"{key}, {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            rows[-1] |= {k: _text(v) for k, v in inner.items() if _scalar(v)}
    columns = [Column(key, key) for key in dict.fromkeys(key for row in rows for key in row)]
    return f"{said}.\n\n{analysis.markdown_table(rows, columns)}"


def gpu_table(folder: pathlib.Path) -> str:
    """What was compared on a GPU, and the shapes that were timed."""
    stored = _read(folder / "first_run.json")
    passed = [row["passed"] for section in stored["checks"] for row in section["rows"]]
    said = f"{stored['device']}: {passed.count(True)} comparisons held, {passed.count(False)} did not"
    columns = [Column("what", "kernel"), Column("d", "d"), Column("shape", "queries, keys, warps, stages")]
    columns += [
        Column(key, f"{name}, ms", ".2f")
        for key, name in (("all", "all full"), ("f10", "10 % full"), ("l45", "45 % local"), ("local", "all local"))
    ]
    layers = [row for row in stored["timings"] if row["what"].startswith("hard") and "fwd" in row]
    whole = [Column("what", "routes"), Column("d", "d"), Column("fwd", "forward, ms", ".2f"),
             Column("both", "forward and backward, ms", ".2f")]
    timed = [row | {"shape": ", ".join(map(str, row["shape"]))} for row in stored["timings"] if "shape" in row]
    tables = [analysis.markdown_table(layers, whole), analysis.markdown_table(timed, columns)]
    return "\n\n".join([f"{said}; 13 tests ended in an error first ([why]({folder.name}/README.md)).", *tables])


def model_table(stored: Mapping[str, Any]) -> str:
    """What a model of kernels was checked on, and what it predicts; nothing of the second was measured."""
    of = lambda part: [row for row in stored["rows"] if row["part"] == part]  # noqa: E731
    checks, predictions = (rows_table({"rows": of(part)}) for part in ("check", "prediction"))
    return f"Checked on\n\n{checks}\n\nPredicted, not measured\n\n{predictions}"


def _pictures(folder: pathlib.Path) -> str:
    names = sorted(path.name for path in folder.glob("*.png"))
    return "".join(f"\n![{name[:-4]}]({folder.name}/{name})\n" for name in names)


@dataclasses.dataclass(frozen=True)
class Record:
    """One recorded run; run lengths and hardware are in `FINDINGS.md` where the rows lack them."""

    title: str
    path: str  # Of its rows, below `RESULTS`: a file, or a folder.
    command: str  # Of `python -m experiments.`, or of `make`.
    table: Callable[[Any], str] = rows_table  # Of the folder, or the content of the file; Markdown.
    commit: Optional[str] = None  # Where the rows do not say it.


RECORDS = (
    Record("The demo", "demo", "make demo", demo_table, "03ec59a"),
    Record("Arms on recall, 8 keys", "ablation_recall",
           "ablation --config=configs/recall.py --workdir=runs/ablation-recall8 --views=tokens "
           "--arms=bayesian,prior-free,full-only,local+full,linear,full+local,local", ablation_table, "7c3075d"),
    Record("Arms on recall with aggregates, 4 keys", "ablation_recall_oracle",
           "ablation --config=configs/recall_oracle.py --workdir=runs/ablation-recall --views=tokens",
           ablation_table, "e820864"),
    Record("Arms on State of the Union addresses", "ablation_sotu",
           "ablation --config=configs/tiny_lm.py --workdir=runs/ablation-sotu --seeds=3 --views=tokens "
           "--arms=bayesian,prior-free,full-only,local+full,local", ablation_table, "e820864"),
    Record("The paper's numbers, run", "paper", "studies.paper --workdir=runs/paper", paper_table,
           "b9bd5af, 015a815, 4f757c1 and b013af4"),
    Record("What uncertainty finds", "uncertainty",
           "studies.uncertainty --runs=... --out=... --batches=8", uncertainty_table, "e820864"),
    Record("The strength of the prior, on recall", "sweep_recall",
           "sweep --config=configs/sweep_concentration.py --workdir=runs/sweep", sweep_table, "9a3f822"),
    Record("One model at many prices, beside models trained apart", "prices",
           "evaluate --workdir=runs/recall --prices=-1,-0.6,-0.4,-0.3,-0.2,-0.1,0,0.1,0.2,0.4,0.6,0.8,1,1.2 "
           "--modes=hard --max_batches=16 --budget_cost=0.25 --beside=experiments/results/sweep_recall",
           prices_table, "e46feae"),
    Record("The strength of the prior, on State of the Union addresses", "sweep_sotu",
           "sweep --config=configs/sweep_concentration_sotu.py --workdir=runs/sweep-sotu", sweep_table, "9a3f822"),
    Record("Hard routing against the fastest full attention", "hard_routing.json", "benchmarks.hard_routing"),
    Record("Packed full attention against its alternatives", "dispatch_forms.json", "benchmarks.dispatch_forms"),
    Record("Evaluation of a long context that needs full attention", "long_evaluation.json",
           "benchmarks.long_evaluation --full_only=runs/long-full-only --routed=runs/long-bayesian", long_table),
    Record("Packed training steps", "packed_training.json",
           "benchmarks.packed_training --workdir=runs/long-bayesian --rounds=7"),
    Record("Decoding", "decode.json", "benchmarks.decode --rounds=15"),
    Record("Linear and local against full attention", "mechanisms.json", "benchmarks.mechanisms --rounds=5"),
    Record("Training steps", "train_step.json", "benchmarks.train_step --rounds=7"),
    Record("Memory", "memory.json", "benchmarks.memory"),
    Record("One program for many runs", "sweep_timing.json", "benchmarks.sweep"),
    Record("A corpus larger than memory", "corpus.json", "benchmarks.corpus"),
    Record("Published families, as `transformers` reads them", "parity.json", "checks.parity"),
    Record("Controllers that ship", "controllers",
           "retrofit --config=configs/retrofit_smollm2.py --workdir=runs/smollm2", controllers_table, "88cdf44"),
    Record("A routed published model", "routed",
           "studies.routed --workdir=experiments/results/controllers/smollm2 --windows=139 --rank=4", routed_table,
           "bdaabb3, the arms of layers d78efc4, windows from 51 on f20b483"),
    Record("The same by another recipe: KL to the unrouted model, a stronger prior", "routed_kl",
           "retrofit --config=configs/retrofit_smollm2.py --workdir=runs/kl --config.retrofit.loss=kl "
           "--config.prior.strength=8 --config.objective.beta=0.001 --config.retrofit.local_beta=0.03 && python -m "
           "experiments.studies.routed --workdir=runs/kl/end_to_end --out=runs/routed_kl --windows=51 --rank=4",
           routed_table, "trained at 5929196, read at d78efc4"),
    Record("Arms on a published model at equal shares (20 windows of each kind by all, 80 more by those that decide)",
           "pretrained_comparison", "studies.pretrained.compare --windows=100 --minutes=...", comparison_table,
           "of each session, below"),
    Record("The same arms on a second model, on which nothing was tuned", "pretrained_comparison_gemma",
           "studies.pretrained.compare --backbone=runs/gemma-3-270m-q4_k_m.gguf --windows=10 --seeds=1 "
           "--settings=experiments/results/pretrained_comparison --out=experiments/results/pretrained_comparison_gemma "
           "--parts=bounds,routers,patterns,end_to_end", comparison_table, "of each session, below"),
    Record("A window and residual linear attention by learned features, no router", "residual_linear",
           "studies.residual_linear --steps=100 --windows=30", linear_table, "d78efc4"),
    Record("Reading and going on, routed, against full attention alone", "routed_speed.json",
           "benchmarks.routed_speed --workdir=experiments/results/controllers/smollm2 --length=8064 --steps=128"),
    Record("Routing a 1B and an 8B model on an H100, compiled without one and not run", "compile_retrofit.json",
           "checks.compile --config=configs/retrofit_smollm2.py --config.retrofit.backbone=FOLDER --topology=h100 "
           "--config.model.dtype=bfloat16 --config.model.remat=True --config.data.sequence_length=4096 "
           "--config.model.window=256 --programs=soft,decode", compiled_table),
    Record("Routing a 1B model on an H100 by packed dispatch and our kernels, compiled without one and not run",
           "compile_packed_h100.json",
           "checks.compile --config=configs/retrofit_smollm2.py --config.retrofit.backbone=FOLDER --topology=h100 "
           "--config.model.dtype=bfloat16 --config.model.remat=True --config.data.sequence_length=4096 "
           "--config.model.window=256 --config.model.kernel=pallas --config.name=llama_1b "
           "--programs=soft,packed,decode", compiled_table),
    Record("The first run on a GPU: kernels of that commit, T 16,384, 16 heads, bfloat16", "gpu",
           "benchmarks.kernel_shapes", gpu_table, "f20b483"),
    Record("Cycles of the kernels on a TPU v5e, from the compiler's schedules; not run", "schedule_v5e.json",
           "checks.schedule"),
    Record("What kernels should take, by a model of their tiles", "kernel_model.json", "benchmarks.kernel_model",
           model_table),
    Record("Kernels compiled for an H100, without one and not run", "kernels_h100.json",
           "checks.kernels --target=h100"),
    Record("Kernels compiled for a TPU v5e, without one and not run", "kernels_v5e.json",
           "checks.kernels --target=v5e"),
    Record("Packed attention in the form that follows Triton in Pallas, compiled for an H100, not run",
           "kernels_successor.json", "checks.successor"),
    Record("What a run survives", "faults.json", "checks.faults"),
    Record("A TPU pod, compiled without one", "compile_pod_v5e_256.json",
           "checks.compile --config=configs/pod_v5e_256.py --topology=v5e:16x16", compiled_table),
    Record("A train step for an H100, compiled without one and not run", "compile_h100.json",
           "checks.compile --config=configs/smoke.py --topology=h100 --config.model.dtype=bfloat16 "
           "--config.model.num_layers=1 --programs=soft", compiled_table),
)


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def page(results: pathlib.Path = RESULTS) -> str:
    """All records as Markdown."""
    parts = [
        "# Recorded runs\n",
        "Written by `python -m experiments.studies.records` from the raw rows beside it; what it says "
        "is in [FINDINGS.md](FINDINGS.md). A ratio below 1: the first side is faster. Spread: the "
        "interquartile range of the ratios over interleaved rounds. Means over seeds are with the "
        "half-width of the 95 % interval.\n",
    ]
    for record in RECORDS:
        path = results / record.path
        stored = path if path.is_dir() else _read(path)
        where = {"commit": record.commit} if path.is_dir() else stored["environment"]
        said = ", ".join(f"{key} {value}" for key, value in where.items())
        command = record.command if record.command.startswith("make ") else f"python -m experiments.{record.command}"
        parts.append(f"## {record.title}\n\n    {command}\n\n{said}\n\n{record.table(stored)}")
    return "\n".join(parts)


def main() -> None:
    analysis.write_text(RESULTS / "README.md", page())
    print(f"{len(RECORDS)} records: {RESULTS}/README.md")


if __name__ == "__main__":
    common.run(main)
