"""Text coloured by routing: HTML fragment, picture, terminal.

The background says which mechanism a token is routed to, the underline says it again (for readers who do not tell the
colours apart, and for photocopies), and the depth of the background says how certain the controller is: deep = certain,
pale = uncertain.
"""

from __future__ import annotations

import codecs
import dataclasses
import html
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from meta_attention_jax.analysis import palette
from meta_attention_jax.fields import expect

UNDECODABLE = "·"
DEPTHS = (0.70, 0.54, 0.40, 0.27, 0.15)  # How much of a mechanism's colour its tokens carry, from certain to uncertain

_VISIBLE = {"\n": "↵\n", "\t": "⇥"}

TEXT_CSS = "\n".join(
    [
        ".routed{font:15px/1.75 ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;"
        f"color:{palette.TEXT};white-space:pre-wrap;overflow-wrap:anywhere;max-width:96ch;"
        "print-color-adjust:exact;-webkit-print-color-adjust:exact}",
        ".routed span{padding:1px 0;text-decoration-line:underline;text-decoration-thickness:2px;"
        "text-underline-offset:3px;text-decoration-skip-ink:none}",
        ".routed-legend{display:flex;flex-wrap:wrap;gap:.2em 2em;font-size:14px}",
        ".routed-legend .routed{line-height:1.6}.routed-legend span span{white-space:nowrap}",
    ]
    + [
        f".m{style.slot}{{text-decoration-style:{style.underline};text-decoration-color:{style.ink}}}"
        for style in (*palette.STYLES, palette.NEUTRAL)
    ]
    + [
        f".m{style.slot}.d{depth}{{background:{palette.tint(style.fill, amount)}}}"
        for style in (*palette.STYLES, palette.NEUTRAL)
        for depth, amount in enumerate(DEPTHS)
    ]
)


def visible_pieces(pieces: Sequence[str | bytes]) -> list[str]:
    """What to show for every token; never empty, so that every token's colour is seen. Bytes are decoded as one UTF-8
    stream: a character of several byte tokens appears at the last, the others show "·". So do undecodable bytes, empty
    pieces, control characters and invisible ones. Newlines become "↵" and a line break, tabs "⇥"."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = []
    for piece in pieces:
        if isinstance(piece, bytes):
            unfinished = bool(decoder.getstate()[0])
            text = decoder.decode(piece)
            # The unfinished bytes before have shown their own "·".
            piece = text.lstrip("\ufffd") if unfinished else text
        else:
            decoder.reset()
        shown.append("".join(map(_visible, piece)) or UNDECODABLE)
    return shown


def _visible(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return UNDECODABLE
    return character


@dataclasses.dataclass(frozen=True)
class RoutedText:
    """Checked input of every drawing, with the layer axis made explicit."""

    pieces: list[str]
    styles: dict[str, palette.Style]
    route: Int[np.ndarray, "layer time"]
    depth: Int[np.ndarray, "layer time"]  # Index into DEPTHS.
    edges: list[float]  # Of the depths, in units of u.
    names: list[str]


def routed_text(
    pieces: Sequence[str | bytes],
    route: Int[np.ndarray, "*layer time"],
    uncertainty: Float[np.ndarray, "*layer time"] | None,
    mechanisms: Sequence[str],
    names: Sequence[str] | None,
) -> RoutedText:
    """Checked arguments of a drawing; `coloured_html` says what they are and what is refused."""
    styles = palette.mechanism_styles(mechanisms)
    if isinstance(pieces, bytes):
        raise ValueError("pieces: expected a list with the bytes of each token, got one bytes object.")
    route = np.asarray(route)
    if route.size and route.dtype.kind not in "iu":
        raise ValueError(f"route: expected integers, got {route.dtype}.")
    expect(route.ndim in (1, 2) and route.shape[-1] == len(pieces), "route",
           f"[time] or [layer, time] with one entry per piece ({len(pieces)})", list(route.shape))
    shape = route.shape
    route = np.atleast_2d(route)
    if route.size and not (0 <= route.min() and route.max() < len(styles)):
        raise ValueError(
            f"route: expected indices of the {len(styles)} mechanisms, got {route.min()} to {route.max()}."
        )
    u = np.zeros(shape) if uncertainty is None else np.asarray(uncertainty, float)
    expect(u.shape == shape, "uncertainty", f"the shape of route {list(shape)}", list(u.shape))
    if not ((-1e-4 <= u) & (u <= 1 + 1e-4)).all():
        raise ValueError(f"uncertainty: expected values in [0, 1], got {u.min()} to {u.max()}.")
    if names is None:
        names = [f"layer {i}" for i in range(len(route))] if len(route) > 1 else [""]
    expect(len(names) == len(route), "layer_names", f"one name per layer ({len(route)})", len(names))
    edges = _edges(u)
    depth = np.searchsorted(edges, np.atleast_2d(u), side="left")
    return RoutedText(visible_pieces(pieces), styles, route, depth, edges, list(names))


def _edges(u: Float[np.ndarray, "..."]) -> list[float]:
    """Upper edges of all depths but the last, evenly spaced over where most of the data lies. Over [0, 1] differences
    within one model would be invisible; the legend prints the edges."""
    low, high = np.quantile(u, [0.02, 0.98]) if u.size else (0.0, 1.0)
    if high - low < 0.02:
        low, high = 0.0, 1.0
    return [float(edge) for edge in np.linspace(low, high, len(DEPTHS) + 1)[1:-1]]


def layer_headings(routed: RoutedText) -> list[str]:
    """The shares of this text's tokens, as in "layer 0: full 12 %, linear 60 %, local 28 %"."""
    headings = []
    for name, route in zip(routed.names, routed.route):
        shares = (
            f"{mechanism} {100 * np.mean(route == k):.0f} %" if route.size else mechanism
            for k, mechanism in enumerate(routed.styles)
        )
        headings.append((f"{name}: " if name else "") + ", ".join(shares))
    return headings


def depth_labels(edges: Sequence[float]) -> list[str]:
    middle = [f"{low:.2f}–{high:.2f}" for low, high in zip(edges, edges[1:])]
    return [f"u ≤ {edges[0]:.2f}", *middle, f"u > {edges[-1]:.2f}"]


def coloured_html(
    pieces: Sequence[str | bytes],
    route: Int[np.ndarray, "*layer time"],
    uncertainty: Float[np.ndarray, "*layer time"],
    mechanisms: Sequence[str],
    *,
    title: str,
    caption: str = "",
    mean: Float[np.ndarray, "*layer time mechanism"] | None = None,
    layer_names: Sequence[str] | None = None,
) -> str:
    """An HTML fragment, styles included: the text once per layer, one legend, all text escaped.

    Hovering over a token shows its mechanism, u and, if given, E[pi].

    Args:
      pieces: the tokens, decoded or as bytes (`visible_pieces` says how they are shown).
      route: index into `mechanisms` per token; [time] for one layer, [layer, time] for several.
      uncertainty: u in [0, 1], the shape of `route`.
      layer_names: headings of the layers; default "layer 0", ... if there are several.
    """
    routed = routed_text(pieces, route, uncertainty, mechanisms, layer_names)
    u = np.asarray(uncertainty, float).reshape(routed.route.shape)
    if mean is not None:
        expected = (*np.shape(route), len(mechanisms))
        expect(np.shape(mean) == expected, "mean", f"{list(expected)}", list(np.shape(mean)))
        mean = np.asarray(mean, float).reshape(*routed.route.shape, len(mechanisms))
    names, slots = list(mechanisms), [style.slot for style in routed.styles.values()]

    def token(layer: int, t: int) -> str:
        k = routed.route[layer, t]
        hover = f"{names[k]} · u {u[layer, t]:.2f}"
        if mean is not None:
            weights = zip(names, mean[layer, t])
            hover += " · E[π] " + ", ".join(f"{name} {weight:.2f}" for name, weight in weights)
        return (
            f'<span class="m{slots[k]} d{routed.depth[layer, t]}" title="{html.escape(hover)}">'
            f"{html.escape(routed.pieces[t])}</span>"
        )

    blocks = []
    for layer, heading in enumerate(layer_headings(routed)):
        tokens = "".join(token(layer, t) for t in range(len(routed.pieces)))
        blocks.append(f'<h4>{html.escape(heading)}</h4>\n<div class="routed">{tokens}</div>')
    swatches = " ".join(
        f'<span class="m{slot} d0">&nbsp;{html.escape(name)}&nbsp;</span>' for slot, name in zip(slots, names)
    )
    scale = " ".join(
        f'<span class="m{palette.NEUTRAL.slot} d{depth}">&nbsp;{html.escape(label)}&nbsp;</span>'
        for depth, label in enumerate(depth_labels(routed.edges))
    )
    return "\n".join([
        f"<style>{TEXT_CSS}</style>",
        f"<h3>{html.escape(title)}</h3>",
        f"<p>{html.escape(caption)}</p>" if caption else "",
        '<div class="routed-legend">',
        f'<div>mechanism <span class="routed">{swatches}</span></div>',
        f'<div>certain <span class="routed">{scale}</span> uncertain</div>',
        "</div>",
        *blocks,
    ])


# Underlined, plain, italic, ...: the terminal's second channel, by palette slot.
_ATTRIBUTES = ("4", "22", "3", "1", "3;4", "1;4", "1;3")


def coloured_terminal(pieces: Sequence[str | bytes], route: Int[np.ndarray, " time"], mechanisms: Sequence[str]) -> str:
    """The text with 24-bit ANSI backgrounds, after a line with the legend."""
    routed = routed_text(pieces, np.ravel(route), None, mechanisms, None)
    red, green, blue = _rgb(palette.TEXT)
    codes = []
    for style in routed.styles.values():
        attribute = _ATTRIBUTES[style.slot]
        r, g, b = _rgb(palette.tint(style.fill, DEPTHS[0]))
        codes.append(f"\x1b[{attribute};38;2;{red};{green};{blue};48;2;{r};{g};{b}m")

    def paint(k: int, text: str) -> str:
        # Colours end before a line break, or the terminal fills the rest of the line with them.
        return "\n".join(f"{codes[k]}{line}\x1b[0m" if line else "" for line in text.split("\n"))

    legend = " ".join(paint(k, f" {name} ") for k, name in enumerate(routed.styles))
    runs = itertools.groupby(zip(routed.route[0], routed.pieces), key=lambda token: token[0])
    text = "".join(paint(k, "".join(piece for _, piece in run)) for k, run in runs)
    return f"{legend}\n{text}\n"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
