"""What a run answers: the routes of a text, a continuation, and HTML for notebooks."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from jaxtyping import Bool, Float, Int

from meta_attention_jax.generation import Trace
from meta_attention_jax.objective import flatten_scalars

if TYPE_CHECKING:
    import pandas


def records_frame(records: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """A row per record of a log: event and step first, "/" in nested names."""
    import pandas

    head = ("event", "step")
    return pandas.DataFrame([
        {name: record[name] for name in head}
        | flatten_scalars({k: v for k, v in record.items() if k not in head})
        for record in records
    ])


def table_html(rows: Mapping[str, Any]) -> str:
    """Names and values as a small table."""
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


class Html(str):
    """HTML that a notebook shows."""

    def _repr_html_(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True)
class TextRoutes:
    """Routing of one text."""

    pieces: list[bytes]  # The text of every token; UTF-8 characters may be split between bytes.
    mechanisms: tuple[str, ...]  # Names, the mechanism axis.
    # alpha of the Dirichlet posterior; None without one.
    concentration: Optional[Float[np.ndarray, "layer token mechanism"]]
    mean: Float[np.ndarray, "layer token mechanism"]  # E[pi].
    uncertainty: Float[np.ndarray, "layer token"]  # u in [0, 1].
    route: Int[np.ndarray, "layer token"]  # k*, index into `mechanisms`.
    hard: Bool[np.ndarray, "layer token"]  # Whether the token used k* alone.

    def frame(self) -> pandas.DataFrame:
        """One row per layer and token: layer, position, token, mechanism, hard, uncertainty, and mean and alpha by
        mechanism."""
        import pandas

        layers, tokens = self.route.shape
        columns: dict[str, Any] = {
            "layer": np.repeat(np.arange(layers), tokens),
            "position": np.tile(np.arange(tokens), layers),
            "token": [piece.decode(errors="replace") for piece in self.pieces] * layers,
            "mechanism": np.asarray(self.mechanisms)[self.route.ravel()],
            "hard": self.hard.ravel(),
            "uncertainty": self.uncertainty.ravel(),
        }
        for k, name in enumerate(self.mechanisms):
            columns[f"mean/{name}"] = self.mean[..., k].ravel()
            if self.concentration is not None:
                columns[f"alpha/{name}"] = self.concentration[..., k].ravel()
        return pandas.DataFrame(columns)

    def html(self, *, title: str, layer: Optional[int] = None) -> Html:
        """The text coloured by mechanism; one layer or all."""
        from meta_attention_jax import analysis  # The only use of pictures; they take a second.

        layers = list(range(len(self.route)))
        if layer is not None and layer not in layers:
            raise ValueError(f"layer: expected one of {layers}, got {layer}.")
        chosen = layers if layer is None else [layer]
        return Html(analysis.coloured_html(
            self.pieces,
            self.route[chosen],
            self.uncertainty[chosen],
            self.mechanisms,
            title=title,
            caption="Each token is coloured by its mechanism; pale means uncertain.",
            mean=self.mean[chosen],
            layer_names=[f"layer {index}" for index in chosen],
        ))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A prompt and what the model made of it; prints as text."""

    text: str  # Prompt and continuation, without its end.
    ids: Int[np.ndarray, "tokens"]  # Their token ids, and the one that ended it.
    prompt: int  # Number of tokens of the prompt.
    trace: Trace  # Routes and uncertainties; one row.

    def __str__(self) -> str:
        return self.text
