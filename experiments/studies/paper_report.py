"""From the rows of `experiments.studies.paper` to tables, pictures and the answers. No flags, no models."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any, Optional

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from experiments.benchmarks.common import environment
from meta_attention_jax import analysis
from meta_attention_jax.analysis import Column, canvas, palette
from meta_attention_jax.analysis.statistics import interval

Row = dict[str, Any]

AT_WEIGHT = " at "
"""In the name of an arm: the authors' settings at another weight of the KL."""

SHARES = ("projected_cost", "expected_cost", "prior_cost", "cost", "routing_entropy", "usage_entropy",
          "collapsed", "full")
NATS = ("nll_soft", "nll_hard", "gap")
TITLES = {
    "nll_soft": "nats soft", "nll_hard": "nats hard", "gap": "gap", "projected_cost": "projected cost",
    "expected_cost": "expected cost", "prior_cost": "prior's cost", "cost": "cost as run",
    "routing_entropy": "routing entropy", "usage_entropy": "usage entropy", "collapsed": "collapsed layers",
    "full": "on full",
}
COLUMNS = [Column("arm", "arm"), Column("seeds", "seeds", "d"),
           *(Column(name, TITLES[name]) for name in (*NATS, *SHARES))]

PRIOR_FREE = ("paper, KL weight 0", "softmax")
PUBLISHED = (
    ("projected cost, Bayesian", 0.251, ("paper",), ("projected_cost", "cost", "expected_cost", "prior_cost")),
    ("projected cost, prior-free", 0.593, PRIOR_FREE, ("projected_cost", "cost", "expected_cost")),
    ("routing entropy, Bayesian", 0.433, ("paper",), ("routing_entropy", "usage_entropy")),
    ("routing entropy, prior-free", 0.558, PRIOR_FREE, ("routing_entropy", "usage_entropy")),
)
"""(what, the paper's number, our arms for it, the readings of it; the paper's own words first)."""

NEAR, WIDE = 0.01, 0.05
"""A mean over seeds reproduces a number that it is this near to, or that its interval holds, unless the
half-width is wider than the second: such an interval holds anything."""


def table(rows: Sequence[Row], corpus: str, arms: Optional[Sequence[str]] = None) -> list[Row]:
    """A line per arm, means over seeds."""
    own = [row for row in rows if row["corpus"] == corpus]
    lines = []
    if arms is None:
        arms = list(dict.fromkeys(row["arm"] for row in own if AT_WEIGHT not in row["arm"]))
    for arm in arms:
        good = [row for row in own if row["arm"] == arm and "diverged" not in row]
        if good:
            line: Row = {"arm": arm, "seeds": len(good), "beta": good[0]["beta"]}
            for name in (*NATS, *SHARES):
                if values := [row[name] for row in good if name in row]:
                    line[f"{name}_mean"], line[f"{name}_pm"] = interval(values)
            lines.append(line)
    return lines


def written(lines: Sequence[Row]) -> list[Row]:
    """The lines with means and half-widths as text."""
    forms = {**dict.fromkeys(SHARES, ".1%"), **dict.fromkeys(NATS, ".3f"), "gap": "+.3f"}
    return [
        {**line, **{name: _text(line, name, form) for name, form in forms.items() if f"{name}_mean" in line}}
        for line in lines
    ]


def _text(line: Row, name: str, form: str) -> str:
    half = line[f"{name}_pm"]
    text = analysis.format_value(line[f"{name}_mean"], form)
    return text if math.isnan(half) else f"{text} ± {analysis.format_value(half, form.lstrip('+'))}"


def answers(rows: Sequence[Row]) -> list[Row]:
    """For each number of the paper, corpus, arm and reading: what we get, and the verdict."""
    found = []
    for what, published, arms, readings in PUBLISHED:
        for corpus in dict.fromkeys(row["corpus"] for row in rows):
            for line in table(rows, corpus, arms):
                for reading in readings:
                    if f"{reading}_mean" not in line:
                        continue
                    mean, half = line[f"{reading}_mean"], line[f"{reading}_pm"]
                    ok = abs(mean - published) <= (half if NEAR < half <= WIDE else NEAR)
                    found.append({
                        "what": what, "published": published, "corpus": corpus, "arm": line["arm"],
                        "reading": TITLES[reading], "ours": _text(line, reading, ".1%"),
                        "literal": reading == readings[0], "reproduced": ok,
                    })
    return found


def verdict(own: Sequence[Row]) -> str:
    """One number's answer, of its lines of `answers`."""
    met = [line for line in own if line["reproduced"]]
    if literal := [f"{line['corpus']}, {line['arm']}" for line in met if line["literal"]]:
        return f"reproduced ({'; '.join(literal)})"
    places = "; ".join(f"{line['reading']} ({line['corpus']}, {line['arm']})" for line in met)
    return f"not reproduced as it is named; met by {places}" if met else "not reproduced"


def answer_table(rows: Sequence[Row]) -> str:
    """One line for each of the paper's numbers."""
    found = answers(rows)
    lines = [{"number": what, "paper": f"{published:.1%}",
              "answer": verdict([line for line in found if line["what"] == what])}
             for what, published, _, _ in PUBLISHED]
    return analysis.markdown_table(lines, [Column(name, name) for name in ("number", "paper", "answer")])


def arms_table(rows: Sequence[Row], corpus: str) -> str:
    """One line for each arm."""
    return analysis.markdown_table(written(table(rows, corpus)), COLUMNS)


def page(rows: Sequence[Row], total: int) -> str:
    """All tables as Markdown; `total` runs are planned."""
    parts = [
        "# The paper's numbers, run\n",
        "" if len(rows) >= total else f"**Not finished: {len(rows)} of {total} runs.**\n",
        "Written by `python -m experiments.studies.paper` from `rows.json`: means over seeds on the test "
        "split with the half-width of the 95 % interval. Projected and expected cost are of the soft run's "
        "posterior means (by their argmax, and as they are); cost as run is of the hard run's routes; "
        "entropies are of log K. A number counts as reproduced if the interval holds it and is at "
        f"most {WIDE:.0%} wide to a side, or the mean is within {NEAR:.0%} of it.\n",
        "## The four numbers\n",
        answer_table(rows),
        "\n### Every reading\n",
        analysis.markdown_table(
            [{**line, "published": f"{line['published']:.1%}",
              "reproduced": "yes" if line["reproduced"] else "no"} for line in answers(rows)],
            [Column(name, title) for name, title in {
                "what": "number", "published": "paper", "corpus": "corpus", "arm": "our arm", "reading": "read as",
                "ours": "ours", "reproduced": "reproduced",
            }.items()],
        ),
    ]
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        parts += [f"\n## {corpus}\n", arms_table(rows, corpus)]
    if weights := weight_lines(rows):
        parts += [
            "\n## The weight of the KL (tiny_lm, the authors' settings)\n",
            analysis.markdown_table(written(weights), [Column("beta", "KL weight", "g"), *COLUMNS[1:]]),
            "\n![The weight of the KL](weight.png)\n",
        ]
    return "\n".join(parts) + "\n"


def weight_lines(rows: Sequence[Row]) -> list[Row]:
    """A line per KL weight of the authors' settings, from the smallest: 0, their prior-free arm, and the sweep's."""
    arms = list(dict.fromkeys(row["arm"] for row in rows if AT_WEIGHT in row["arm"]))
    lines = table(rows, "tiny_lm", [PRIOR_FREE[0], *arms]) if arms else []
    return sorted(lines, key=lambda line: line["beta"])


def weight_figure(lines: Sequence[Row]) -> Figure:
    """Nats, costs and entropies against the weight of the KL."""
    panels = (
        ("nats per token", ("nll_soft", "nll_hard"), False),
        ("cost", ("projected_cost", "expected_cost", "cost"), True),
        ("entropy, of log K", ("routing_entropy", "usage_entropy"), True),
    )
    figure, [grid] = canvas.frame(
        3, 3.6, [3.0], "The authors' settings at other weights of the KL",
        "tiny_lm, test split, means over seeds (bars: 95 % intervals, where there are several). The likelihood "
        "of a token stands against the KL of its layers; a weight of 1 is the paper's.",
        gap_x=0.9,
    )
    for axes, (title, names, share) in zip(grid, panels):
        styles = palette.arm_styles([TITLES[name] for name in names])
        for name in names:
            colour, marker = styles[TITLES[name]][:2]
            axes.errorbar(
                [line["beta"] for line in lines], [line[f"{name}_mean"] for line in lines],
                [0.0 if math.isnan(line[f"{name}_pm"]) else line[f"{name}_pm"] for line in lines],
                color=colour, marker=marker, ms=5, lw=1.5, capsize=2, label=TITLES[name],
            )
        least = min((line["beta"] for line in lines if line["beta"] > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least, linscale=0.6)  # Weight 0 has a place of its own.
        axes.set_xticks([0.0, *(w for w in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if w >= least)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(-least / 3, 1.6)
        axes.set_xlabel("weight of the KL")
        axes.set_ylabel(title)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=0.0)
        axes.legend(frameon=False, fontsize=9)
        canvas.tidy(axes)
    return figure


def write_results(out: pathlib.Path, rows: Sequence[Row], total: int) -> None:
    """Rows, page and pictures into a folder."""
    analysis.write_json(out / "rows.json", {"environment": environment(), "rows": list(rows)})
    analysis.write_text(out / "README.md", page(rows, total))
    if lines := weight_lines(rows):
        canvas.save(weight_figure(lines), out / "weight.png")
    print(f"{len(rows)} runs: {out / 'README.md'}")
