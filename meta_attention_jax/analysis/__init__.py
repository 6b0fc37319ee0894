"""Results to tables, figures and HTML. Reads plain arrays and dicts; knows nothing of models."""

# ruff: noqa: F401
from meta_attention_jax.analysis.canvas import save
from meta_attention_jax.analysis.curve_figures import frontier_figure, reliability_figure, risk_coverage_figure
from meta_attention_jax.analysis.figures import loss_curves, routing_by_layer
from meta_attention_jax.analysis.page import Section, figure_html, figure_png_base64, html_page, table_html
from meta_attention_jax.analysis.palette import Style, arm_styles, mechanism_styles
from meta_attention_jax.analysis.posterior_figures import (
    dynamics_figure,
    entropy_parts,
    entropy_split_figure,
    routing_by_position,
    simplex_figure,
)
from meta_attention_jax.analysis.share_figure import comparison_figure, share_figure
from meta_attention_jax.analysis.sweep_figures import (
    against_figure,
    pareto_figure,
    prices_figure,
)
from meta_attention_jax.analysis.tables import (
    Column,
    column_notes,
    comparison_rows,
    demo_columns,
    format_value,
    html_table,
    markdown_table,
    terminal_table,
    with_interval,
    write_json,
    write_text,
)
from meta_attention_jax.analysis.text import coloured_html, coloured_terminal, visible_pieces
from meta_attention_jax.analysis.text_figure import coloured_figure
