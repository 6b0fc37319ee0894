"""Is hard packed evaluation of trained models faster than full-only at a long context, and as good?

python -m experiments.benchmarks.long_evaluation --full_only=runs/a --routed=runs/b [--json=FILE]
    [--length=4096] [--rows=2] [--rounds=7]

Both are run directories on the same data. For `recall`, see the header of configs/recall_long.py.
"""

from __future__ import annotations

from absl import flags

from experiments import common as commands
from experiments.benchmarks import common
from experiments.studies import long
from meta_attention_jax import analysis

JSON = commands.define_path("json", None, "Write the rows here.")
FULL_ONLY = commands.define_path("full_only", None, "Run directory of the baseline.")
ROUTED = commands.define_path("routed", None, "Run directory of the routed arm.")
LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a sequence.", 1)
ROWS = flags.DEFINE_integer("rows", 2, "Sequences of the batch.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.", 1)
flags.mark_flags_as_required(["full_only", "routed"])


def main() -> None:
    with commands.user_mistakes():
        sizes = dict(length=LENGTH.value, rows=ROWS.value, rounds=ROUNDS.value)
        table = long.long_evaluation(FULL_ONLY.value, ROUTED.value, **sizes)
    common.tell([table], JSON.value, lambda rows: analysis.terminal_table(rows, long.columns_of(rows)))


if __name__ == "__main__":
    commands.run(main, prints=True)
