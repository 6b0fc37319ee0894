"""What a run that has come to its end is shown by, from its log alone: a table and pictures. No flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.common import spared
from meta_attention_jax.config import read_config
from meta_attention_jax.files import Place
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.trackers import Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from meta_attention_jax.analysis import Column

DPI = 110


def table_of(
    evaluation: Mapping[str, Any], mechanisms: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Column]]:
    """Rows, soft and hard, and columns of an "eval" record."""
    from meta_attention_jax.analysis import Column

    columns = [Column("mode", "mode"), Column("nll", "nats", ".4f"),
               Column("bits_per_byte", "bits/byte", ".4f"), Column("kl", "KL, nats", ".4f"),
               Column("cost", "cost", ".1%"), Column("routing_entropy", "routing entropy", ".1%"),
               Column("usage_entropy", "usage entropy", ".1%"),
               *(Column(f"fraction/{name}", name, ".1%") for name in mechanisms)]
    return [{"mode": mode, **evaluation[mode]} for mode in ("soft", "hard")], columns


def figures_of(
    records: Sequence[Mapping[str, Any]], mechanisms: Sequence[str], corpus: str, name: str
) -> dict[str, Callable[[], Figure]]:
    """How to draw training and layers, of the records of `read_metrics`."""
    from experiments.studies.samples import layer_shares
    from meta_attention_jax import analysis

    last = [r for r in records if r["event"] == "eval"][-1]
    return {
        "Training": lambda: analysis.dynamics_figure(records, mechanisms),
        "Layers": lambda: analysis.routing_by_layer([layer_shares(mechanisms, corpus, name, last)]),
    }


def of_run(path: Place) -> Final:
    """For trackers; what cannot be had is left out."""
    pictures: dict[str, bytes] = {}
    table: list[dict[str, Any]] = []
    with spared(f"{path.name}: pictures and table"):
        from meta_attention_jax.analysis.canvas import render  # Pictures take a second to import.

        config, records = read_config(path / "config.json"), read_metrics(path)
        mechanisms = config["model"]["mechanisms"]
        rows, columns = table_of([r for r in records if r["event"] == "eval"][-1], mechanisms)
        table += ({column.title: row.get(column.key) for column in columns} for row in rows)
        for name, draw in figures_of(records, mechanisms, config["data"]["corpus"], config["name"]).items():
            with spared(f"{path.name}: {name.lower()}"):
                pictures[name.lower()] = render(draw(), dpi=DPI)
    return Final(pictures, table)
