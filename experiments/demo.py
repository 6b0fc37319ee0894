"""The main job: three arms on two corpora, one table, and a report to look at.

python -m experiments.demo [--workdir=runs/demo] [--corpora=recall,tiny_lm] [--quick]

On generated recall and on real text it trains the Bayesian controller, the prior-free softmax router
and full attention, evaluates all on the test split, soft and hard, and writes `<workdir>/report/`.
Each arm is an ordinary run directory: interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import importlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import common
from experiments.studies import arms, long, samples
from meta_attention_jax import analysis
from meta_attention_jax.data import recall
from meta_attention_jax.data.recall_floor import entropy_floor
from meta_attention_jax.objective import summarise
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.evaluation import Evaluator
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.parallel import Parallel

WORKDIR = common.define_path("workdir", "runs/demo", "Where the arms and the report go.")
CORPORA = flags.DEFINE_list("corpora", ["recall", "tiny_lm"], "Config files of configs/.")
QUICK = flags.DEFINE_bool("quick", False, "A few steps of each arm: tries everything in a minute.")

ARMS = ("bayesian", "prior-free", "full-only")
TEST_BATCHES = 32
SHOWN_TOKENS = 1024
TIMED_CORPUS, TIMED_LENGTH, TIMED_ROUNDS = "tiny_lm", 4096, 5
"""Where soft, hard and full-only evaluation are timed against each other: a length where they differ."""


def arm_config(corpus: str, arm: str) -> ConfigDict:
    """The corpus's config with the arm's controller."""
    config = arms.configured(importlib.import_module(f"configs.{corpus}").get_config(), arm)
    if QUICK.value:
        config.train.steps = 20
        config.train.eval_every = config.train.checkpoint_every = 20
        config.train.log_every = 5
        config.train.eval_batches = 1
    return config


def evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """Test metrics of a run, soft and hard."""
    parallel = Parallel("jit", jax.devices()[:1])
    evaluator = Evaluator(run.model, run.dataset, parallel)
    params, hypers = parallel.place((run.params, run.hypers.routing))
    results = {}
    for mode in ("soft", "hard"):
        sums = evaluator.sums(params, hypers, split="test", mode=mode, max_batches=1 if QUICK.value else TEST_BATCHES)
        results[mode] = summarise(sums, mechanisms=run.config.model.mechanisms, costs=run.hypers.routing.costs)
    return results


def table_row(corpus: str, arm: str, results: dict[str, dict[str, Any]], mechanisms: tuple[str, ...]) -> dict[str, Any]:
    """One row of the comparison table; routes are those of the hard run."""
    soft, hard = results["soft"], results["hard"]
    row = {
        "corpus": corpus,
        "arm": arm,
        "tokens": hard["tokens"],
        "nll_soft": soft["nll"],
        "nll_hard": hard["nll"],
        "bpb_soft": soft["bits_per_byte"],
        "bpb_hard": hard["bits_per_byte"],
        "kl": hard["kl"],
        "cost": hard["cost"],
        "routing_entropy": hard["routing_entropy"],
        "usage_entropy": hard["usage_entropy"],
        "collapsed_layers": hard["collapsed_layers"],
        **{k.replace("/", "_"): v for k, v in hard.items() if k.startswith("fraction/")},
    }
    if "kinds" in hard:
        query, other = recall.KIND_QUERY, recall.KIND_OTHER
        fractions = np.array(hard["kinds"]["fractions"])  # [layer kind mechanism]
        full = fractions[:, :, mechanisms.index("full")]
        layer = int(np.argmax(full[:, query] - full[:, other]))
        row |= {
            "accuracy_queries_soft": soft["kinds"]["accuracy"][query],
            "accuracy_queries_hard": hard["kinds"]["accuracy"][query],
            "queries_full": float(full[layer, query]),
            "others_full": float(full[layer, other]),
            "route_layer": layer,
        }
    return row


def curves(corpus: str, arm: str, run: Run) -> dict[str, Any]:
    """Training and validation nats of a run, from its own log."""
    records = read_metrics(run.path)
    trained = [r for r in records if r["event"] == "train"]
    held_out = [r for r in records if r["event"] == "eval"]
    steps, gate = run.config.train.steps, run.config.gate
    return {
        "corpus": corpus,
        "arm": arm,
        "steps": [r["step"] for r in trained],
        "train_nll": [r["nll"] for r in trained],
        "eval_steps": [r["step"] for r in held_out],
        "eval_nll_soft": [r["soft"]["nll"] for r in held_out],
        "eval_nll_hard": [r["hard"]["nll"] for r in held_out],
        "gate_start": gate.start * steps,
        "gate_end": gate.end * steps,
    }


def layers(corpus: str, arm: str, run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """Route fractions (hard run) and mean weights (soft run) per layer."""
    return {
        "corpus": corpus,
        "arm": arm,
        "fractions": results["hard"]["layers"]["fractions"],
        "mean_weights": results["soft"]["layers"]["mean"],
        "mechanisms": tuple(run.config.model.mechanisms),
    }


def shown_text(run: Run) -> dict[str, Any]:
    """The first test tokens with route, uncertainty and mean weights of every layer."""
    batch = next(run.dataset.eval_batches("test", max_batches=None))
    output = jax.jit(run.model.clone(mode="hard").apply)(
        {"params": run.params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        hypers=run.hypers.routing,
    )
    rows = -(-SHOWN_TOKENS // run.dataset.sequence_length)
    if run.dataset.num_kinds > 1:
        rows = min(rows, 6)
    keep = batch.loss_mask[:rows]
    routing = jax.device_get(output.routing)
    take = lambda values: np.asarray(values)[:, :rows][:, keep]  # noqa: E731
    pieces = run.pieces(batch.tokens[:rows][keep])
    if run.dataset.num_kinds > 1:  # Generated sequences have nothing to do with each other.
        for end in np.cumsum(keep.sum(axis=1)) - 1:
            pieces[end] += b"\n"
    return {
        "pieces": pieces,
        "route": take(routing.route),
        "uncertainty": take(routing.uncertainty),
        "mean": take(routing.mean),
        "mechanisms": tuple(run.config.model.mechanisms),
    }


def show_sample(run: Run) -> None:
    """Prints a short continuation of a test text, hard-routed, with the routes."""
    batch = next(run.dataset.eval_batches("test"))
    length, draw = 32, dict(temperature=0.8, top_p=0.9)
    if run.dataset.num_kinds > 1:  # Ends with the first question, to be answered by its value.
        length, draw = 1 + int(np.argmax(batch.kind[0] == recall.KIND_QUERY)), {}
    made = run.generate(batch.tokens[0, :length], steps=64, mode="hard", **draw)
    print(f"\n{run.config.name}, hard, goes on from {length} test tokens")
    print(samples.show_routes(run, made.ids, made.trace))


def write_report(
    out: pathlib.Path,
    rows: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    routes: list[dict[str, Any]],
    texts: dict[str, dict[str, Any]],
    floor: dict[str, float],
    timing: list[dict[str, Any]],
) -> None:
    """table.md, table.json, loss.png, routing.png, text_<corpus>.png, text.html, index.html."""
    rows = analysis.comparison_rows(rows)
    analysis.write_json(out / "table.json", rows)
    markdown, sections, text_sections = [], [], []
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        part = [row for row in rows if row["corpus"] == corpus]
        columns = analysis.demo_columns(corpus)
        print(f"\n{corpus}: test split, {part[0]['tokens']:,} tokens")
        print(analysis.terminal_table(part, columns))
        notes = "".join(f"* **{title}**: {note}\n" for title, note in analysis.column_notes(columns))
        markdown.append(f"## {corpus}\n\n{analysis.markdown_table(part, columns)}\n\n{notes}")
        sections.append(analysis.Section(corpus, analysis.table_html(part, columns)))
    if timing:
        print("\none long sequence, measured")
        columns = long.columns_of(timing)
        print(analysis.terminal_table(timing, columns))
        table = analysis.markdown_table(timing, columns)
        markdown.append(f"## Measured evaluation\n\n{table}\n")
        sections.append(analysis.Section("Measured evaluation", analysis.table_html(timing, columns)))
        analysis.write_json(out / "timing.json", timing)
    analysis.write_text(out / "table.md", "\n".join(markdown))
    with common.spared("pictures"):
        loss, routing = analysis.loss_curves(runs, floor), analysis.routing_by_layer(routes)
        analysis.save(loss, out / "loss.png")
        analysis.save(routing, out / "routing.png")
        sections += [
            analysis.Section("Loss", analysis.figure_html(loss, "Loss curves")),
            analysis.Section("Routing", analysis.figure_html(routing, "Routing per layer")),
        ]
    for corpus, text in texts.items():
        about = dict(
            title=f"{corpus}: where the Bayesian arm routes held-out text",
            caption="Each token is coloured by the mechanism it uses; pale means uncertain.",
        )
        mean = text.pop("mean")
        with common.spared("pictures"):
            analysis.save(analysis.coloured_figure(**text, **about), out / f"text_{corpus}.png")
        fragment = analysis.coloured_html(**text, **about, mean=mean)
        text_sections.append(analysis.Section(f"Held-out text of {corpus}", fragment))
    analysis.write_text(out / "text.html", analysis.html_page("Held-out text", text_sections))
    sections += text_sections
    analysis.write_text(out / "index.html", analysis.html_page("Meta-Attention: demo", sections))


def main() -> None:
    began = time.monotonic()
    root = pathlib.Path(WORKDIR.value)
    jobs = {}
    with common.user_mistakes():
        for corpus in CORPORA.value:
            if not pathlib.Path(f"configs/{corpus}.py").is_file():
                raise ValueError(f"corpora: expected files of configs/, got {corpus!r}.")
            for arm in ARMS:
                jobs[corpus, arm] = prepare(arm_config(corpus, arm), root / f"{corpus}-{arm}")
    rows, runs, routes, texts, floor = [], [], [], {}, {}
    for number, ((corpus, arm), job) in enumerate(jobs.items(), 1):
        print(f"\n[{number}/{len(jobs)}] {corpus} {arm}")
        try:
            train(job)
        except Diverged as error:
            common.fail(error)
        run = load_run(job.path)
        results = evaluate(run)
        rows.append(table_row(corpus, arm, results, tuple(run.config.model.mechanisms)))
        runs.append(curves(corpus, arm, run))
        routes.append(layers(corpus, arm, run, results))
        if arm == "bayesian":
            texts[corpus] = shown_text(run)
        if run.dataset.num_kinds > 1:
            floor[corpus] = entropy_floor(run.dataset.config, run.dataset.sequence_length)
    for corpus in CORPORA.value:
        show_sample(load_run(jobs[corpus, "bayesian"].path))
    timing = []
    if TIMED_CORPUS in CORPORA.value:
        timing = long.long_evaluation(
            jobs[TIMED_CORPUS, "full-only"].path,
            jobs[TIMED_CORPUS, "bayesian"].path,
            length=512 if QUICK.value else TIMED_LENGTH,
            rounds=1 if QUICK.value else TIMED_ROUNDS,
        )
    out = root / "report"
    write_report(out, rows, runs, routes, texts, floor, timing)
    print(f"\nreport: {out}/index.html   ({(time.monotonic() - began) / 60:.1f} minutes)")


if __name__ == "__main__":
    common.run(main)
