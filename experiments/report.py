"""One self-contained HTML page for a run, an ablation or a sweep.

python -m experiments.report --workdir=runs/recall [--out=FILE] [--corpus=path:WHERE_THE_DATA_ARE_NOW]

Written to `<workdir>/report/index.html` unless --out is given. No scripts, no requests; all text is escaped.
"""

from __future__ import annotations

from absl import flags

from experiments import common
from experiments.studies import reports
from meta_attention_jax import analysis
from meta_attention_jax.files import at

WORKDIR = common.define_path("workdir", None, "A run, an ablation or a sweep.", buckets=True)
OUT = common.define_path("out", None, "The page; <workdir>/report/index.html when absent.", buckets=True)
DATA = common.define_data()
flags.mark_flag_as_required("workdir")


def main() -> None:
    out = at(OUT.value or at(WORKDIR.value) / "report" / "index.html")
    with common.user_mistakes():
        kind, page = reports.report(WORKDIR.value, **DATA())
        common.check_output("out", out)
    text = page()
    with common.user_mistakes():
        analysis.write_text(out, text)
    print(f"{kind}: {out}")


if __name__ == "__main__":
    common.run(main)
