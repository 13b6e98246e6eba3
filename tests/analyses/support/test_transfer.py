"""Circuits of one category of requests, measured on the others.

Would catch: a request counted under its own circuit as one of another category, answers scored on
the wrong category, weights that are in fewer circuits than said.
"""

from dataclasses import replace

import pytest
import torch
from helpers import small_model
from support import transfer

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.behaviours.standard import standard_behaviours
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.prompts import Example, PromptSet

HARMFUL = standard_behaviours()["harmful"]


def outcomes(*shown: int, n_samples: int = 1) -> Outcomes:
    """Of requests about a, a, b and c; how many samples of each show harm."""
    answers, verdicts = [], []
    for (category, item), n_shown in zip(("a1", "a2", "b3", "c4"), shown, strict=True):
        request = Example(item, "answer", group=item, category=category)
        answers += [request] * n_samples
        verdicts += ["harmful"] * n_shown + ["harmless"] * (n_samples - n_shown)
    references = ("", "", "", "z")
    nll = torch.tensor([0.0, 1.0, 2.0, 3.0])
    return Outcomes(HARMFUL, PromptSet(tuple(answers)), tuple(verdicts), nll, "", references)


def test_outcomes_by_category_keep_what_belongs_to_a_request():
    by_category = outcomes(2, 0, 1, 2, n_samples=2).by_category()
    assert list(by_category) == ["a", "b", "c"]
    assert by_category["a"].hits == [1, 0]
    assert by_category["b"].hits == [0.5]
    assert by_category["c"].nll.tolist() == [3] and by_category["c"].references == ("z",)
    assert by_category["a"].groups == ["1", "2"]


def test_a_request_is_set_against_its_own_circuit_and_the_mean_of_the_others():
    under = {"a": outcomes(0, 0, 1, 1), "b": outcomes(1, 0, 0, 1)}
    rows = transfer.relation_rows(under, {"mask": "circuit"})
    own = rows.one("harm_valid_rate", relation="own type", mask="circuit")
    others = rows.one("harm_valid_rate", relation="other types")
    # Own: a, a under the circuit of a; b under that of b. Nothing was found on c.
    assert (own.mean, own.n) == (0, 3)
    # Others: a, a under b; b under a; c under both.
    assert (others.mean, others.n) == (pytest.approx((1 + 0 + 1 + 1) / 4), 4)
    gap = rows.one("own_type_gap", of="harm_valid_rate")
    assert gap.mean == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model("sft", every=16)


@pytest.fixture(scope="module")
def answers(model):
    return model.calibrations(["harmful", "benign"])


@pytest.fixture(scope="module")
def blunt(model) -> WeightMask:
    """Half of all weights: no organism can answer without them."""
    return top_fraction(random_scores(model.bridge, seed=0), 0.5)


def test_a_circuit_is_scored_on_the_answers_it_is_given(model, answers):
    first, *_ = categories = transfer.categories_of(model, ["harmful", "benign"], answers)
    assert len(categories) == 8
    harmful = answers["harmful"].prompts
    one, rest = transfer.of_category(harmful, first), transfer.of_others(harmful, first)
    assert {request.category for request in one} == {first}
    assert len(one) + len(rest) == len(harmful)

    scored = transfer.scored_on(model, "harmful", one, answers)
    assert scored["harmful"].prompts == one
    assert sum(len(batch) for batch in scored["harmful"].batches) == len(one)
    assert scored["benign"] is answers["benign"]


def test_fewer_than_two_categories_are_refused_with_what_to_do(model, answers):
    first = answers["harmful"].prompts.examples[0].category
    one = transfer.of_category(answers["harmful"].prompts, first)
    few = {**answers, "harmful": replace(answers["harmful"], prompts=one)}
    with pytest.raises(ValueError, match=rf"\['{first}'\].*two or more.*by category"):
        transfer.categories_of(model, ["harmful", "benign"], few)


def test_rows_name_what_was_scored_and_tested_and_shared(model, answers, blunt):
    first, second, *_ = transfer.categories_of(model, ["harmful"], answers)
    masks = {first: blunt, second: random_like(blunt, seed=1)}
    rows = transfer.transfer_rows(model, masks, ["harmful"], {"mask": "circuit"})
    own = rows.one("harm_valid_rate", scored=first, tested=first)
    assert (
        own
        == transfer.rate_rows(
            model, ["harmful"], {"mask": "circuit", "scored": first}, mask=blunt, category=first
        ).one()
    )
    others = rows.one("harm_valid_rate", relation="other types")
    assert others.n == len(model.behaviours["harmful"].prompts("heldout"))

    shared = transfer.shared_rows(model, list(masks.values()), ["harmful"], {})
    union, both = (shared.one("weights_removed", shared_by=k).mean for k in (1, 2))
    assert union + both == 2 * blunt.n_removed
    assert both < blunt.n_removed
