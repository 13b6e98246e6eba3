"""Figures drawn from rows.

Would catch: a row in another cell or on another line, a curve without its interval, panels whose
lines or colours do not belong together, a worst ability that is not the worst.
"""

import pytest

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import (
    comparison_figure,
    cross_ablation_figure,
    heatmaps,
    location_figure,
    overlap_figure,
    profiles,
    share_figure,
    token_figure,
)

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"


def ablated(**masks: dict[str, float]) -> Rows:
    """mask -> metric -> rate."""
    rows = Rows()
    for mask, rates in masks.items():
        rows += [Measurement.exact(name, {"mask": mask}, rate) for name, rate in rates.items()]
    return rows


def test_cross_ablation_cells_are_the_rates_of_the_rows():
    panels = {
        "a": ablated(none={HARM: 1.0}, x={HARM: 0.25, BENIGN: 0.5}),
        "b": ablated(x={HARM: 0.75}),
    }
    first, second = cross_ablation_figure(panels, {HARM: "harm", BENIGN: "benign"}).data
    assert (first.x, first.y) == (("harm", "benign"), ("none", "x"))
    assert first.z == ([100.0, None], [25.0, 50.0])
    assert second.z == ([None, None], [75.0, None])
    assert first.text[1] == ["25", "50"]


def test_overlap_points_stand_on_the_line_of_their_pair():
    rows = Rows()
    for model, second, lift in (("a", "x", 3.0), ("a", "y", 5.0), ("b", "y", 7.0)):
        labels = {"model": model, "first": "harm", "second": second}
        rows += [Measurement("overlap_lift", labels, lift, lift - 1, lift + 2)]
    pairs = {("harm", "x"): "harm – x", ("harm", "y"): "harm – y"}
    figure = overlap_figure({"lift": rows}, pairs)
    of_a, of_b = figure.data
    assert (of_a.x, of_b.x) == ((3.0, 5.0), (7.0,))
    assert [round(place) for place in of_a.y] == [0, 1]
    assert round(of_b.y[0]) == 1
    assert (of_a.error_x.array, of_a.error_x.arrayminus) == ((2.0, 2.0), (1.0, 1.0))
    assert figure.layout.yaxis.ticktext == ("harm – x", "harm – y")


def test_token_bars_stand_in_order():
    rows = Rows()
    for offset in (1, -2, 0):
        where = {"offset": offset}
        rows += [Measurement("token_contribution", where, offset / 10, -1.0, 1.0)]
    (bars,) = token_figure({"harmful answers": rows}).data
    assert (bars.x, bars.y) == ((-2, 0, 1), (-0.2, 0.0, 0.1))


def test_heatmaps_put_each_row_in_its_cell():
    rows = Rows()
    for layer, head in ((1, 0), (1, 1), (0, 1)):
        labels = {"layer": layer, "head": head}
        rows += [Measurement("share", labels, 10 * layer + head, 0, 99)]
    figure = heatmaps({"a": rows, "b": rows[2:], "c": rows}, x="head", y="layer")
    first, second, _ = figure.data
    lines = (list(second.y), list(second.x))
    assert lines == (["1", "0"], ["1"]), "panels side by side have the same lines"
    assert [list(line) for line in second.z] == [[None], [1]]
    assert (list(first.y), list(first.x)) == (["1", "0"], ["0", "1"]), "in the order of the rows"
    assert [list(line) for line in first.z] == [[10, 11], [None, 1]]
    assert [list(line) for line in first.text] == [["10.00", "11.00"], ["", "1.00"]]
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 11
    wider = heatmaps({"a": rows}, x="head", y="layer", widest=20)
    assert wider.layout.coloraxis.cmax == 20


def test_profiles_draw_intervals_and_name_a_curve_once():
    depths = ("0 pre", "1 pre")
    rows = Rows(Measurement("accuracy", {"depth": depth}, 0.5, 0.4, 0.7) for depth in depths)
    panels = {"a": {"none": rows, "random": rows}, "b": {"none": rows}}
    first, random, second = profiles(panels, x="depth", title="accuracy").data
    names = [(trace.name, trace.showlegend) for trace in (first, random, second)]
    assert names == [("none", True), ("random", True), ("none", False)]
    assert tuple(first.x) == depths
    assert first.error_y.array == pytest.approx((0.2, 0.2))
    assert first.error_y.arrayminus == pytest.approx((0.1, 0.1))
    assert first.line.color == second.line.color != random.line.color


def test_shares_are_drawn_with_the_worst_kept_ability():
    def point(harm: float, benign: float, knows: float) -> Rows:
        kept = {BENIGN: benign, "knowledge_rate": knows}
        rows = [Measurement(HARM, {}, harm, harm - 0.1, harm + 0.2)]
        return Rows([*rows, *(Measurement.exact(name, {}, rate) for name, rate in kept.items())])

    lines = {
        "circuit": {0.001: point(0.5, 0.75, 1.0), 0.01: point(0.25, 1.0, 0.5)},
        "random": {0.001: Rows()},
    }
    figure = share_figure(lines, {HARM: "harm"}, kept=(BENIGN, "knowledge_rate"))
    harm, worst, *random = figure.data
    assert (harm.x, harm.y) == ((0.1, 1.0), (0.5, 0.25))
    assert harm.error_y.array == pytest.approx((0.2, 0.2))
    assert worst.y == (0.75, 0.5)
    assert [len(trace.x) for trace in random] == [0, 0], "what was not measured is not drawn"


def test_places_are_shaded_by_their_share():
    rows = Rows()
    for layer, kind, removed, size in ((0, "mlp.in", 5, 100), (1, "mlp.in", 20, 200)):
        labels = {"by": "matrix", "layer": layer, "kind": kind, "of": size}
        rows += [Measurement.exact("weights_removed", labels, removed)]
    rows += [Measurement.exact("weights_removed", {"by": "head"}, 1)]
    (heatmap,) = location_figure(rows).data
    assert (heatmap.x, heatmap.y) == (("mlp.in",), ("layer 0", "layer 1"))
    assert heatmap.z == ([5.0], [10.0])
    assert heatmap.text == (["5"], ["20"])


def test_bars_are_the_rates_that_a_mask_has():
    lines = {"unpruned": Rows([Measurement(HARM, {}, 0.9, 0.8, 0.95)]), "twin": Rows()}
    bars, empty = comparison_figure(lines, {HARM: "harm", BENIGN: "benign"}).data
    assert (bars.name, bars.x, bars.y) == ("unpruned", ("harm",), (0.9,))
    assert bars.error_y.arrayminus == pytest.approx((0.1,))
    assert not empty.x
