"""circuitsvis elements from arrays.

Would catch: tokens that break out of the script or vanish as HTML, NaN in the page, properties that
circuitsvis does not know, a notebook that asks the network.
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
from harmcircuits.views.circuitsvis import Visual, attention_heads, coloured_tokens


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

    heads = attention_heads(["a"], torch.ones(1, 1, 1), [(0, 1)])
    options = {"attention_head_names": ["a"], "min_value": 0.0, "max_value": 1.0}
    theirs = cv.attention.attention_heads(
        torch.ones(1, 1, 1), ["a"], mask_upper_tri=True, **options
    )
    assert heads.props.keys() == props_of_theirs("AttentionHeads", theirs).keys()


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
    before = attention_heads(texts, attention_patterns(llama, batch, heads), heads)
    with masked(llama, top_fraction(random_scores(llama), 0.5)):
        under = attention_heads(texts, attention_patterns(llama, batch, heads), heads)
    for view in (before, under):
        assert view.props["attentionHeadNames"] == ["L0 H1", "L1 H3"]
        assert view.props["attention"].shape == (2, len(texts), len(texts))
    assert not torch.allclose(before.props["attention"], under.props["attention"])
