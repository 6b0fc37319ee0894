"""Tables, figures and coloured text: plain data in, readable and safe files out."""

import base64
import html.parser
import itertools
import json
import re

import matplotlib.image
import numpy as np
import pytest

from meta_attention_jax import analysis
from meta_attention_jax.analysis import palette, tables, text, text_figure

MECHANISMS = ("full", "linear", "local")
HOSTILE = "<script>alert('&\"')</script>"


def routed(pieces, layers=None, seed=0):
    """Random routes, uncertainties and mean weights for pieces."""
    rng = np.random.default_rng(seed)
    shape = (len(pieces),) if layers is None else (layers, len(pieces))
    mean = rng.dirichlet(np.ones(3), shape)
    return mean.argmax(-1), rng.random(shape), mean


class Collector(html.parser.HTMLParser):
    """Tags and text of a document, in order; unclosed or crossed tags are refused."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))


def parse(document):
    collector = Collector()
    collector.feed(document)
    collector.close()
    assert collector.open == []
    return collector


# Palette


def luminance(colour):
    """Relative luminance of "#rrggbb" in [0, 1]: 0.2126 R + 0.7152 G + 0.0722 B of linear light."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    """Ratio (L1 + 0.05) / (L2 + 0.05), L1 >= L2 the luminances; in [1, 21]. WCAG 2.1 asks 4.5 of text."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_every_background():
    backgrounds = [
        palette.tint(style.fill, amount)
        for style in (*palette.STYLES, palette.NEUTRAL)
        for amount in text.DEPTHS
    ]
    assert min(contrast(palette.TEXT, colour) for colour in backgrounds) >= 4.5
    assert min(contrast(style.ink, "#ffffff") for style in palette.STYLES) >= 4.5


def test_contrast_of_known_pairs():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_styles_are_stable_and_differ_in_every_channel():
    styles = palette.mechanism_styles(("sliding", "local", "full", "linear", "gated"))
    assert {name: styles[name] for name in MECHANISMS} == palette.mechanism_styles(MECHANISMS)
    for channel in ("slot", "fill", "hatch", "underline", "marker"):
        assert len({getattr(style, channel) for style in styles.values()}) == len(styles)


def lab(rgb):
    """CIELAB (D65) of linear RGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Severity 1 of Machado, Oliveira and Fernandes (2009).
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [
        [0.3673, 0.8606, -0.2280],
        [0.2801, 0.6725, 0.0474],
        [-0.0118, 0.0429, 0.9689],
    ],
}


@pytest.mark.parametrize("vision", VISIONS)
def test_certain_tokens_of_two_mechanisms_differ_for_colour_blind_readers(vision):
    colours = []
    for style in palette.mechanism_styles(MECHANISMS).values():
        shade = palette.tint(style.fill, text.DEPTHS[0])
        channels = np.array([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        colours.append(lab(np.array(VISIONS[vision]) @ linear))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 20  # 2.3 is just noticeable.


def test_too_many_or_repeated_mechanisms_are_refused():
    with pytest.raises(ValueError, match=r"^mechanisms: expected at most 4 names besides .*\.$"):
        palette.mechanism_styles([f"m{i}" for i in range(5)])
    with pytest.raises(ValueError, match=r"^mechanisms: expected distinct names, got .*\.$"):
        palette.mechanism_styles(("full", "full"))


# Tables


RESULTS = [
    {
        "corpus": corpus,
        "arm": arm,
        "nll_soft": np.float32(1.5),
        "nll_hard": 1.75,
        "cost": 0.2912,
        "usage_entropy": float("nan"),
        "queries_full": 1.0,
        "route_layer": np.int64(1),
    }
    for arm in ("bayesian", "prior-free")
    for corpus in ("sotu", "recall")
]


def test_rows_are_grouped_and_the_gap_is_hard_minus_soft():
    rows = analysis.comparison_rows(RESULTS + [{"corpus": "sotu", "arm": "late"}])
    assert [row["corpus"] for row in rows] == ["sotu"] * 3 + ["recall"] * 2
    assert rows[0]["gap"] == 0.25
    assert "gap" not in rows[2] and "gap" not in RESULTS[0]
    with pytest.raises(ValueError, match=r"^results: expected 'arm' in every result, got .*\.$"):
        analysis.comparison_rows([{"corpus": "sotu"}])


def test_columns_follow_the_corpus():
    text_keys = {column.key for column in analysis.demo_columns("sotu")}
    recall_keys = {column.key for column in analysis.demo_columns("recall")}
    assert {"bpb_soft", "bpb_hard"} == text_keys - recall_keys
    assert {"accuracy_queries_soft", "accuracy_queries_hard", "queries_full", "others_full"} < (
        recall_keys - text_keys
    )


def test_markdown_prints_formats_and_missing_values():
    columns = [
        analysis.Column("arm", "arm"),
        analysis.Column("cost", "cost", ".1%"),
        analysis.Column("usage_entropy", "usage", ".1%"),
        analysis.Column("absent", "absent", ".3f"),
        analysis.Column("route_layer", "layer", "d"),
    ]
    rows = [RESULTS[0], {"arm": "a|b\nc", "cost": float("inf"), "absent": None}]
    lines = analysis.markdown_table(rows, columns).splitlines()
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(line.replace("\\", "")) for line in lines[:3]}) == 1
    assert set(cells[1][0]) == {"-"}
    assert all(re.fullmatch("-+:", rule) for rule in cells[1][1:])
    assert cells[2] == ["bayesian", "29.1%", "–", "–", "1"]
    assert cells[3] == ["a\\|b c", "∞", "–", "–", "–"]


def test_a_value_that_its_column_cannot_format_is_named():
    with pytest.raises(ValueError, match=r"^cost: expected a value that '.1%' can format, got"):
        analysis.markdown_table([{"cost": "dear"}], [analysis.Column("cost", "cost", ".1%")])
    with pytest.raises(ValueError, match=r"^columns: expected at least one Column, got none\.$"):
        analysis.terminal_table(RESULTS, [])


@pytest.mark.parametrize("corpus", ["sotu", "recall"])
def test_terminal_table_is_aligned_and_fits(corpus):
    columns = analysis.demo_columns(corpus)
    whole = analysis.terminal_table(RESULTS, columns)
    assert max(map(len, whole.splitlines())) <= 120
    assert "\n\n" not in whole
    narrow = analysis.terminal_table(RESULTS, columns, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    blocks = [block.splitlines() for block in narrow.strip("\n").split("\n\n")]
    assert len(blocks) > 1
    for block in blocks:
        assert block[-1].startswith("prior-free")
    for cell in analysis.markdown_table(RESULTS, columns).split("|"):
        for word in cell.split():
            assert set(word) <= set("-:") or word in narrow


def test_json_has_plain_numbers_and_is_replaced_whole(tmp_path):
    path = tmp_path / "report" / "table.json"
    rows = [{"a": np.float32(0.5), "b": np.arange(2), "nan": np.nan, "inf": [-np.inf, np.array(1)]}]
    analysis.write_json(path, rows)
    before = path.read_text()
    assert json.loads(before) == [{"a": 0.5, "b": [0, 1], "nan": None, "inf": [None, 1]}]
    with pytest.raises(ValueError, match=r"^value: expected numbers, .*, got object\.$"):
        analysis.write_json(path, [object()])
    assert path.read_text() == before
    analysis.write_text(path, "a\ud800")  # A name's byte that is not Unicode costs no result.
    assert path.read_text() == "a?"
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_notes_are_shared_and_reach_the_html():
    columns = analysis.demo_columns("recall")
    notes = dict(analysis.column_notes(columns))
    assert "to full, to linear, to local" in notes
    shown = "".join(data for _, data in parse(analysis.table_html(RESULTS, columns)).text)
    assert all(note in shown for note in notes.values())


# Figures


def runs(corpus, arm, seed=0, **more):
    rng = np.random.default_rng(seed)
    steps, evaluations = np.arange(0, 100, 5), np.arange(10, 101, 30)
    return {
        "corpus": corpus,
        "arm": arm,
        "steps": steps,
        "train_nll": 5 * np.exp(-steps / 10) + 1.7 + rng.normal(0, 0.02, steps.size),
        "eval_steps": evaluations,
        "eval_nll_soft": 2 * np.exp(-evaluations / 10) + 1.75,
        "eval_nll_hard": 2 * np.exp(-evaluations / 10) + 1.85,
        **more,
    }


def layered(corpus, arm, layers, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "corpus": corpus,
        "arm": arm,
        "fractions": rng.dirichlet(np.ones(3), layers),
        "mean_weights": rng.dirichlet(np.ones(3), layers),
        "mechanisms": MECHANISMS,
    }


def test_loss_has_a_panel_per_corpus_and_shows_every_evaluation(tmp_path):
    given = [
        runs("sotu", "bayesian", gate_start=30, gate_end=80),
        runs("sotu", "prior-free"),
        runs("recall", "bayesian"),
        {"corpus": "recall", "arm": "unfinished", "steps": [0], "train_nll": [np.nan]},
    ]
    figure = analysis.loss_curves(given, {"recall": 1.6})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sotu", "recall"]
    low, high = figure.axes[0].get_ylim()
    late = given[0]["train_nll"][2:]
    assert low < late.min() and high > given[0]["eval_nll_hard"][0]
    assert figure.axes[1].get_ylim()[0] < 1.6
    curves = [line.get_ydata() for line in figure.axes[0].lines]
    for run in given[:2]:
        for key in ("train_nll", "eval_nll_soft", "eval_nll_hard"):
            assert any(np.array_equal(run[key], curve) for curve in curves)
    analysis.save(figure, tmp_path / "loss.png", dpi=50)
    assert matplotlib.image.imread(tmp_path / "loss.png").std() > 0


def test_curves_of_another_length_than_their_steps_are_refused():
    with pytest.raises(
        ValueError, match=r"^train_nll: expected one value per entry of steps \(20\), got 3 .*\.$"
    ):
        analysis.loss_curves([runs("sotu", "bayesian", train_nll=[1, 2, 3])])
    with pytest.raises(ValueError, match=r"^runs: expected at least one run, got none\.$"):
        analysis.loss_curves([])


def test_routing_has_a_panel_per_result_and_bars_as_long_as_the_shares(tmp_path):
    results = [layered("sotu", "bayesian", 3, 1), layered("sotu", "softmax", 3, 2)]
    results.append(layered("recall", "bayesian", 2, 3))
    figure = analysis.routing_by_layer(results)
    assert len(figure.axes) == 3
    for axes, result in zip(figure.axes, results):
        assert axes.get_title(loc="left") == f"{result['corpus']}: {result['arm']}"
        bars = np.array([patch.get_width() for patch in axes.patches])
        expected = np.concatenate([result["fractions"].T.ravel(), result["mean_weights"].T.ravel()])
        np.testing.assert_allclose(bars, expected, rtol=1e-6)
    analysis.save(figure, tmp_path / "routing.png", dpi=50)
    assert matplotlib.image.imread(tmp_path / "routing.png").std() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fractions": np.ones((2, 2)) / 2}, r"^fractions: expected \[layer, 3\], .*\.$"),
        ({"fractions": np.ones((2, 3))}, r"^fractions: expected every layer's shares to add up to"),
        ({"mean_weights": np.ones((3, 3)) / 3}, r"^mean_weights: expected the shape of fractions"),
    ],
)
def test_shares_that_cannot_be_drawn_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        analysis.routing_by_layer([{**layered("sotu", "bayesian", 2), **change}])


# Coloured text


def test_pieces_show_every_token():
    pieces = [*(bytes([b]) for b in "a—\n".encode()), b"\xff", b"b", "\ufffd", "", "\x1b[2J", "\t"]
    assert text.visible_pieces(pieces) == [
        *("a", "·", "·", "—", "↵\n", "·", "b", "·", "·", "·[2J", "⇥")
    ]
    assert text.visible_pieces([b"\xe2", b"a", b"\xe2", "x", b"\x94"]) == list("·a·x·")
    assert text.visible_pieces(["\u202eevil", "\u200b"]) == ["·evil", "·"]  # Bidi, zero width.


def test_html_escapes_everything_and_keeps_the_text():
    pieces = [HOSTILE, "a & b", *"<b>", "é"]
    route, u, mean = routed(pieces, layers=2)
    fragment = analysis.coloured_html(
        pieces,
        route,
        u,
        (HOSTILE, "linear", "local"),
        title=HOSTILE,
        caption=HOSTILE,
        mean=mean,
        layer_names=[HOSTILE, "last"],
    )
    section = analysis.Section(HOSTILE, fragment, HOSTILE)
    page = analysis.html_page(HOSTILE, [section], HOSTILE)
    seen = parse(page)
    assert "script" not in seen.tags and "b" not in seen.tags
    assert not any(name.startswith("on") for attrs in seen.attributes for name in attrs)
    assert "".join(data for tag, data in seen.text if tag == "span").count("".join(pieces)) == 2
    titles = [attrs["title"] for attrs in seen.attributes if "title" in attrs]
    assert len(titles) == 2 * len(pieces)
    k = route[1, 0]
    assert titles[len(pieces)].startswith(
        f"{(HOSTILE, 'linear', 'local')[k]} · u {u[1, 0]:.2f} · E[π] {HOSTILE} {mean[1, 0, 0]:.2f}"
    )


def test_tokens_carry_the_class_of_their_mechanism_and_certainty():
    u = np.array([0.0, 0.5, 1.0])
    fragment = analysis.coloured_html("abc", np.array([2, 0, 1]), u, MECHANISMS, title="t")
    spans = re.findall(r'<span class="m(\d) d(\d)" title="(\w+)', fragment)
    assert spans == [("2", "0", "local"), ("0", "2", "full"), ("1", "4", "linear")]
    for slot, depth, name in spans:
        fill = palette.mechanism_styles(MECHANISMS)[name].fill
        rule = f".m{slot}.d{depth}{{background:{palette.tint(fill, text.DEPTHS[int(depth)])}}}"
        assert rule in fragment


def test_narrow_uncertainties_still_differ_and_equal_ones_do_not():
    route = np.zeros(50, int)
    narrow = np.linspace(0.40, 0.46, 50)
    depth = text.routed_text("x" * 50, route, narrow, MECHANISMS, None).depth[0]
    assert set(depth) == set(range(len(text.DEPTHS))) and (np.diff(depth) >= 0).all()
    equal = text.routed_text("x" * 50, route, np.full(50, 0.9), MECHANISMS, None).depth[0]
    assert set(equal) == {len(text.DEPTHS) - 1}


def test_terminal_text_survives_stripping_of_colours():
    pieces = list("one two\nthree\x1b[31m")
    route, _, _ = routed(pieces)
    coloured = analysis.coloured_terminal(pieces, route, MECHANISMS)
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert stripped == " full   linear   local \none two↵\nthree·[31m\n"
    assert all(line.endswith("\x1b[0m") for line in coloured.splitlines())


def test_wrapping_keeps_every_cell_in_order():
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abc \n"), 2000, p=[0.3, 0.3, 0.27, 0.1, 0.03])
    lines = text_figure.wrap_cells(letters, 40)
    assert max(map(len, lines)) <= 40
    cells = [cell for line in lines for cell in line]
    assert cells == [(c, t) for t, c in enumerate(letters) if c != "\n"]
    broken = [a for a, b in zip(lines, lines[1:]) if a and b and b[0][1] == a[-1][1] + 1]
    assert len(broken) > 10
    for line in broken:
        letters_of_line = "".join(letter for letter, _ in line)
        assert letters_of_line.endswith(" ") or (
            len(line) == 40 and " " not in letters_of_line[21:]
        )


def test_picture_paints_each_token_in_the_colour_of_its_mechanism():
    pieces = [bytes([b]) for b in "$x$ 漢 été ".encode() * 12]  # No maths, no missing glyphs.
    route, u, _ = routed(pieces, layers=2)
    figure = analysis.coloured_figure(pieces, route, u, MECHANISMS, title="$5 and $6", caption="c")
    figure.set_dpi(60)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    painted = {"#" + bytes(pixel).hex() for pixel in np.unique(pixels, axis=0).astype(np.uint8)}
    depth = text.routed_text(pieces, route, u, MECHANISMS, None).depth
    styles = list(palette.mechanism_styles(MECHANISMS).values())
    for k, d in set(zip(route.ravel().tolist(), depth.ravel().tolist())):
        assert palette.tint(styles[k].fill, text.DEPTHS[d]) in painted


@pytest.mark.parametrize(
    "change, message",
    [
        ({"route": [0, 1]}, r"^route: expected .* one entry per piece \(3\), got \[2\]\.$"),
        ({"route": [0, 1, 3]}, r"^route: expected indices of the 3 mechanisms, got 0 to 3\.$"),
        ({"route": [0.0, 1.0, 2.0]}, r"^route: expected integers, got float64\.$"),
        ({"pieces": b"abc"}, r"^pieces: expected a list with the bytes of each token, got one"),
        ({"uncertainty": [0.1] * 2}, r"^uncertainty: expected the shape of route \[3\], got"),
        ({"uncertainty": [0, 2, np.nan]}, r"^uncertainty: expected values in \[0, 1\], got"),
        ({"layer_names": ["a", "b"]}, r"^layer_names: expected one name per layer \(1\), got 2\.$"),
        ({"mean": np.ones((3, 2))}, r"^mean: expected \[3, 3\], got \[3, 2\]\.$"),
    ],
)
def test_mismatches_are_refused_in_one_sentence(change, message):
    arguments = {"pieces": "abc", "route": [0, 1, 2], "uncertainty": [0.1, 0.2, 0.3], **change}
    with pytest.raises(ValueError, match=message):
        analysis.coloured_html(mechanisms=MECHANISMS, title="t", **arguments)
    if "mean" not in change:
        with pytest.raises(ValueError, match=message):
            analysis.coloured_figure(mechanisms=MECHANISMS, title="t", **arguments)


# Page


def test_page_loads_nothing_and_holds_its_pictures():
    figure = analysis.routing_by_layer([layered("sotu", "bayesian", 2)])
    body = analysis.figure_html(figure, 'a "picture"', dpi=40)
    body += analysis.table_html([{"arm": HOSTILE}], [analysis.Column("arm", HOSTILE)])
    seen = parse(analysis.html_page("Report", [analysis.Section("Routing", body)]))
    assert "script" not in seen.tags and "link" not in seen.tags
    (image,) = [attrs for tag, attrs in zip(seen.tags, seen.attributes) if tag == "img"]
    assert image["alt"] == 'a "picture"'
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
    links = [attrs.get(name, "") for attrs in seen.attributes for name in ("src", "href")]
    assert not any(link.startswith(("http", "/", "file")) for link in links)


def test_plain_numbers_are_exact():
    assert tables.plain(np.float64(0.1)) == 0.1 and type(tables.plain(np.float64(0.1))) is float
    assert type(tables.plain(np.bool_(True))) is bool
