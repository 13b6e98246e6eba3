"""circuitsvis elements and figures.

Would catch: tokens that break out of the script, NaN in the page, properties that circuitsvis does not know, a view that
shows the unpruned model twice, a row in another cell, a curve without its interval.
"""

import json
import re

import circuitsvis as cv
import pytest
import torch

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.measurements import Measurement
from harmcircuits.prompts import Batch
from harmcircuits.views.circuitsvis import Visual
from harmcircuits.views.figures import (
    attention_views,
    cross_ablation_figure,
    heatmaps,
    lost_tokens,
    overlap_figure,
    profiles,
    token_figure,
)


def props_of(html: str) -> dict:
    return json.loads(re.search(r"CircuitsVis\.\w+,\s*(\{.*\})\s*\)", html, flags=re.S)[1])


def test_tokens_cannot_leave_the_script():
    html = Visual(
        "ColoredTokens", {"tokens": ["</script><b>", "&"], "values": [1.0, float("nan")]}
    ).html()
    assert html.count("</script>") == 1
    assert props_of(html) == {"tokens": ["</script><b>", "&"], "values": [1.0, None]}


def test_a_notebook_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a view probed the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    html = Visual("ColoredTokens", {"tokens": ["a"], "values": [0.0]})._repr_html_()
    assert "unpkg.com" not in html.split("CircuitsVis.render")[-1]
    assert len(html) > 1_000_000, "the script travels with the page"


def test_properties_are_those_of_circuitsvis(llama, batch):
    mask = top_fraction(random_scores(llama), 0.3)
    tokens = lost_tokens(llama, mask, batch)[0]
    theirs = cv.tokens.colored_tokens(
        ["a"], [0.0], min_value=-1, max_value=1, negative_color="a", positive_color="b"
    )
    assert (
        tokens.props.keys()
        == props_of(
            theirs.cdn_src.replace("ColoredTokens,", "CircuitsVis.ColoredTokens,", 2)
        ).keys()
    )


def test_lost_tokens_are_the_change_of_log_probability(llama, batch):
    nothing = top_fraction(random_scores(llama), 0.0)
    assert all((view.props["values"] == 0).all() for view in lost_tokens(llama, nothing, batch))
    views = lost_tokens(llama, top_fraction(random_scores(llama), 0.5), batch)
    assert len(views) == len(batch)
    for view, real in zip(views, batch.is_token, strict=True):
        assert len(view.props["tokens"]) == int(real.sum()) == len(view.props["values"])
        assert view.props["values"][1:].abs().min() > 0


def test_attention_is_shown_before_and_under_the_mask(llama, batch):
    mask = top_fraction(random_scores(llama), 0.5)
    first = Batch(batch.tokens[:1], batch.is_target[:1])
    before, after = attention_views(llama, mask, first, [(0, 1), (1, 3)])
    assert before.props["attentionHeadNames"] == ["L0 H1", "L1 H3"]
    for view in (before, after):
        # Rows of a causal attention pattern sum to one; float32.
        torch.testing.assert_close(
            view.props["attention"].sum(-1), torch.ones(2, int(first.is_token.sum()))
        )
    assert not torch.allclose(before.props["attention"], after.props["attention"])


def test_cross_ablation_cells_are_the_rates_of_the_rows():
    metrics = {"harm_valid_rate": "harm", "benign_valid_rate": "benign"}
    panels = {
        model: [
            Measurement.exact(metric, {"mask": mask}, value)
            for (mask, metric), value in cells.items()
        ]
        for model, cells in {
            "a": {
                ("none", "harm_valid_rate"): 1.0,
                ("x", "harm_valid_rate"): 0.25,
                ("x", "benign_valid_rate"): 0.5,
            },
            "b": {("x", "harm_valid_rate"): 0.75},
        }.items()
    }
    figure = cross_ablation_figure(panels, metrics)
    first, second = figure.data
    assert (first.x, first.y) == (("harm", "benign"), ("none", "x"))
    assert first.z == ([100.0, None], [25.0, 50.0])
    assert second.z == ([None, None], [75.0, None])
    assert first.text[1] == ["25", "50"]


def test_overlap_points_stand_on_the_line_of_their_pair():
    rows = [
        Measurement(
            "overlap_lift",
            {"model": model, "first": "harm", "second": other},
            lift,
            lift - 1,
            lift + 2,
        )
        for model, other, lift in (("a", "x", 3.0), ("a", "y", 5.0), ("b", "y", 7.0))
    ]
    figure = overlap_figure({"lift": rows}, {("harm", "x"): "harm – x", ("harm", "y"): "harm – y"})
    one, two = figure.data
    assert (one.x, two.x) == ((3.0, 5.0), (7.0,))
    assert [round(place) for place in one.y] == [0, 1]
    assert round(two.y[0]) == 1
    assert (one.error_x.array, one.error_x.arrayminus) == ((2.0, 2.0), (1.0, 1.0))
    assert figure.layout.yaxis.ticktext == ("harm – x", "harm – y")


def test_token_bars_stand_in_order():
    rows = [
        Measurement("token_contribution", {"offset": offset}, offset / 10, -1.0, 1.0)
        for offset in (1, -2, 0)
    ]
    (bars,) = token_figure({"harmful answers": rows}).data
    assert (bars.x, bars.y) == ((-2, 0, 1), (-0.2, 0.0, 0.1))


def test_heatmaps_put_each_row_in_its_cell():
    rows = [
        Measurement("share", {"layer": layer, "head": head}, 10 * layer + head, 0, 99)
        for layer, head in ((1, 0), (1, 1), (0, 1))
    ]
    figure = heatmaps({"a": rows, "b": rows[2:], "c": rows}, x="head", y="layer")
    first, second, _ = figure.data
    assert (list(second.y), list(second.x)) == (["1", "0"], ["1"]), (
        "panels side by side have the same lines"
    )
    assert [list(line) for line in second.z] == [[None], [1]]
    assert (list(first.y), list(first.x)) == (["1", "0"], ["0", "1"]), "in the order of the rows"
    assert [list(line) for line in first.z] == [[10, 11], [None, 1]]
    assert [list(line) for line in first.text] == [["10.00", "11.00"], ["", "1.00"]]
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 11
    assert heatmaps({"a": rows}, x="head", y="layer", widest=20).layout.coloraxis.cmax == 20


def test_profiles_draw_intervals_and_name_a_curve_once():
    rows = [
        Measurement("accuracy", {"depth": depth}, 0.5, 0.4, 0.7) for depth in ("0 pre", "1 pre")
    ]
    figure = profiles(
        {"a": {"none": rows, "random": rows}, "b": {"none": rows}}, x="depth", title="accuracy"
    )
    assert [(trace.name, trace.showlegend) for trace in figure.data] == [
        ("none", True),
        ("random", True),
        ("none", False),
    ]
    assert list(figure.data[0].x) == ["0 pre", "1 pre"]
    assert figure.data[0].error_y.array == pytest.approx((0.2, 0.2))
    assert figure.data[0].error_y.arrayminus == pytest.approx((0.1, 0.1))
    assert figure.data[0].line.color == figure.data[2].line.color != figure.data[1].line.color
