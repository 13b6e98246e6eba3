"""Figures drawn from rows.

Would catch: a row in another cell or on another line, a mark without its interval, a worst ability
that is not the worst, a line left out because the colours ran out, chance of another place, a name
that becomes markup or a formula, a file that differs from run to run, text that a dark page hides.
"""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import (
    MASK_COLOURS,
    comparison_figure,
    component_map,
    location_figure,
    share_figure,
)

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"
HOSTILE = "</text><script>alert(1)</script>$x^2$"


def rates(harm: float, benign: float) -> Rows:
    low = Measurement(HARM, {}, harm, harm - 0.1, harm + 0.05)
    return Rows([low, Measurement(BENIGN, {}, benign, benign - 0.2, benign + 0.1)])


def removed(layer: int, kind: str, n: int, of: int, **unit) -> Rows:
    labels = {"layer": layer, "kind": kind, "of": of, "by": "unit" if unit else "matrix", **unit}
    return Rows([Measurement.exact("weights_removed", labels, n)])


# 30 of 400 weights go: by chance 7.5 of every 100.
PLACES = (
    removed(1, "attn.q", 0, 100)
    + removed(0, "mlp.in", 15, 200)
    + removed(0, "attn.q", 15, 100)
    + removed(0, "attn.q", 3, 20, unit="head", index=0)
    + removed(0, "mlp.in", 9, 30, unit="neuron", index=2)
)
SHARES = {
    "search": {0.001: rates(0.5, 0.9), 0.01: rates(0.1, 0.8)},
    "random": {0.001: rates(0.9, 0.9), 0.01: Rows()},
    HOSTILE: {},
}
MASKS = {"unpruned": rates(1.0, 0.9), HOSTILE: rates(0.3, 0.8)}
FIGURES = {
    "share": lambda: share_figure(SHARES, {HARM: "valid harmful answers"}, abilities=[BENIGN]),
    "comparison": lambda: comparison_figure(MASKS, {HARM: "harm", BENIGN: "$benign$"}),
    "location": lambda: location_figure(PLACES),
    "map": lambda: component_map(PLACES),
}
LABELS = {
    "share": ["valid harmful answers", "worst kept ability", "weights removed, %", "search", "1"],
    "comparison": ["unpruned", HOSTILE, "harm", "$benign$", "100%"],
    "location": ["layer 0", "layer 1", "attn.q", "mlp.in", "15", "0", "% of matrix"],
    "map": ["layer 0", "attn.q", "15", "layer 0 mlp.in neuron 2", "9", "1/16", "times chance"],
}


def texts(svg: str) -> list[str]:
    """What an SVG says."""
    root = ElementTree.fromstring(svg)
    return ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_saved_with_its_names_and_numbers_as_text(name, tmp_path):
    for number in range(2):
        FIGURES[name]().save(tmp_path / f"{number}.svg")
    first, second = ((tmp_path / f"{number}.svg").read_text() for number in range(2))
    assert first == second
    assert set(LABELS[name]) <= set(texts(first))


def curve(container) -> tuple[list[float], list[float], list[list[float]]]:
    """Places, means and intervals of a curve."""
    line, _, (interval,) = container
    segments = interval.get_segments()
    return list(line.get_xdata()), list(line.get_ydata()), [list(ends[:, 1]) for ends in segments]


def test_shares_are_drawn_with_the_worst_kept_ability():
    known = [Measurement.exact("knowledge_rate", {}, rate) for rate in (1.0, 0.5)]
    points = {0.001: rates(0.5, 0.75) + known[:1], 0.01: rates(0.25, 1.0) + known[1:]}
    kept = (BENIGN, "knowledge_rate")
    picture = share_figure({"circuit": points}, {HARM: "harm"}, abilities=kept)
    harm, worst = picture.figure.axes
    (of_harm,), (of_worst,) = harm.containers, worst.containers
    places, means, intervals = curve(of_harm)
    assert (places, means) == ([0.1, 1.0], [0.5, 0.25]), "per cent of the weights"
    assert np.array(intervals) == pytest.approx(np.array([[0.4, 0.55], [0.15, 0.3]]))
    assert curve(of_worst)[1] == [0.75, 0.5]
    assert harm.get_xscale() == "log"
    assert harm.get_ylim() == worst.get_ylim() == (-0.03, 1.05)


def test_bars_are_the_rates_that_a_mask_has():
    lines = {"unpruned": rates(0.9, 0.8), "twin": Rows(), "search": rates(0.3, 0.7)[:1]}
    (panel,) = comparison_figure(lines, {HARM: "harm", BENIGN: "benign"}).figure.axes
    _, unpruned, _, search = panel.containers
    assert (unpruned.get_label(), search.get_label()) == ("unpruned", "search")
    assert [bar.get_height() for bar in unpruned] == [0.9, 0.8]
    assert [bar.get_height() for bar in search] == [0.3]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in unpruned]
    assert [round(middle) for middle in middles] == [0, 1]
    assert to_hex(search[0].get_facecolor()) == MASK_COLOURS[2], "whether the twin has rows or not"


def grid(axes) -> list[list[float | None]]:
    """The cells of a heatmap, line by line from the top; None where there is no value."""
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first line is above"
    return axes.collections[0].get_array().tolist()


def test_places_are_shaded_by_their_share():
    panel, scale = location_figure(PLACES).figure.axes
    assert grid(panel) == [[15.0, 7.5], [0.0, None]]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["layer 0", "layer 1"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["attn.q", "mlp.in"]
    assert [text.get_text() for text in panel.texts] == ["15", "15", "0"]
    assert scale.get_ylim() == (0, 15)


def test_a_component_map_is_against_chance():
    cells, bars, _ = component_map(PLACES).figure.axes
    assert grid(cells) == [[1.0, 0.0], [-4.0, None]], "log2 of 2, 1, none and no matrix"
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["layer 0 mlp.in neuron 2", "layer 0 attn.q head 0"], "the most first"
    assert [bar.get_width() for bar in bars.patches] == [9, 3]
    most, fewer = (bar.get_facecolor() for bar in bars.patches)
    assert most[1] < fewer[1] < 1, "4 and 2 times chance: the redder, the more"
