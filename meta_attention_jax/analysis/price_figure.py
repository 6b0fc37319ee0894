"""One model at many prices of its decision, beside models that were trained apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from meta_attention_jax.analysis import palette
from meta_attention_jax.analysis.canvas import FONT, frame, legend, tidy

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
    """
    if not rows:
        raise ValueError("rows: expected at least one price, got none.")
    kinds = dict.fromkeys(line["point"].get("name", "trained apart") for line in beside)
    figure, [[axes]] = frame(
        1, 8.0, [4.0], f"{title}: the price of full attention" if title else "The price of full attention",
        f"A hard token takes argmax E pi - lambda c; numbers are lambda, 0 is the plain argmax. Measured "
        f"on the {split} split. Down and to the left is better."
        + (" Other marks: means over seeds of models trained apart, as their sweep reports them." if beside else ""),
    )
    styles = palette.arm_styles([ONE, *kinds])
    for name in kinds:
        own = [line for line in beside if line["point"].get("name", "trained apart") == name]
        axes.plot([line["cost"] for line in own], [line["nll_hard"] for line in own], lw=0, ms=6,
                  color=styles[name][0], marker=styles[name][1], label=name)
    axes.plot([row["cost"] for row in rows], [row["nll"] for row in rows], lw=1.5, ms=6,
              color=styles[ONE][0], marker=styles[ONE][1], label=ONE)
    told: list[float] = []
    for row in sorted(rows, key=lambda row: abs(row["price"])):  # 0 is told first.
        # Prices that change little would be written on top of each other.
        if all(abs(row["cost"] - cost) > 0.03 for cost in told):
            axes.annotate(f"{row['price']:g}", (row["cost"], row["nll"]), (5, 6),
                          textcoords="offset points", fontsize=FONT - 1)
            told.append(row["cost"])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("projected cost of the hard routes", fontsize=FONT)
    axes.set_ylabel("hard nats per token", fontsize=FONT)
    legend(figure, axes.get_legend_handles_labels()[0], 5)
    tidy(axes)
    return figure
