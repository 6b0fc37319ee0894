"""A published model, routed by the controllers that ship with the project: one page of what that costs and saves.

python -m experiments.pretrained [--controllers=experiments/results/controllers/smollm2] [--workdir=runs/pretrained]

Reads the model out of its package, evaluates held-out prose, repeats and lookups with full attention alone, with the
window alone, routed at three prices, and with the best fixed layers at the same shares; colours a passage by where full
attention was asked for; and times a prefill of 2,048 tokens and decoding. Writes `<workdir>/index.html`.
"""

from __future__ import annotations

import html
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from experiments.benchmarks import routed_speed
from experiments.studies import routed
from meta_attention_jax import analysis
from meta_attention_jax.data.tasks import KINDS
from meta_attention_jax.fields import expect
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training import export

CONTROLLERS = common.define_path(
    "controllers", "experiments/results/controllers/smollm2", "An export of a run, with layers.json beside it."
)
DATA = common.define_data()
WORKDIR = common.define_path("workdir", "runs/pretrained", "Where the page goes.")
WINDOWS = flags.DEFINE_integer("windows", 18, "Of all tasks together.", 3)
PRICES = flags.DEFINE_list("prices", ["0.3", "0", "-0.3"], "Lambdas.")
LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of the timed prefill.", 1)
STEPS = flags.DEFINE_integer("steps", 64, "Tokens of the timed decoding.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each timing.", 1)
SHOWN = 288
"""Tokens of the coloured passage: a stretch and what of it comes back."""

SPEED = [
    analysis.Column("what", "what"), analysis.Column("tokens", "tokens", ",d"),
    analysis.Column("price", "lambda", "g"), analysis.Column("share", "on full", ".1%"),
    analysis.Column("times", "full / routed, seconds", ".2f"), analysis.Column("spread", "spread", ".2f"),
    analysis.Column("allowed", "allowed by FLOPs, decoding by bytes", ".2f"),
    analysis.Column("bytes", "routed / full, bytes of attention", ".2f"),
]


def passage(run: Run, price: float) -> str:
    """The first held-out window of `repeat`, coloured by layer."""
    model = run.model.clone(mode="hard", dispatch="dense")
    batch = next(b for b in routed.windows(run, "test", 3) if KINDS.index("repeat") in b.kind)
    hypers = run.hypers.routing.replace(price=jnp.float32(price))
    output = jax.jit(routed.forward, static_argnums=0)(model, run.params, batch, hypers)
    seen = jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0, :SHOWN], output.routing)
    first = int(np.argmax(batch.kind[0] == KINDS.index("repeat"))) + 1
    return analysis.coloured_html(
        run.pieces(batch.tokens[0, :SHOWN]), seen.route, seen.uncertainty, run.mechanisms,
        title=f"Held-out text that comes back; its second copy is known from token {first} on",
        caption="Each token is coloured by its mechanism, layer by layer; pale means uncertain.", mean=seen.mean,
    )


def page(run: Run, rows: routed.Rows, speed: Sequence[dict[str, Any]], records: Sequence[str], price: float) -> str:
    """Everything on one page."""
    said = export.described(run.path)["note"]
    about = (
        f"{run.config.retrofit.backbone}, {said.get('licence', 'licence not stated')}; controllers of step {run.step}, "
        f"commit {said.get('commit', 'unknown')}. Window {run.config.model.window}, {run.config.model.sinks} sinks, "
        f"T {run.dataset.sequence_length}, test split."
    )
    lines = routed.lines(rows)
    picture = analysis.share_figure(routed.summary(rows), title=run.config.name)
    analysis.save(picture, pathlib.Path(WORKDIR.value) / "share.png")
    sections = [
        analysis.Section("Nats and share of full attention", analysis.table_html(lines, routed.COLUMNS),
                         "Each arm sees the same windows; layers: the best fixed ones at the share of that lambda."),
        analysis.Section("What a share of full attention buys", analysis.figure_html(picture, "nats against share")),
        analysis.Section("Measured here, on this machine", analysis.table_html(speed, SPEED),
                         f"Interleaved, hard and packed, against full attention alone; {run.config.model.dtype}."),
        *(analysis.Section("From a record", f'<div class="scroll"><pre>{html.escape(record)}</pre></div>')
          for record in records),
        analysis.Section("Where full attention is asked for", passage(run, price)),
    ]
    return analysis.html_page("A published model, routed", sections, about)


def main() -> None:
    began = time.monotonic()
    with common.user_mistakes():
        run = load_run(CONTROLLERS.value, **DATA())
        expect(export.is_export(run.path), "controllers", "what run.export has written", CONTROLLERS.value)
        prices = common.finite("prices", PRICES.value)
        expect(prices, "prices", "at least one", prices)
        routed_speed.check_length(run, LENGTH.value, STEPS.value)
        ranking = run.path / "layers.json"
        expect("repeat" in run.config.data.tasks, "controllers", "a run with the task repeat", run.config.data.tasks)
        expect(ranking.is_file(), "controllers", f"{str(ranking)!r}, the layers by what they are worth", "none")
        about = routed.setting(run, "test", prices)
        order = routed.ranked_layers(ranking, {k: about[k] for k in routed.OF_MODEL}, about["tasks"])
        out = pathlib.Path(WORKDIR.value)
        common.check_output("workdir", out / "index.html")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    print(f"{run.config.retrofit.backbone}: {parameters:,} parameters, controllers included\n{run.dataset}")
    rows = routed.compare(run, "test", WINDOWS.value, prices, order, [], lambda rows: None, disorder=False)
    print(analysis.terminal_table(routed.lines(rows), routed.COLUMNS))
    middle = prices[len(prices) // 2]
    speed = routed_speed.rows(run, length=LENGTH.value, steps=STEPS.value, price=middle, rounds=ROUNDS.value)
    print(analysis.terminal_table(speed, SPEED))
    records = [path.read_text(encoding="utf-8") for path in sorted(run.path.glob("record*.md"))]
    analysis.write_json(out / "rows.json", [*rows, *speed])
    analysis.write_text(out / "index.html", page(run, rows, speed, records, middle))
    print(f"\npage: {out}/index.html   ({(time.monotonic() - began) / 60:.1f} minutes)")


if __name__ == "__main__":
    common.run(main)
