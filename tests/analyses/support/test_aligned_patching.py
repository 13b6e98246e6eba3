"""Activation patching of a model's behaviours: requests that line up, rows that name tokens, views.

Would catch: requests of several forms in one batch, words of a single request of a real model in
rows, the wrong heads, attention that is not that of the state its rows name, a token coloured by
another one's patch.
"""

from dataclasses import replace

import pytest
import torch
from support.patching import (
    aligned_requests,
    attention_rows,
    attention_view,
    patching_rows,
    token_view,
)

import harmcircuits as hc
from harmcircuits.hooks.inspection import attention_patterns
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import PromptSet

LABELS = {"behaviour": "harmful"}


@pytest.fixture(scope="module")
def model():
    return hc.open_model("sft")


@pytest.fixture(scope="module")
def mask(model):
    return hc.top_fraction(hc.random_scores(model), 0.05)


def words_of(model, row: torch.Tensor) -> list[str]:
    return model.bridge.tokenizer.convert_ids_to_tokens(row.tolist())


@pytest.mark.parametrize("name", ["harmful", "benign"])
def test_requests_of_one_form_and_length_are_patched_together(model, name):
    batch, items = aligned_requests(model, name, 6)
    assert len(batch) == len(set(items)) == 6, "one for each item"
    assert (batch.is_target == batch.is_target[0]).all()
    for row, item in zip(batch.tokens, items, strict=True):
        words = words_of(model, row)
        assert item in words
        assert words[:2] == words_of(model, batch.tokens[0])[:2]
    same = (batch.tokens == batch.tokens[0]).all(dim=0)
    start = int(batch.is_target[0].int().argmax())
    assert same[:start].sum() >= 5, "the template and the form"
    assert not same[:start].all(), "the item"


def test_without_reference_answers_there_is_nothing_to_patch(model):
    silent = replace(model.behaviours["benign"], prompts=lambda split: PromptSet(()))
    with pytest.raises(ValueError, match=r"sft has no reference answers .*'benign'"):
        aligned_requests(model.with_behaviours(silent), "benign", 4)


def test_rows_name_tokens_but_not_those_of_one_request_of_a_real_model(model, mask):
    options = {"n": 1, "parts": ["residual"], "layers": [3], "n_answer": 2}
    real = replace(model, is_invented=False)
    names = {}
    for asked in (model, real):
        rows = patching_rows(asked, mask, "harmful", LABELS, **options)
        cells = rows.where("patch_change", layer="3 pre", direction="restore")
        names[asked.is_invented] = [row.labels["position"] for row in cells]
    batch, (item,) = aligned_requests(model, "harmful", 1)
    start = int(batch.is_target[0].int().argmax())
    assert names[False] == [*(str(number) for number in range(start + 2)), "all"]
    assert any(item in name for name in names[True])

    together = patching_rows(real, mask, "harmful", LABELS, **{**options, "n": 4})
    positions = {str(row.labels.get("position")) for row in together}
    assert "1 <user>" in positions and not any(item in name for name in positions)


def test_the_strongest_heads_are_shown_with_and_without_the_mask(model, mask):
    def change(layer: int, head: int, value: float, direction: str = "restore") -> Measurement:
        labels = {"component": "head", "layer": str(layer), "head": head, "direction": direction}
        return Measurement.exact("patch_change", labels, value)

    swept = Rows(
        [change(0, 1, 0.1), change(2, 3, -0.5), change(1, 0, 0.3), change(3, 2, 9.0, "destroy")]
    )
    rows = attention_rows(model, mask, "harmful", swept, LABELS, n=2, n_heads=2)
    assert set(rows.by("layer", "head")) == {(2, 3), (1, 0)}
    batch, _ = aligned_requests(model, "harmful", 2)
    expected = {"unpruned": attention_patterns(model, batch, [(2, 3), (1, 0)])}
    with hc.masked(model, mask):
        expected["masked"] = attention_patterns(model, batch, [(2, 3), (1, 0)])
    panels = attention_view(rows).views
    assert len(panels) == 4
    for state, patterns in expected.items():
        for head, pattern in zip(("L2 H3", "L1 H0"), patterns, strict=True):
            drawn = panels[f"{head} {state}"].props["attention"]
            # What is below 0.02 is left out.
            torch.testing.assert_close(drawn, pattern, atol=0.02, rtol=0)
    assert not torch.allclose(expected["unpruned"], expected["masked"], atol=0.02)
    assert not attention_rows(model, mask, "harmful", Rows(), LABELS, n=2, n_heads=2)


def test_a_token_is_coloured_by_its_own_largest_share():
    def share(layer: str, position: str, value: float) -> Measurement:
        return Measurement.exact("patch_share", {"layer": layer, "position": position}, value)

    places = [("0 pre", "0 a", 0.1), ("0 pre", "1 b", 0.2), ("0 pre", "all", 1.0)]
    places += [("1 pre", "0 a", 0.4), ("1 pre", "1 b", -0.3)]
    view = token_view(Rows(share(*place) for place in places))
    assert view.props["tokens"] == [" 0 a", " 1 b"]
    torch.testing.assert_close(view.props["values"], torch.tensor([0.4, 0.2]))
