"""One self-contained HTML page for a run, an ablation or a sweep.

python -m experiments.report --workdir=runs/recall [--out=FILE] [--corpus=path:WHERE_THE_DATA_ARE_NOW]

Written to `<workdir>/report/index.html` unless --out is given. No scripts, no requests; all text is
escaped.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import common
from experiments.studies import reports
from meta_attention_jax import analysis
from meta_attention_jax.data.splits import RULES

WORKDIR = common.define_path("workdir", None, "A run, an ablation or a sweep.")
OUT = common.define_path("out", None, "The page; <workdir>/report/index.html when absent.")
CORPUS = flags.DEFINE_string("corpus", None, "Where a run's data are now: path:FILE_OR_FOLDER.")
DATA_SPLIT = flags.DEFINE_enum("data_split", None, RULES, "data.split, where it has to be another.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    out = pathlib.Path(OUT.value or pathlib.Path(WORKDIR.value) / "report" / "index.html")
    with common.user_mistakes():
        data = dict(corpus=CORPUS.value, data_split=DATA_SPLIT.value)
        kind, page = reports.report(WORKDIR.value, **data)
        common.check_output("out", out)
    text = page()
    with common.user_mistakes():
        analysis.write_text(out, text)
    print(f"{kind}: {out}")


if __name__ == "__main__":
    common.run(main)
