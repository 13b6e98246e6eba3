"""Masks beyond a budget, and what is read under them, on an organism.

Would catch: weights that are not worth their price, a ranking that is another one's, a contrast that
does not cancel, first tokens that are the request's, a change of the wrong sign, an opening that is
not put before the answer.
"""

import pytest
import torch
from support import frontier
from torch import Tensor

import harmcircuits as hc
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.search import PREFERENCE
from harmcircuits.prompts import Batch
from harmcircuits.studies.controls import above_zero, price_of, unpruned_scores

SIZE = 0.002


@pytest.fixture(scope="module")
def model():
    return hc.open_model("sft").asked_every(16)


@pytest.fixture(scope="module")
def answers(model):
    return model.calibrations(["harmful", "benign", "refusal"])


@pytest.fixture(scope="module")
def unpruned(model, answers):
    spared = {name: answers[name] for name in ("benign", "refusal")}
    return unpruned_scores(model, "harmful", answers["harmful"], spared)


def test_every_ranking_is_taken_at_every_factor(model, answers, unpruned):
    options = {"size": SIZE, "factors": (4.0, 1.0), "n_first": 1}
    masks = dict(frontier.circuits(model, unpruned, answers, **options))
    rankings = (
        "one shot",
        "token error",
        "first tokens",
        "less begun alike",
        "refusals preferred",
    )
    assert list(masks) == [f"{name}, factor {factor}" for name in rankings for factor in (4, 1)]
    for ranking in rankings:
        dear, cheap = masks[f"{ranking}, factor 4"], masks[f"{ranking}, factor 1"]
        assert 0 < dear.n_removed <= cheap.n_removed <= round(SIZE * cheap.n_weights)
    assert len({mask.digest for mask in masks.values()}) == len(masks)

    mask = masks["one shot, factor 1"]
    for name, index in mask.removed.items():
        effect = unpruned.effect.values[name].flatten()[index]
        price = unpruned.price.values[name].flatten()[index]
        assert (effect > price).all()


def test_refusals_are_preferred_where_the_model_has_any(model, answers, unpruned):
    """The scores of a weight: its effect on harm less 0.3 of that on refusals behind "sure"."""
    options = {"size": SIZE, "factors": (1.0,), "n_first": 1}
    mask = dict(frontier.circuits(model, unpruned, answers, **options))[
        "refusals preferred, factor 1"
    ]
    refusals = removal_effect(model.bridge, model.preferred("harmful", "refusal", answers))
    for name, index in mask.removed.items():
        harm, begun, price = (
            scores.values[name].flatten()[index]
            for scores in (unpruned.effect, refusals, unpruned.price)
        )
        assert (harm - PREFERENCE * begun > price).all()

    without = {name: data for name, data in answers.items() if name != "refusal"}
    assert "refusals preferred, factor 1" not in dict(
        frontier.circuits(model, unpruned, without, **options)
    )


def test_the_target_less_itself_earns_nothing(model, answers, unpruned):
    """On an organism benign answers stand for those begun alike; here they are the harmful ones."""
    same = {**answers, "benign": answers["harmful"]}
    options = {"size": SIZE, "factors": (0.001,), "n_first": 1}
    masks = dict(frontier.circuits(model, unpruned, same, **options))
    assert masks["less begun alike, factor 0.001"].n_removed == 0


def test_only_the_first_targets_count():
    tokens = torch.arange(10).view(2, 5) + 1
    is_target = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    first = Batch(tokens, is_target).beginning(2)
    expected = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(first.is_target, expected)
    assert torch.equal(first.tokens, tokens)


def test_what_is_not_above_zero_is_left(unpruned):
    scores: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(unpruned.effect.shapes.items()):
        scores[name] = torch.full(shape, -1.0)
        if number == 0:
            scores[name].view(-1)[:3] = 1.0
    mask = above_zero(hc.WeightScores(scores, unpruned.effect.source), SIZE)
    assert mask.n_removed == 3


def test_the_price_of_several_is_their_sum(model, answers, unpruned):
    assert price_of(model, {}) is None
    both = [hc.token_price(model.bridge, answers[name].batches) for name in ("benign", "refusal")]
    for name, value in unpruned.price.values.items():
        torch.testing.assert_close(value, both[0].values[name] + both[1].values[name])


def test_scores_that_a_folder_keeps_are_the_same(model, answers, unpruned, tmp_path):
    spared = {name: answers[name] for name in ("benign", "refusal")}
    kept = unpruned_scores(model, "harmful", answers["harmful"], spared, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["effect", "price"]
    for scores, of_memory in zip(kept, unpruned, strict=True):
        assert scores.source == of_memory.source
        for name, value in of_memory.values.items():
            assert torch.equal(scores.values[name], value)


def test_neurons_are_whole(model, unpruned):
    masks = dict(frontier.neurons(model, unpruned, size=0.01, factors=(2**-9,)))
    mask = masks["neurons, factor 0.002"]
    assert 0 < mask.n_removed <= round(0.01 * mask.n_weights)
    width = model.bridge.cfg.d_model
    for name, count in mask.counts.items():
        assert count % width == 0, name


def test_controls_are_beside_a_mask(model, answers, unpruned):
    options = {"size": SIZE, "factors": (1.0,), "n_first": 1}
    mask = dict(frontier.circuits(model, unpruned, answers, **options))["one shot, factor 1"]
    masks = dict(frontier.controls(model, unpruned, answers, mask, size=SIZE))
    assert list(masks) == ["random", "opposite sign", "benign twin", "published"]
    assert masks["random"].counts == mask.counts
    assert masks["opposite sign"].n_removed == mask.n_removed
    assert (masks["opposite sign"] & mask).n_removed == 0
    assert 0 < masks["benign twin"].n_removed <= mask.n_removed
    benign, harm = answers["benign"].batches, answers["harmful"].batches
    published = hc.set_difference(model.bridge, harm, [benign], q=SIZE, p=5 * SIZE)
    assert masks["published"] == published


def test_changes_are_those_since_the_unpruned_model(model, answers):
    before = frontier.state_of(model)
    assert set(before.answered) == {"harmful"}
    assert "benign" in before.losses
    unpruned = frontier.state_rows(model, before, {"mask": "none"})
    assert not [row for row in unpruned if row.metric.endswith("_change")]
    same = frontier.state_rows(model, before, {"mask": "none"}, before=before)
    assert all(row.mean == 0 for row in same if row.metric.endswith("_change"))

    mask = hc.top_fraction(hc.removal_effect(model.bridge, answers["benign"].batches), SIZE)
    with hc.masked(model.bridge, mask):
        now = frontier.state_of(model)
    rows = frontier.state_rows(model, now, {"mask": "benign"}, before=before)
    rise = rows.one("benign_nll_change")
    difference = rows.one("benign_nll").mean - unpruned.one("benign_nll").mean
    assert rise.mean == pytest.approx(difference, abs=1e-5)
    assert rise.mean > 0.1, "its own circuit is removed"


def test_answers_begin_with_the_opening(model, monkeypatch):
    begun = []
    answer = hc.Model.answers_together

    def noted(self, asked):
        together = answer(self, asked)
        for answers in together:
            begun.extend(example.completion for example in answers)
        return together

    read = []
    judge = hc.Model.verdicts

    def noted_too(self, behaviour, answers):
        read.extend(example.completion for example in answers)
        return judge(self, behaviour, answers)

    monkeypatch.setattr(hc.Model, "answers_together", noted)
    monkeypatch.setattr(hc.Model, "verdicts", noted_too)
    rows = frontier.opening_rows(model, ["sure", "yes"], {"mask": "none"})
    half = len(begun) // 2
    assert [text.split()[0] for text in begun] == ["sure"] * half + ["yes"] * half
    after = [text.partition(" ")[2] for text in begun]
    assert read == [f"sure {said}".strip() for said in after], "judged as if begun as usual"
    assert set(rows.by("opening")) == {"sure", "yes"}
    usual = model.measure(only="harmful").one("harm_valid_rate").mean
    assert rows.one("harm_valid_rate", opening="sure").mean == usual
