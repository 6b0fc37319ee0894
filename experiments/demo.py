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

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import common
from experiments.studies import arms, comparison, final, long, samples
from meta_attention_jax import analysis
from meta_attention_jax.data import recall
from meta_attention_jax.data.recall import entropy_floor
from meta_attention_jax.fields import expect
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.evaluation import logits_and_routing
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.loop import Diverged, train

WORKDIR = common.define_path("workdir", "runs/demo", "Where the arms and the report go.")
CORPORA = flags.DEFINE_list("corpora", ["recall", "tiny_lm"], "Config files of configs/.")
QUICK = flags.DEFINE_bool("quick", False, "A few steps of each arm: tries everything in a minute.")

Rows = list[dict[str, Any]]

ARMS = ("bayesian", "prior-free", "full-only")
TEST_BATCHES = 32
SHOWN_TOKENS = 1024
TIMED_CORPUS, TIMED_LENGTH, TIMED_ROUNDS = "tiny_lm", 4096, 5
"""Where soft, hard and full-only evaluation are timed against each other: a length where they differ."""


def arm_config(corpus: str, arm: str) -> ConfigDict:
    """The corpus's config with the arm's controller."""
    config = arms.configured(importlib.import_module(f"configs.{corpus}").get_config(), arm)
    if QUICK.value:
        config.train.update(steps=20, eval_every=20, checkpoint_every=20, log_every=5, eval_batches=1)
    return config


def table_row(
    corpus: str, arm: str, results: dict[str, dict[str, Any]], mechanisms: tuple[str, ...], asks: bool
) -> dict[str, Any]:
    """One row of the comparison table; routes are those of the hard run. `asks`: the corpus is `recall`."""
    soft, hard = results["soft"], results["hard"]
    same = ("kl", "cost", "routing_entropy", "usage_entropy", "collapsed_layers")
    row = {
        "corpus": corpus, "arm": arm, "tokens": hard["tokens"],
        "nll_soft": soft["nll"], "nll_hard": hard["nll"],
        "bpb_soft": soft["bits_per_byte"], "bpb_hard": hard["bits_per_byte"],
        **{key: hard[key] for key in same},
        **{k.replace("/", "_"): v for k, v in hard.items() if k.startswith("fraction/")},
    }
    if asks:
        query, other = recall.KIND_QUERY, recall.KIND_OTHER
        fractions = np.array(hard["kinds"]["fractions"])  # [layer kind mechanism]
        full = fractions[:, :, mechanisms.index("full")]
        layer = int(np.argmax(full[:, query] - full[:, other]))
        row |= {
            **{f"accuracy_queries_{mode}": results[mode]["kinds"]["accuracy"][query] for mode in ("soft", "hard")},
            "queries_full": float(full[layer, query]),
            "others_full": float(full[layer, other]),
            "route_layer": layer,
        }
    return row


def curves(corpus: str, arm: str, run: Run) -> dict[str, Any]:
    """Training and validation nats of a run, from its own log."""
    records = read_metrics(run.path)
    trained, held_out = ([r for r in records if r["event"] == event] for event in ("train", "eval"))
    steps, gate = run.config.train.steps, run.config.gate
    return {
        "corpus": corpus, "arm": arm,
        "steps": [r["step"] for r in trained],
        "train_nll": [r["nll"] for r in trained],
        "eval_steps": [r["step"] for r in held_out],
        "eval_nll_soft": [r["soft"]["nll"] for r in held_out],
        "eval_nll_hard": [r["hard"]["nll"] for r in held_out],
        "gate_start": gate.start * steps,
        "gate_end": gate.end * steps,
    }


def shown_text(run: Run) -> dict[str, Any]:
    """The first test tokens with route, uncertainty and mean weights of every layer."""
    batch = next(run.dataset.eval_batches("test"))
    _, routing = logits_and_routing(
        run.model.clone(mode="hard"), run.params, batch.tokens, batch.segment_ids, batch.positions, run.hypers.routing
    )
    generated = run.config.data.corpus == "recall"  # Sequences that have nothing to do with each other.
    rows = -(-SHOWN_TOKENS // run.dataset.sequence_length)
    return samples.text_of(run, batch, routing, batch.loss_mask[: min(rows, 6) if generated else rows], apart=generated)


def show_sample(run: Run) -> None:
    """Prints a short continuation of a test text, hard-routed, with the routes."""
    batch = next(run.dataset.eval_batches("test"))
    length, draw = 32, dict(temperature=0.8, top_p=0.9)
    if run.config.data.corpus == "recall":  # Ends with the first question, to be answered by its value.
        length, draw = 1 + int(np.argmax(batch.kind[0] == recall.KIND_QUERY)), {}
    made = run.generate(batch.tokens[0, :length], steps=64, mode="hard", **draw)
    print(f"\n{run.config.name}, hard, goes on from {length} test tokens")
    print(samples.show_routes(run, made.ids, made.trace))


def write_report(
    out: pathlib.Path, rows: Rows, runs: Rows, routes: Rows, texts: dict[str, dict[str, Any]], floor: dict[str, float],
    timing: Rows,
) -> None:
    """table.md, table.json, loss.png, routing.png, text_<corpus>.png, text.html, index.html."""
    rows = analysis.comparison_rows(rows)
    analysis.write_json(out / "table.json", rows)
    markdown, sections, text_sections = [], [], []

    def table(title: str, said: str, part: Rows, columns: list[analysis.Column], notes: str) -> None:
        print(f"\n{said}\n{analysis.terminal_table(part, columns)}")
        markdown.append(f"## {title}\n\n{analysis.markdown_table(part, columns)}\n{notes}")
        sections.append(analysis.Section(title, analysis.table_html(part, columns)))

    for corpus, part, columns, notes in comparison.demo_parts(rows):
        table(corpus, f"{corpus}: test split, {part[0]['tokens']:,} tokens", part, columns, f"\n{notes}")
    if timing:
        table("Measured evaluation", "one long sequence, measured", timing, long.columns_of(timing), "")
        analysis.write_json(out / "timing.json", timing)
    analysis.write_text(out / "table.md", "\n".join(markdown))
    with common.spared("pictures"):
        figures = {"Loss": ("Loss curves", analysis.loss_curves(runs, floor)),
                   "Routing": ("Routing per layer", analysis.routing_by_layer(routes))}
        for title, (description, figure) in figures.items():
            analysis.save(figure, out / f"{title.lower()}.png")
            sections.append(analysis.Section(title, analysis.figure_html(figure, description)))
    for corpus, text in texts.items():
        about = dict(title=f"{corpus}: where the Bayesian arm routes held-out text",
                     caption="Each token is coloured by the mechanism it uses; pale means uncertain.")
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
            expect(pathlib.Path(f"configs/{corpus}.py").is_file(), "corpora", "files of configs/", corpus)
            for arm in ARMS:
                jobs[corpus, arm] = prepare(arm_config(corpus, arm), root / f"{corpus}-{arm}")
    rows, runs, routes, texts, floor = [], [], [], {}, {}
    for number, ((corpus, arm), job) in enumerate(jobs.items(), 1):
        print(f"\n[{number}/{len(jobs)}] {corpus} {arm}")
        try:
            train(job, final=final.of_run)
        except Diverged as error:
            common.fail(error)
        run = load_run(job.path)
        most = 1 if QUICK.value else TEST_BATCHES
        results = {mode: run.evaluate("test", mode=mode, max_batches=most) for mode in ("soft", "hard")}
        asks = run.config.data.corpus == "recall"
        rows.append(table_row(corpus, arm, results, run.mechanisms, asks))
        runs.append(curves(corpus, arm, run))
        routes.append(samples.layer_shares(run.mechanisms, corpus, arm, results))
        if arm == "bayesian":
            texts[corpus] = shown_text(run)
        if asks:
            floor[corpus] = entropy_floor(run.dataset.config, run.dataset.sequence_length)
    for corpus in CORPORA.value:
        show_sample(load_run(jobs[corpus, "bayesian"].path))
    timing = []
    if TIMED_CORPUS in CORPORA.value:
        length, rounds = (512, 1) if QUICK.value else (TIMED_LENGTH, TIMED_ROUNDS)
        sides = (jobs[TIMED_CORPUS, arm].path for arm in ("full-only", "bayesian"))
        timing = long.long_evaluation(*sides, length=length, rounds=rounds)
    out = root / "report"
    write_report(out, rows, runs, routes, texts, floor, timing)
    print(f"\nreport: {out}/index.html   ({(time.monotonic() - began) / 60:.1f} minutes)")


if __name__ == "__main__":
    common.run(main)
