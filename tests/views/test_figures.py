"""Figures drawn from rows.

Would catch: a row in another cell or on another line, a curve without its interval, panels whose
lines or colours do not belong together, a worst ability that is not the worst, a line left out
because the colours ran out, chance of another place.
"""

import plotly.graph_objects as go
import pytest

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import (
    CURVE_COLOURS,
    MASK_COLOURS,
    MODEL_COLOURS,
    PALETTE,
    TEXT_COLOURS,
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

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"


def ablated(**masks: dict[str, float]) -> Rows:
    """mask -> metric -> rate."""
    rows = Rows()
    for mask, rates in masks.items():
        rows += [Measurement.exact(name, {"mask": mask}, rate) for name, rate in rates.items()]
    return rows


def cells(heatmap: go.Heatmap) -> list[list[float | None]]:
    """Line by line; None where plotly draws nothing."""
    lines = []
    for line in heatmap.z.tolist():
        lines.append([None if value != value else value for value in line])
    return lines


def titles(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_cross_ablation_cells_are_the_rates_of_the_rows():
    panels = {
        "a": ablated(none={HARM: 1.0}, x={HARM: 0.25, BENIGN: 0.5}),
        "b": ablated(x={HARM: 0.75}),
    }
    figure = cross_ablation_figure(panels, {HARM: "harm", BENIGN: "benign"})
    first, second = figure.data
    assert titles(figure) == ["a", "b"]
    assert (list(first.x), list(first.y)) == (["harm", "benign"], ["none", "x"])
    assert cells(first) == [[100.0, None], [25.0, 50.0]]
    assert cells(second) == [[None, None], [75.0, None]]
    assert first.text.tolist() == [["100", ""], ["25", "50"]]


def test_cross_ablation_rounds_as_the_tables_do():
    panels = {"a": ablated(x={HARM: 0.625})}
    (heatmap,) = cross_ablation_figure(panels, {HARM: "harm"}).data
    assert heatmap.text.tolist() == [["62"]] == [[f"{0.625:.0%}".removesuffix("%")]]


def test_overlap_points_stand_on_the_line_of_their_pair():
    rows = Rows()
    for model, second, lift in (("a", "x", 3.0), ("a", "y", 5.0), ("b", "y", 7.0)):
        labels = {"model": model, "first": "harm", "second": second}
        rows += [Measurement("overlap_lift", labels, lift, lift - 1, lift + 2)]
    pairs = {("harm", "x"): "harm – x", ("harm", "y"): "harm – y"}
    figure = overlap_figure({"lift": rows}, pairs)
    of_a, of_b = figure.data
    assert titles(figure) == ["lift"]
    assert (list(of_a.x), list(of_b.x)) == ([3.0, 5.0], [7.0])
    assert [round(place) for place in of_a.y] == [0, 1]
    assert round(of_b.y[0]) == 1
    intervals = (list(of_a.error_x.arrayminus), list(of_a.error_x.array))
    assert intervals == ([1.0, 1.0], [2.0, 2.0])
    assert figure.layout.yaxis.ticktext == ("harm – x", "harm – y")


def test_token_bars_stand_in_order():
    rows = Rows()
    for offset in (1, -2, 0):
        where = {"offset": offset}
        rows += [Measurement("token_contribution", where, offset / 10, -1.0, 1.0)]
    (bars,) = token_figure({"harmful answers": rows}).data
    assert (list(bars.x), list(bars.y)) == ([-2, 0, 1], [-0.2, 0.0, 0.1])


def test_heatmaps_put_each_row_in_its_cell():
    rows = Rows()
    for layer, head in ((1, 0), (1, 1), (0, 1)):
        labels = {"layer": layer, "head": head}
        rows += [Measurement("share", labels, 10 * layer + head, 0, 99)]
    figure = heatmaps({"a": rows, "b": rows[2:], "c": rows}, x="head", y="layer")
    first, second, _ = figure.data
    lines = (list(second.y), list(second.x))
    assert lines == (["1", "0"], ["1"]), "panels side by side have the same lines"
    assert cells(second) == [[None], [1]]
    assert (list(first.y), list(first.x)) == (["1", "0"], ["0", "1"]), "in the order of the rows"
    assert cells(first) == [[10, 11], [None, 1]]
    assert first.text.tolist() == [["10.00", "11.00"], ["", "1.00"]]
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 11
    wider = heatmaps({"a": rows}, x="head", y="layer", widest=20)
    assert wider.layout.coloraxis.cmax == 20


def test_profiles_draw_intervals_and_name_a_curve_once():
    depths = ("0 pre", "1 pre")
    rows = Rows(Measurement("accuracy", {"depth": depth}, 0.5, 0.4, 0.7) for depth in depths)
    panels = {"a": {"none": rows, "random": rows}, "b": {"none": rows}}
    figure = profiles(panels, x="depth", title="accuracy")
    first, second, random = figure.data
    assert titles(figure) == ["a", "b"]
    names = [(trace.name, trace.showlegend) for trace in (first, second, random)]
    assert names == [("none", True), ("none", False), ("random", True)]
    assert tuple(first.x) == depths
    assert first.error_y.array == pytest.approx((0.2, 0.2))
    assert first.error_y.arrayminus == pytest.approx((0.1, 0.1))
    assert first.line.color == second.line.color != random.line.color


def test_profiles_share_the_vertical_axis_of_their_line_only():
    rows = Rows([Measurement("accuracy", {"depth": "0 pre"}, 0.5, 0.4, 0.7)])
    figure = profiles({panel: {"none": rows} for panel in "abc"}, x="depth")
    places = {trace.yaxis: figure.layout["yaxis" + trace.yaxis[1:]] for trace in figure.data}
    (left, _), (right, shared), (below, own) = places.items()
    assert shared.matches == left
    assert own.matches is None
    assert len({left, right, below}) == 3


def test_colours_come_again_where_lines_are_more():
    names = [f"line {number}" for number in range(10)]
    labels = {"first": "a", "second": "b", "offset": 0, "depth": "0 pre"}
    rows = Rows(Measurement(HARM, {**labels, "model": name}, 0.5, 0.4, 0.7) for name in names)
    lines = {name: rows.where(model=name) for name in names}
    shares = {name: {0.01: of_line} for name, of_line in lines.items()}
    for colours, figure in (
        (PALETTE, share_figure(shares, {HARM: "harm"}, kept=())),
        (MODEL_COLOURS, overlap_figure({"lift": rows}, {("a", "b"): "a – b"})),
        (TEXT_COLOURS, token_figure(lines)),
        (MASK_COLOURS, comparison_figure(lines, {HARM: "harm"})),
        (CURVE_COLOURS, profiles({"panel": lines}, x="depth")),
    ):
        assert [trace.name for trace in figure.data] == names
        drawn = [trace.marker.color or trace.line.color for trace in figure.data]
        assert drawn == [colours[number % len(colours)] for number in range(10)]


def test_a_line_without_rows_keeps_its_colour():
    rows = Rows([Measurement(HARM, {}, 0.5, 0.4, 0.7)])
    lines = {"a": rows, "b": Rows(), "c": rows}
    drawn = [trace.marker.color for trace in comparison_figure(lines, {HARM: "harm"}).data]
    assert drawn == [MASK_COLOURS[0], MASK_COLOURS[2]]


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
    harm, worst = figure.data  # what was not measured is not drawn
    assert titles(figure) == ["harm", "worst kept ability"]
    assert (list(harm.x), list(harm.y)) == ([0.1, 1.0], [0.5, 0.25])
    assert harm.error_y.array == pytest.approx((0.2, 0.2))
    assert list(worst.y) == [0.75, 0.5]


def test_places_are_shaded_by_their_share():
    rows = Rows()
    for layer, kind, removed, size in ((0, "mlp.in", 5, 100), (1, "mlp.in", 20, 200)):
        labels = {"by": "matrix", "layer": layer, "kind": kind, "of": size}
        rows += [Measurement.exact("weights_removed", labels, removed)]
    rows += [Measurement.exact("weights_removed", {"by": "head"}, 1)]
    figure = location_figure(rows)
    (heatmap,) = figure.data
    assert (list(heatmap.x), list(heatmap.y)) == (["mlp.in"], ["layer 0", "layer 1"])
    assert cells(heatmap) == [[5.0], [10.0]]
    assert heatmap.text.tolist() == [["5"], ["20"]]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 10)


def test_bars_are_the_rates_that_a_mask_has():
    lines = {"unpruned": Rows([Measurement(HARM, {}, 0.9, 0.8, 0.95)]), "twin": Rows()}
    (bars,) = comparison_figure(lines, {HARM: "harm", BENIGN: "benign"}).data
    assert (bars.name, list(bars.x), list(bars.y)) == ("unpruned", ["harm"], [0.9])
    assert bars.error_y.arrayminus == pytest.approx((0.1,))


def test_figures_without_rows_are_empty():
    assert not share_figure({"a": {0.1: Rows()}}, {HARM: "harm"}, kept=()).data
    assert not overlap_figure({"lift": Rows()}, {("a", "b"): "a – b"}).data
    assert not token_figure({"a": Rows()}).data
    assert not comparison_figure({"a": Rows()}, {HARM: "harm"}).data
    assert not profiles({"a": {"none": Rows()}}, x="depth").data
    for figure in (
        location_figure(Rows()),
        cross_ablation_figure({"a": Rows()}, {HARM: "harm"}),
        heatmaps({"a": Rows()}, x="head", y="layer"),
    ):
        assert not figure.data[0].z.size


def removed(layer: int, kind: str, n: int, of: int, **unit) -> Rows:
    labels = {"layer": layer, "kind": kind, "of": of, "by": "unit" if unit else "matrix", **unit}
    return Rows([Measurement.exact("weights_removed", labels, n)])


def test_a_component_map_is_against_chance(tmp_path):
    """30 of 400 weights go: by chance 7.5 of every 100."""
    rows = removed(0, "attn.q", 15, 100) + removed(1, "attn.q", 0, 100)
    rows += removed(0, "mlp.in", 15, 200)
    rows += removed(0, "attn.q", 9, 25, unit="head", index=2)
    rows += removed(0, "attn.q", 3, 25, unit="head", index=0)
    figure = component_map(rows)
    heatmap, treemap = figure.data
    assert cells(heatmap) == [[1.0, 0.0], [-4.0, None]], "log2 of 2, 1, none and no matrix"
    assert heatmap.text.tolist() == [["15", "15"], ["0", ""]]

    nodes = {}
    for name, parent, value, counts, colour in zip(
        treemap.ids,
        treemap.parents,
        treemap["values"],
        treemap.customdata,
        treemap.marker.colors,
        strict=True,
    ):
        nodes[name] = (parent, value, list(counts), round(2**colour, 2))
    assert nodes["model"] == ("", 30, [30, 400, 30], 1.0)
    assert nodes["layer 0"] == ("model", 30, [30, 300, 22.5], 1.33)
    assert "layer 1" not in nodes, "nothing is removed there"
    above = "layer 0 attn.q"
    assert nodes[above] == ("layer 0", 15, [15, 100, 7.5], 2.0)
    assert nodes[f"{above} head 2"] == (above, 9, [9, 25, 3.75], 2.4)
    assert nodes[f"{above} head 0"] == (above, 3, [3, 25, 3.75], 0.8)
    assert nodes[f"{above} other heads"] == (above, 3, [3, 50, 7.5], 0.4)

    figure.save(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert len(page) > 1_000_000 and "cdn.plot.ly" not in page.split("Plotly.newPlot")[-1]


def test_a_component_map_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"component_map.*removes nothing"):
        component_map(removed(0, "attn.q", 0, 100))
