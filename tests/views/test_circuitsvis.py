"""circuitsvis elements from arrays.

Would catch: tokens that break out of the script or vanish as HTML, NaN in the page, properties that
circuitsvis does not know, a notebook that asks the network, a saved file without its script, a
value under another token, neuron or head than its own.
"""

import json
import re

import circuitsvis as cv
import pytest
import torch

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.inspection import attention_patterns, token_changes, token_texts
from harmcircuits.hooks.masking import masked
from harmcircuits.views.circuitsvis import (
    Visual,
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"


def props_of(html: str) -> dict:
    match = re.search(r"CircuitsVis\.\w+,\s*(\{.*\})\s*\)", html, flags=re.S)
    assert match
    return json.loads(match[1])


def props_of_theirs(name: str, rendered) -> dict:
    """The properties that circuitsvis itself gives this element."""
    return props_of(rendered.cdn_src.replace(f"{name},", f"CircuitsVis.{name},", 2))


def test_tokens_cannot_leave_the_script():
    props = {"tokens": ["</script><b>", "&"], "values": [1.0, float("nan")]}
    html = Visual("ColoredTokens", props).html()
    assert html.count("</script>") == 1
    assert props_of(html) == {"tokens": ["</script><b>", "&"], "values": [1.0, None]}


def test_a_notebook_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a view probed the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    html = Visual("ColoredTokens", {"tokens": ["a"], "values": [0.0]})._repr_html_()
    assert "unpkg.com" not in html.split("CircuitsVis.render")[-1]
    assert len(html) > 1_000_000, "the script travels with the page"


def test_properties_are_those_of_circuitsvis():
    tokens = coloured_tokens(["a"], torch.tensor([0.5]))
    theirs = cv.tokens.colored_tokens(
        ["a"], [0.0], min_value=-1, max_value=1, negative_color="a", positive_color="b"
    )
    assert tokens.props.keys() == props_of_theirs("ColoredTokens", theirs).keys()


def test_colours_are_full_at_the_largest_magnitude():
    values = torch.tensor([0.5, -2.0, 1.0])
    view = coloured_tokens(["a", "<bos>", "c"], values)
    assert (view.props["minValue"], view.props["maxValue"]) == (-2, 2)
    assert view.props["tokens"] == [" a", " &lt;bos&gt;", " c"], "the element takes HTML"
    wider = coloured_tokens(["a"], values[:1], largest=3.0)
    assert (wider.props["minValue"], wider.props["maxValue"]) == (-3, 3)
    flat = coloured_tokens(["a"], torch.zeros(1))
    assert flat.props["maxValue"] > flat.props["minValue"], "nothing changed, and nothing fails"


def test_a_text_is_drawn_from_a_model(llama, batch):
    mask = top_fraction(random_scores(llama), 0.3)
    changes = token_changes(llama, mask, batch)
    for number, is_token in enumerate(batch.is_token):
        view = coloured_tokens(token_texts(llama, batch, number), changes[number][is_token])
        props = props_of(view.html())
        assert len(props["tokens"]) == len(props["values"]) == int(is_token.sum())
        assert props["values"] == pytest.approx(changes[number][is_token].tolist())


def test_attention_is_drawn_before_and_under_a_mask(llama, batch):
    heads, texts = [(0, 1), (1, 3)], token_texts(llama, batch)
    before = attention_patterns(llama, batch, heads)
    with masked(llama, top_fraction(random_scores(llama), 0.5)):
        under = attention_patterns(llama, batch, heads)
    views = attention_pairs(texts, before, under, heads).views
    for view in views.values():
        assert view.props["attention"].shape == (len(texts), len(texts))
    unpruned, pruned = (views[f"L1 H3 {state}"] for state in ("unpruned", "masked"))
    assert not torch.allclose(unpruned.props["attention"], pruned.props["attention"])


def changes_of(*lines: list[float]) -> torch.Tensor:
    return torch.tensor(lines)


def test_more_properties_are_those_of_circuitsvis():
    pair = attention_pairs(["a"], torch.ones(1, 1, 1), torch.ones(1, 1, 1), [(0, 1)])
    options = {"min_value": 0.0, "max_value": 1.0, "positive_color": "a"}
    theirs = cv.attention.attention_pattern(
        ["a"], torch.ones(1, 1), show_axis_labels=True, mask_upper_tri=True, **options
    )
    ours = next(iter(pair.views.values()))
    assert ours.props.keys() == props_of_theirs("AttentionPattern", theirs).keys()

    neurons = activated_tokens(["a"], torch.ones(1, 1), torch.ones(1, 1), [(0, 1)])
    theirs = cv.activations.text_neuron_activations(
        ["a"],
        torch.ones(1, 1, 1),
        first_dimension_labels=["a"],
        second_dimension_labels=["a"],
    )
    assert neurons.props.keys() == props_of_theirs("TextNeuronActivations", theirs).keys()

    gained = gained_tokens(["a"], torch.ones(1, 1), ["v"])
    theirs = cv.topk_tokens.topk_tokens(
        [["a"]], [torch.ones(1, 1, 1).numpy()], sample_labels=["a"], first_dimension_labels=["a"]
    )
    assert gained.props.keys() == props_of_theirs("TopkTokens", theirs).keys()


def test_tokens_gained_and_lost_are_those_of_their_position():
    changes = changes_of([0.1, -0.1, 0.0], [-0.5, 0.2, 0.3])
    view = gained_tokens(["a", "b"], changes, ["x", "y", "<z>"], k=2)
    assert view.props["firstDimensionLabels"] == ["1 b → … (0.50)", "0 a → b (0.10)"]
    (cells,) = view.props["tokens"]

    def written(indices: str) -> list[list[str]]:
        (positions,) = view.props[indices]
        return [[cells[index].strip() for (index,) in position] for position in positions]

    assert written("topkIdxs") == [
        ["&lt;z&gt; +0.300", "y +0.200"],
        ["x +0.100", "&lt;z&gt; +0.000"],
    ]
    assert written("bottomkIdxs") == [["y +0.200", "x -0.500"], ["&lt;z&gt; +0.000", "y -0.100"]]
    (magnitudes,) = view.props["bottomkVals"]
    assert [value for (value,) in magnitudes[0]] == pytest.approx([0.2, 0.5])


def test_a_neuron_s_texts_share_a_scale():
    before, after = changes_of([2.0, -4.0], [0.0, 0.0]), changes_of([1.0, 3.0], [0.0, 0.0])
    view = activated_tokens(["a", "<b>"], before, after, [(0, 7), (1, 3)])
    assert view.props["firstDimensionLabels"] == ["L0 N7 (largest 4)", "L1 N3 (largest 0)"]
    assert view.props["tokens"] == [
        ["unpruned:", " a", " &lt;b&gt;"],
        ["masked:", " a", " &lt;b&gt;"],
    ]
    values = torch.tensor(view.props["activations"])  # [state, token, neuron, 1]
    assert values[:, :, 0, 0].tolist() == [[0.0, 0.5, -1.0], [0.0, 0.25, 0.75]]
    assert not values[:, :, 1].any(), "a neuron that is silent"


def test_a_head_stands_beside_itself_under_the_mask():
    before, after = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    view = attention_pairs(["a", "b", "c"], before, after, [(0, 1), (4, 2)])
    titles = ["L0 H1 unpruned", "L0 H1 masked", "L4 H2 unpruned", "L4 H2 masked"]
    assert list(view.views) == titles and view.columns == 2
    assert view.views["L4 H2 masked"].props["attention"].equal(after[1])
    assert "zoom" not in view.html()
    longer = attention_pairs(["a"] * 99, before[:1], after[:1], [(0, 1)])
    assert longer.width >= 99 * 12, "a name needs that much of an axis"


@pytest.mark.parametrize("name", ["tokens", "attention", "neurons", "gained"])
def test_a_view_saves_to_one_file_and_hostile_text_stays_text(name, tmp_path):
    words = [HOSTILE, "b"]
    one, square = torch.ones(1, 2), torch.ones(1, 2, 2)
    views = {
        "tokens": lambda: coloured_tokens(words, one[0]),
        "attention": lambda: attention_pairs(words, square, square, [(0, 0)]),
        "neurons": lambda: activated_tokens(words, one, one, [(0, 0)]),
        "gained": lambda: gained_tokens(words, torch.eye(2), words),
    }
    view = views[name]()
    view.save(tmp_path / "view.html", title=HOSTILE)
    page = (tmp_path / "view.html").read_text()
    assert HOSTILE not in page and "<img" not in page.split("</h1>")[1]
    assert len(page) > 1_000_000, "the script travels with the file"
    assert not re.search(r'(src|href)="(?!data:)', page.split("</h1>")[1])
    assert "color-scheme: light dark" in page
    if isinstance(view, Visual):
        assert "<img" not in json.dumps(view.props["tokens"]), "the element takes HTML"
