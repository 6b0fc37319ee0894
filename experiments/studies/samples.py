"""Showing the routes of texts: what `generate`, `demo` and `report` share."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from jaxtyping import Bool, Int

from meta_attention_jax import analysis
from meta_attention_jax.generation import Trace
from meta_attention_jax.run import Run
from meta_attention_jax.types import Batch, Routing

LINE = 80
"""Characters after which a line is broken."""


def show_routes(
    run: Run, ids: Int[np.ndarray, "tokens"], trace: Trace, *, layer: Optional[int] = None, colour: bool = False
) -> str:
    """Shares of all layers that have a router, then prompt and continuation of `Run.generate` with the routes of one,
    `layer` of them or the one that uses full most: by ANSI backgrounds, or a line of letters below each line of text.

    k* of a token that mixes all mechanisms is only the likeliest of them: how many do is said.
    """
    mechanisms = tuple(run.config.model.mechanisms)
    route = np.concatenate([trace.prompt_route[:, 0], trace.route[:, 0]], axis=1)
    shares = [[float(np.mean(row == k)) for k in range(len(mechanisms))] for row in route]
    if layer is None:
        most = mechanisms.index("full") if "full" in mechanisms else 0
        layer = int(np.argmax(np.asarray(shares)[:, most]))
    pieces = run.pieces(ids)
    numbers = run.model.config.routed  # Layers that are a window by nature have no routes.
    lines = [f"layer {numbers[i]}: " + ", ".join(f"{n} {s:.0%}" for n, s in zip(mechanisms, row))
             for i, row in enumerate(shares)]
    hard = np.concatenate([trace.prompt_hard[:, 0], trace.hard[:, 0]], axis=1)[layer]
    prompt = route.shape[1] - trace.tokens.shape[1]
    lines.append(f"\nroutes of layer {numbers[layer]}, the prompt's {prompt} tokens first")
    if not hard.all():
        lines.append(f"k* only: {np.mean(~hard):.0%} of these tokens mix all mechanisms")
    shown = analysis.coloured_terminal if colour else lettered
    return "\n".join([*lines, shown(pieces, route[layer], mechanisms)])


def lettered(pieces: Sequence[bytes], route: Int[np.ndarray, "tokens"], mechanisms: Sequence[str]) -> str:
    """Lines of text, each with a line of letters below: F full, L linear, w local (window)."""
    known = {"full": "F", "linear": "L", "local": "w"}
    letters = [known.get(name, str(k)) for k, name in enumerate(mechanisms)]
    legend = "  ".join(f"{letter} {name}" for letter, name in zip(letters, mechanisms))
    top, bottom, lines = "", "", [legend]
    for text, k in zip(analysis.visible_pieces(pieces), route):
        text = text.replace("\n", "")  # The sign for it stays.
        top += text
        shown = text.rstrip() or text
        bottom += letters[int(k)] * len(shown) + " " * (len(text) - len(shown))
        if len(top) >= LINE:
            lines += [top, bottom]
            top, bottom = "", ""
    return "\n".join(lines + ([top, bottom] if top else []))


def text_of(
    run: Run, batch: Batch, routing: Routing, keep: Bool[np.ndarray, "row time"], *, apart: bool = True
) -> dict[str, Any]:
    """What `analysis.coloured_html` takes of the tokens to `keep` of a batch's first rows; a line each where
    rows have nothing to do with each other (`apart`)."""
    rows = len(keep)
    pieces = run.pieces(np.asarray(batch.tokens)[:rows][keep])
    for end in np.cumsum(keep.sum(axis=1)) - 1 if apart else ():
        pieces[end] += b"\n"
    shown = {name: np.asarray(getattr(routing, name))[:, :rows][:, keep] for name in ("route", "uncertainty", "mean")}
    return {"pieces": pieces, **shown, "mechanisms": run.mechanisms}


def layer_shares(
    mechanisms: Sequence[str], corpus: str, arm: str, results: Mapping[str, Any]
) -> dict[str, Any]:
    """For `analysis.routing_by_layer`: fractions of the hard run, mean weights of the soft one."""
    return {
        "corpus": corpus, "arm": arm, "mechanisms": mechanisms,
        "fractions": results["hard"]["layers"]["fractions"], "mean_weights": results["soft"]["layers"]["mean"],
    }


def wants_colour() -> bool:
    """Whether stdout is a terminal that shows colours; see no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def printable(text: str) -> str:
    """Control characters as "\ufffd", but for line breaks and tabs: a terminal would obey them."""
    keep = lambda c: c in "\n\t" or unicodedata.category(c) != "Cc"  # noqa: E731
    return "".join(c if keep(c) else "\ufffd" for c in text)
