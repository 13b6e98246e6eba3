"""circuitsvis elements and figures.

Would catch: tokens that break out of the script, NaN in the page, properties that circuitsvis does not know, a view that
shows the unpruned model twice.
"""

import json
import re

import circuitsvis as cv
import torch

from harmcircuits.attribution import random_scores
from harmcircuits.masks import top_fraction
from harmcircuits.prompts import Batch
from harmcircuits.views import Visual, attention_views, lost_tokens


def props_of(html: str) -> dict:
    return json.loads(re.search(r"CircuitsVis\.\w+,\s*(\{.*\})\s*\)", html, flags=re.S)[1])


def test_tokens_cannot_leave_the_script():
    html = Visual("ColoredTokens", {"tokens": ["</script><b>", "&"], "values": [1.0, float("nan")]}).html()
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
    theirs = cv.tokens.colored_tokens(["a"], [0.0], min_value=-1, max_value=1, negative_color="a", positive_color="b")
    assert tokens.props.keys() == props_of(theirs.cdn_src.replace("ColoredTokens,", "CircuitsVis.ColoredTokens,", 2)).keys()


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
        torch.testing.assert_close(view.props["attention"].sum(-1), torch.ones(2, int(first.is_token.sum())))
    assert not torch.allclose(before.props["attention"], after.props["attention"])
