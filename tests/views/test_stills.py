"""Figures and circuitsvis elements as stills: SVG and PNG.

Would catch: a still that says something else than its figure, a bar or box of another size, a name
or number that is missing, an axis without chance on it, a browser or a network that is asked, text
that becomes markup or a formula, a file that differs from run to run, an ending that is not known,
a notebook that is blank where scripts are stripped.
"""

import socket
import subprocess
from io import BytesIO
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.circuitsvis import (
    Panels,
    Visual,
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)
from harmcircuits.views.figures import (
    comparison_figure,
    component_map,
    cross_ablation_figure,
    heatmaps,
    location_figure,
    overlap_figure,
    profiles,
    share_figure,
    token_figure,
)
from harmcircuits.views.plotly_stills import plotly_still
from harmcircuits.views.stills import still
from harmcircuits.views.treemap_still import Box, parts

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"
HOSTILE = "</text><script>alert(1)</script>$x^2$"


def rates(mask: str, harm: float, benign: float) -> Rows:
    labels = {"mask": mask}
    return Rows(
        [
            Measurement(HARM, labels, harm, harm - 0.1, harm + 0.05),
            Measurement(BENIGN, labels, benign, benign - 0.2, benign + 0.1),
        ]
    )


def located() -> Rows:
    """A mask of 10 and 30 weights of two matrices, the second mostly in one neuron."""
    rows = []
    for kind, removed, of in (("attn.q", 10, 100), ("mlp.out", 30, 400)):
        labels = {"by": "matrix", "layer": 0, "kind": kind, "of": of}
        rows.append(Measurement.exact("weights_removed", labels, removed))
    labels = {"by": "unit", "layer": 0, "kind": "mlp.out", "unit": "neuron", "index": 7, "of": 20}
    rows.append(Measurement.exact("weights_removed", labels, 20))
    return Rows(rows)


FIGURES = {
    "share": lambda: share_figure(
        {
            "search": {0.001: rates("a", 0.5, 0.9), 0.01: rates("a", 0.1, 0.8)},
            "random": {0.001: rates("b", 0.9, 0.9)},
        },
        {HARM: "valid harmful answers"},
        kept=[BENIGN],
    ),
    "location": lambda: location_figure(located()),
    "map": lambda: component_map(located()),
    "cross-ablation": lambda: cross_ablation_figure(
        {"one": rates("x", 0.25, 1.0), "two": rates("x", 0.5, 0.62)}, {HARM: "harm", BENIGN: "good"}
    ),
    "overlap": lambda: overlap_figure(
        {
            "lift": Rows(
                [
                    Measurement(
                        "overlap_lift", {"model": "m", "first": "h", "second": "b"}, 4.0, 3.0, 6.0
                    )
                ]
            )
        },
        {("h", "b"): "harm – benign"},
    ),
    "tokens": lambda: token_figure(
        {
            "harmful answers": Rows(
                Measurement("t", {"offset": offset}, offset / 4, offset / 4 - 1, offset / 4 + 1)
                for offset in (-1, 0, 2)
            )
        }
    ),
    "comparison": lambda: comparison_figure(
        {"unpruned": rates("none", 1.0, 0.9), "search": rates("a", 0.3, 0.8)},
        {HARM: "harm", BENIGN: "benign"},
    ),
    "heatmaps": lambda: heatmaps(
        {
            "all": Rows(
                Measurement.exact("s", {"head": head, "layer": layer}, layer - head / 4)
                for layer in range(2)
                for head in range(3)
            )
        },
        x="head",
        y="layer",
    ),
    "profiles": lambda: profiles(
        {
            "panel": {
                "none": Rows([Measurement("a", {"depth": "0 pre"}, 0.5, 0.4, 0.7)]),
                "random": Rows([Measurement("a", {"depth": "1 pre"}, 0.6, 0.4, 0.7)]),
            }
        },
        x="depth",
        title="accuracy",
    ),
}
LABELS = {
    "share": [
        "valid harmful answers",
        "worst kept ability",
        "weights removed, %",
        "search",
        "100%",
    ],
    "location": ["layer 0", "attn.q", "mlp.out", "10", "30"],
    "map": ["weights removed", "the same as areas", "layer 0", "10", "neuron 7", "other neurons"],
    "cross-ablation": ["one", "two", "harm", "good", "removed circuit", "25", "50", "62", "100"],
    "overlap": ["lift", "harm – benign", "1", "3", "5"],
    "tokens": ["nats", "-1", "2", "token, counted from the first answer token"],
    "comparison": ["unpruned", "search", "harm", "benign", "100%"],
    "heatmaps": ["all", "layer", "-0.50", "1.00", "0.75"],
    "profiles": ["panel", "accuracy", "0 pre", "1 pre", "none", "random"],
}
WORDS = ["<bos>", HOSTILE, "b"]
VIEWS = {
    "tokens": lambda: coloured_tokens(WORDS, torch.tensor([0.0, 0.5, -2.0])),
    "attention": lambda: attention_pairs(WORDS, torch.eye(3)[None], torch.eye(3)[None], [(0, 1)]),
    "neurons": lambda: activated_tokens(
        WORDS, torch.tensor([[0.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]]), [(1, 7)]
    ),
    "gained": lambda: gained_tokens(WORDS, torch.eye(3) - 0.25, WORDS, k=1),
}
WRITTEN = {
    "tokens": ["<bos>", HOSTILE, "b", "+0.50", "-2.00"],
    "attention": ["L0 H1 unpruned", "L0 H1 masked", "<bos>", HOSTILE],
    "neurons": ["L1 N7 (largest 4)", "unpruned:", "masked:", "+1.00", "+0.50", "+0.25"],
    "gained": [f"0 <bos> → {HOSTILE} (0.62)", "<bos> +0.750", f"{HOSTILE} -0.250"],
}


@pytest.fixture
def alone(monkeypatch):
    """No network, no other program."""

    def refuse(*_, **__):
        raise AssertionError("a still asked the network or another program")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


def texts(path) -> list[str]:
    """What an SVG says."""
    root = ElementTree.parse(path).getroot()
    return ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_s_names_and_numbers_are_in_its_still(name, tmp_path, alone):
    FIGURES[name]().save(tmp_path / "still.svg", title="A title")
    written = texts(tmp_path / "still.svg")
    assert {*LABELS[name], "A title"} <= set(written)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_s_tokens_and_values_are_in_its_still(name, tmp_path, alone):
    VIEWS[name]().save(tmp_path / "still.svg")
    content = (tmp_path / "still.svg").read_text()
    assert "<script" not in content
    assert set(WRITTEN[name]) <= set(texts(tmp_path / "still.svg"))


def test_bars_are_as_high_as_their_rates():
    axes = plotly_still(FIGURES["comparison"]()).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([1.0, 0.9, 0.3, 0.8])
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert [round(middle) for middle in middles] == [0, 1, 0, 1]
    reached = [tuple(line.get_segments()[0][:, 1]) for line in axes.collections[:1]]
    assert reached[0] == pytest.approx((0.9, 1.05)), "the interval of the first bar"


def test_points_stand_where_the_figure_has_them():
    figure = FIGURES["share"]()
    first = plotly_still(figure).axes[0]
    assert first.get_xscale() == "log"
    points, low_ends, high_ends = (line.get_ydata() for line in first.lines[:3])
    assert list(first.lines[0].get_xdata()) == pytest.approx([0.1, 1.0]), "per cent"
    assert list(points) == pytest.approx([0.5, 0.1])
    assert list(low_ends) == pytest.approx([0.4, 0.0])
    assert list(high_ends) == pytest.approx([0.55, 0.15])
    low, high = first.get_ylim()
    assert (low, high) == (-0.03, 1.05)


def test_cells_are_those_of_the_figure():
    for name in ("cross-ablation", "heatmaps", "location"):
        figure = FIGURES[name]()
        panels = [axes for axes in plotly_still(figure).axes if axes.collections]
        for trace, axes in zip(figure.data, panels, strict=False):
            cells = axes.collections[0].get_array()
            np.testing.assert_allclose(np.ravel(cells), np.ravel(trace.z))
            top = axes.get_ylim()
            assert top[0] > top[1], "the first line is above"


def test_chance_is_on_the_axis_of_an_overlap():
    axes = plotly_still(FIGURES["overlap"]()).axes[0]
    low, high = axes.get_xlim()
    assert low < 1 < 6 < high


def test_panels_of_a_line_share_their_range():
    rows = [Measurement("a", {"depth": "0 pre"}, mean, mean, mean) for mean in (1.0, 5.0, 9.0)]
    panels = {name: {"none": Rows([row])} for name, row in zip("abc", rows, strict=True)}
    tops = [axes.get_ylim()[1] for axes in plotly_still(profiles(panels, x="depth")).axes]
    beside, same, below = sorted(tops)
    assert beside == same < below


def test_a_treemap_s_boxes_have_the_areas_of_their_values_and_fill_their_box():
    sizes = [8.0, 5.0, 4.0, 2.0, 1.0]
    boxes = parts(sizes, Box(1.0, 2.0, 4.0, 10.0))
    areas = [box.width * box.height for box in boxes]
    assert areas == pytest.approx([2 * size for size in sizes])
    for box in boxes:
        assert box.x >= 1 and box.x + box.width <= 5 + 1e-9
        assert box.y >= 2 and box.y + box.height <= 12 + 1e-9
    for one, other in pairwise(boxes):
        is_beside = one.x + one.width <= other.x + 1e-9 or other.x + other.width <= one.x + 1e-9
        is_below = one.y + one.height <= other.y + 1e-9 or other.y + other.height <= one.y + 1e-9
        assert is_beside or is_below


@pytest.mark.parametrize("name", ["map", "share"])
def test_the_same_figure_gives_the_same_file(name, tmp_path):
    for number in range(2):
        FIGURES[name]().save(tmp_path / f"{number}.svg")
    first, second = ((tmp_path / f"{number}.svg").read_bytes() for number in range(2))
    assert first == second


@pytest.mark.parametrize("view", [FIGURES["location"], *VIEWS.values()])
def test_a_png_is_a_picture_with_something_on_it(view, tmp_path, alone):
    view().save(tmp_path / "still.PNG")
    image = Image.open(tmp_path / "still.PNG").convert("L")
    assert image.width > 300
    darkest, lightest = image.getextrema()
    assert darkest < 128 and lightest == 255


@pytest.mark.parametrize("view", [FIGURES["location"], VIEWS["tokens"], VIEWS["attention"]])
def test_an_ending_that_is_not_known_is_refused(view, tmp_path):
    for name in ("view.pdf", "view"):
        with pytest.raises(ValueError, match=r"end the name in \.html, \.svg or \.png"):
            view().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_only_circuitsvis_draws_has_no_still(tmp_path):
    view = Visual("AttentionHeads", {"tokens": ["a"]})
    for shown in (view, Panels({"a": view})):
        with pytest.raises(ValueError, match=r"AttentionHeads has no still, only ColoredTokens"):
            shown.save(tmp_path / "view.svg")
    view.save(tmp_path / "view.html")
    assert "<img" not in view._repr_html_()


def test_a_notebook_has_a_still_before_what_scripts_draw():
    for view in VIEWS.values():
        image, live = view()._repr_html_().split('<div id="live-')
        assert image.startswith('<div id="still-')
        assert image.count('src="data:image/png;base64,') == 1
        assert "<script" not in image and live.count("CircuitsVis.render(") >= 1
        assert 'style="display:none"' in live, "titles without what they name"
    bundle = FIGURES["location"]()._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    if "text/html" in bundle:
        assert bundle["text/html"].startswith('<div id="still-')


def test_a_letter_that_the_font_lacks_is_no_warning(recwarn):
    view = coloured_tokens(["\U00013000"], torch.tensor([1.0]))
    content = still(view._still, "png")
    assert Image.open(BytesIO(content)).width > 100
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
