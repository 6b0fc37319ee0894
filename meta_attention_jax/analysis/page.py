"""One self-contained HTML page: no scripts, no requests, all text escaped."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence

from matplotlib.figure import Figure

from meta_attention_jax.analysis import canvas, palette, tables

# A shadow at the edge behind which a wide table or picture goes on; a cover that scrolls along hides it there.
_SHADOWS = (
    "background:linear-gradient(90deg,#fff 30%,#fff0) 0/2rem local,"
    "linear-gradient(270deg,#fff 30%,#fff0) 100%/2rem local,"
    "linear-gradient(90deg,#0003,#0000) 0/.8rem scroll,"
    "linear-gradient(270deg,#0003,#0000) 100%/.8rem scroll;background-repeat:no-repeat;"
    "background-color:#fff"
)

_CSS = f"""
:root{{color-scheme:light}}
body{{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
color:{palette.TEXT};background:#fff;max-width:70rem;margin:2.5rem auto;padding:0 1.5rem}}
h1{{font-size:1.75rem;line-height:1.25;margin:0 0 .5rem}}
h2{{font-size:1.3rem;margin:2.5rem 0 .5rem;border-bottom:1px solid #ccc;padding-bottom:.2rem}}
h3{{font-size:1.1rem;margin:1.75rem 0 .25rem}}
h4{{font-size:1rem;margin:1.1rem 0 .1rem}}
p{{max-width:46rem;margin:.4rem 0 .8rem}}
figure{{margin:1rem 0}}
.scroll{{overflow-x:auto}}
img{{max-width:100%;height:auto}}
table{{border-collapse:collapse;font-size:.9rem;margin:.75rem 0;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid #ddd}}
th{{border-bottom:2px solid #888;white-space:normal;vertical-align:bottom;line-height:1.2}}
.number{{text-align:right}}
dl{{font-size:.85rem;display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;
max-width:56rem}}
dt{{font-weight:600}}
dd{{margin:0}}
@media (max-width:40rem){{body{{padding:0 1rem}}dl{{display:block}}dd{{margin:0 0 .5rem}}
img{{max-width:none;width:40rem}}.scroll{{{_SHADOWS}}}}}
@media print{{body{{margin:0;max-width:none;font-size:10pt}}h2,h3,h4{{break-after:avoid}}
figure,tr{{break-inside:avoid}}}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Refuses scripts and requests even if something slipped through the escaping."""


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of a page."""

    heading: str  # plain text, escaped by the page
    body: str  # HTML made here (`table_html`, `coloured_html`, `figure_html`); put in as it is
    text: str = ""  # a plain paragraph under the heading, escaped by the page


def figure_png_base64(figure: Figure, dpi: int = 160) -> str:
    """The figure as base64 of a PNG file."""
    return base64.b64encode(canvas.render(figure, "png", dpi)).decode("ascii")


def figure_html(figure: Figure, description: str, dpi: int = 160) -> str:
    """The figure as an <img> that holds its own data; `description` is read out in its place."""
    data = figure_png_base64(figure, dpi)
    width = round(96 * figure.get_figwidth())
    return (
        f'<figure class="scroll"><img width="{width}" alt="{html.escape(description)}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def table_html(rows: Sequence[tables.Row], columns: Sequence[tables.Column]) -> str:
    """`tables.html_table` with the notes of its columns below."""
    notes = "\n".join(
        f"<dt>{html.escape(titles)}</dt><dd>{html.escape(note)}</dd>" for titles, note in tables.column_notes(columns)
    )
    return f'<div class="scroll">{tables.html_table(rows, columns)}</div>\n<dl>\n{notes}\n</dl>'


def html_page(title: str, sections: Sequence[Section], text: str = "") -> str:
    """A whole HTML document, fit for print, that loads nothing from anywhere; `text` is a plain paragraph under the
    title."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if text:
        parts.append(f"<p>{html.escape(text)}</p>")
    for section in sections:
        parts.append(f"<section>\n<h2>{html.escape(section.heading)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        parts.append(f"{section.body}\n</section>")
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""
