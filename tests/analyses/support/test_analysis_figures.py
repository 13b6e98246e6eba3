"""Figures that only analyses draw.

Would catch: a row in another cell, on another line or bar, panels whose lines or colours do not
belong together, a number rounded otherwise than in the tables, chance that is off the axis.
"""

import pytest
from support.figures import cross_ablation_figure, heatmaps, profiles

from harmcircuits.measurements import Measurement, Rows

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"


def grid(axes) -> list[list[float | None]]:
    """The cells of a heatmap, line by line from the top; None where there is no value."""
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first line is above"
    return axes.collections[0].get_array().tolist()


def names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def at(value: float, metric: str = "share", **labels) -> Measurement:
    return Measurement(metric, labels, value, value - 1, value + 2)


def test_cross_ablation_cells_are_the_rates_of_the_rows():
    rows = Rows([at(1, HARM, mask="none"), at(0.625, HARM, mask="x"), at(0.5, BENIGN, mask="x")])
    picture = cross_ablation_figure({"a": rows, "b": rows[1:2]}, {HARM: "harm", BENIGN: "benign"})
    first, second = picture.figure.axes
    assert (names(first.xaxis), names(first.yaxis)) == (["harm", "benign"], ["none", "x"])
    assert grid(first) == [[100.0, None], [62.5, 50.0]]
    assert grid(second) == [[None, None], [62.5, None]]
    assert [text.get_text() for text in first.texts] == ["100", "62", "50"], "as tables round"


def test_heatmaps_put_each_row_in_its_cell():
    places = ((1, 0), (1, 1), (0, 1))
    rows = Rows(at(10 * layer + head, layer=layer, head=head) for layer, head in places)
    picture = heatmaps({"a": rows, "b": rows[2:], "c": rows}, x="head", y="layer")
    first, second, *_, scale = picture.figure.axes
    assert grid(first) == [[10, 11], [None, 1]], "in the order of the rows"
    assert (names(first.yaxis), names(first.xaxis)) == (["1", "0"], ["0", "1"])
    assert grid(second) == [[None], [1]], "panels side by side have the same lines"
    assert [text.get_text() for text in first.texts] == ["10.00", "11.00", "1.00"]
    assert scale.get_ylim() == (-11, 11)


def test_profiles_draw_intervals_and_share_an_axis_within_a_line():
    def curve(mean: float) -> Rows:
        return Rows(at(mean, depth=depth) for depth in ("0 pre", "1 pre"))

    panels = {"a": {"none": curve(5), "random": curve(6)}, "b": {"none": curve(9)}}
    picture = profiles({**panels, "c": {"none": curve(50)}}, x="depth")
    first, beside, below, _ = picture.figure.axes
    assert names(first.xaxis) == ["0 pre", "1 pre"]
    (line, _, (interval,)), (random, *_) = first.containers
    assert list(line.get_ydata()) == [5, 5]
    assert interval.get_segments()[1][:, 1] == pytest.approx([4, 7])
    assert line.get_color() == beside.containers[0].lines[0].get_color() != random.get_color()
    assert first.get_ylim() == beside.get_ylim() != below.get_ylim()
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["none", "random"], "once"
