"""circuitsvis elements from arrays.

Would catch: tokens that break out of the script or vanish as HTML, NaN in the page, a saved
file or an output of a notebook that asks the network, a value under another token, neuron or head.
"""

import json
import re

import pytest
import torch

from harmcircuits.views.circuitsvis import (
    Visual,
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
WORDS = [HOSTILE, "b"]
TWO, SQUARE = torch.ones(1, 2), torch.ones(1, 2, 2)
VIEWS = {
    "ColoredTokens": coloured_tokens(WORDS, TWO[0]),
    "AttentionPattern": attention_pairs(WORDS, SQUARE, SQUARE, [(0, 0)]),
    "TextNeuronActivations": activated_tokens(WORDS, TWO, TWO, [(0, 0)]),
    "TopkTokens": gained_tokens(WORDS, torch.eye(2), WORDS),
}


def props_of(html: str) -> dict:
    match = re.search(r"CircuitsVis.render\(.*?(\{.*?\})\s*\)", html, flags=re.S)
    assert match
    return json.loads(match[1])


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_saves_to_one_file_and_hostile_text_stays_text(name, tmp_path):
    view = VIEWS[name]
    view.save(tmp_path / "view.html", title=HOSTILE)
    page = (tmp_path / "view.html").read_text()
    body = page.split("<h1>")[1]
    assert HOSTILE not in page and "<img" not in body
    assert not re.search(r'(src|href)="(?!data:)', body)
    assert len(page) > 1_000_000, "the script travels with the file"
    assert len(view._repr_html_()) > 1_000_000, "and with an output"
    if isinstance(view, Visual):
        assert "<img" not in json.dumps(view.props["tokens"]), "the element takes HTML"
    with pytest.raises(ValueError, match="html"):
        view.save(tmp_path / "view.png")


def test_a_script_holds_no_tag_and_no_nan():
    html = Visual("ColoredTokens", {"tokens": ["</b>"], "values": [1.0, float("nan")]}).html()
    assert html.count("</") == 2, "of the element and the script"
    assert props_of(html) == {"tokens": ["</b>"], "values": [1.0, None]}


def test_colours_are_full_at_the_largest_magnitude():
    values = torch.tensor([0.5, -2.0, 1.0])
    view = coloured_tokens(["a", "<bos>", "c"], values)
    assert (view.props["minValue"], view.props["maxValue"]) == (-2, 2)
    assert view.props["tokens"] == [" a", " &lt;bos&gt;", " c"]
    assert coloured_tokens(["a"], values[:1], largest=3.0).props["maxValue"] == 3
    assert coloured_tokens(["a"], torch.zeros(1)).props["maxValue"] > 0, "where nothing changed"


def test_tokens_gained_and_lost_are_those_of_their_position():
    changes = torch.tensor([[0.1, -0.1, 0.0], [-0.5, 0.2, 0.3]])
    props = gained_tokens(["a", "b"], changes, ["x", "y", "<z>"], k=2).props
    assert props["firstDimensionLabels"] == ["1 b → … (0.50)", "0 a → b (0.10)"]
    (cells,), (gained,), (lost,) = props["tokens"], props["topkIdxs"], props["bottomkIdxs"]
    written = [cells[index].strip() for position in gained + lost for (index,) in position]
    assert written[:4] == ["&lt;z&gt; +0.300", "y +0.200", "x +0.100", "&lt;z&gt; +0.000"]
    assert written[4:] == ["y +0.200", "x -0.500", "&lt;z&gt; +0.000", "y -0.100"]


def test_a_neuron_s_texts_share_a_scale():
    before, after = torch.tensor([[2.0, -4.0], [0, 0]]), torch.tensor([[1.0, 3.0], [0, 0]])
    props = activated_tokens(["a", "b"], before, after, [(0, 7), (1, 3)]).props
    assert props["firstDimensionLabels"] == ["L0 N7 (largest 4)", "L1 N3 (largest 0)"]
    assert props["tokens"] == [["unpruned:", " a", " b"], ["masked:", " a", " b"]]
    values = torch.tensor(props["activations"])  # [state, token, neuron, 1]
    assert values[:, :, 0, 0].tolist() == [[0.0, 0.5, -1.0], [0.0, 0.25, 0.75]]
    assert not values[:, :, 1].any(), "a neuron that is silent"


def test_a_head_stands_beside_itself_under_the_mask():
    before, after = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    views = attention_pairs(["a", "b", "c"], before, after, [(0, 1), (4, 2)]).views
    assert list(views) == ["L0 H1 unpruned", "L0 H1 masked", "L4 H2 unpruned", "L4 H2 masked"]
    assert views["L4 H2 masked"].props["attention"].equal(after[1])
