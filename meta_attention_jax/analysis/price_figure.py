"""One model at many prices of its decision, beside models that were trained apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, frame, tidy

ONE = "one model, by lambda"


def prices_figure(
    rows: Sequence[Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]] = (),
    *,
    title: str = "",
    split: str = "validation",
) -> Figure:
    """Hard nats against cost: the curve of one model, and a mark per setting that was trained apart.

    Args:
      rows: of one model by rising price: `price`, `nll`, `cost`.
      beside: as `lines` of `pareto_figure`; a point with a "name" is a baseline.
      title: of the model.
      split: where the curve was measured.

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one price, got none.")
    kinds = dict.fromkeys(line["point"].get("name", "trained apart") for line in beside)
    figure, [[axes]] = frame(
        1, 8.0, [4.0], f"{title}: the price of full attention" if title else "The price of full attention",
        f"A hard token takes argmax E pi - lambda c; numbers are lambda, 0 is the plain argmax. {split} "
        "split. Down and to the left is better."
        + (" Other marks: means over seeds of models trained apart, as their sweep reports them." if beside
           else ""),
    )
    styles = palette.arm_styles([ONE, *kinds])
    for name in kinds:
        own = [line for line in beside if line["point"].get("name", "trained apart") == name]
        axes.plot([line["cost"] for line in own], [line["nll_hard"] for line in own], lw=0, ms=6,
                  color=styles[name][0], marker=styles[name][1], label=name)
    axes.plot([row["cost"] for row in rows], [row["nll"] for row in rows], lw=1.5, ms=6,
              color=styles[ONE][0], marker=styles[ONE][1], label=ONE)
    last = None
    for row in sorted(rows, key=lambda row: row["cost"]):
        # Prices that change nothing any more would be written on top of each other.
        if last is None or abs(row["cost"] - last) > 0.015:
            axes.annotate(f"{row['price']:g}", (row["cost"], row["nll"]), (5, 5),
                          textcoords="offset points", fontsize=FONT - 1)
            last = row["cost"]
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("projected cost of the hard routes", fontsize=FONT)
    axes.set_ylabel("hard nats per token", fontsize=FONT)
    axes.legend(frameon=False, fontsize=FONT - 1)
    tidy(axes)
    return figure
