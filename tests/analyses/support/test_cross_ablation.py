"""Circuits side by side on a few requests of a shipped organism, and the behaviours they are for.

Would catch: circuits of unequal size, protection that is ignored, resamples that differ between
behaviours, rows that contradict the masks, a twin about other things.
"""

from functools import partial

import pytest
import torch
from helpers import small_model
from support.cross_ablation import (
    content_rows,
    overlap_rows,
    resampled_circuits,
    token_rows,
)

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.studies.summary import Terms

pytestmark = pytest.mark.slow
SIZE = 0.01
NAMES = ("harmful", "benign", "recognition_margin")

find = partial(Model.find_circuit, steps=[SIZE / 2, SIZE], renew=False)


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture(scope="module")
def calibrations(model):
    return model.calibrations(NAMES)


@pytest.fixture(scope="module")
def circuits(model, calibrations) -> dict[str, WeightMask]:
    """Unprotected, in two steps."""
    masks = {}
    for name in NAMES:
        masks[name] = find(model, name, size=SIZE, protect=(), calibrations=calibrations)
    return masks


@pytest.fixture(scope="module")
def harm_scores(model, calibrations) -> WeightScores:
    return removal_effect(model.bridge, calibrations["harmful"].batches, completion_loss)


def top(scores: WeightScores) -> WeightMask:
    return top_fraction(scores, SIZE, within="model")


def same_weights(first: WeightMask, second: WeightMask) -> bool:
    return len(first - second) == len(second - first) == 0


# Behaviours


# Circuits


def test_resampled_scores_are_those_of_all_examples(model, calibrations, harm_scores):
    options = {"size": SIZE, "n_resamples": 2, "seed": 0}
    scores, masks = resampled_circuits(model, calibrations, ["harmful"], **options)["harmful"]
    for name, value in harm_scores.values.items():
        torch.testing.assert_close(scores.values[name], value, rtol=1e-3, atol=1e-8)
    n_weights = sum(value.numel() for value in harm_scores.values.values())
    assert [len(mask) for mask in masks] == [round(SIZE * n_weights)] * 2

    again = resampled_circuits(model, calibrations, ["harmful"], **options)["harmful"][1]
    assert all(same_weights(*pair) for pair in zip(masks, again, strict=True))
    assert not same_weights(*masks), "resamples differ"


# Rows


def test_overlap_rows_agree_with_the_masks(model, calibrations, circuits):
    resampled = resampled_circuits(model, calibrations, NAMES, size=SIZE, n_resamples=4, seed=0)
    rows = overlap_rows(resampled, circuits, {"model": "x"}, size=SIZE, n_samples=5)
    pair = {"first": "harmful", "second": "benign"}
    lift = rows.one("overlap_lift", **pair, selection="search")
    expected = overlap(circuits["harmful"], circuits["benign"])
    assert lift.mean == pytest.approx(expected.lift)

    harm, benign = (top(resampled[name][0]) for name in ("harmful", "benign"))
    jaccard = rows.one("overlap_jaccard", **pair, selection="one shot")
    assert jaccard.mean == pytest.approx(overlap(harm, benign).jaccard)
    few = overlap_rows(
        resampled, circuits, {}, size=SIZE, n_samples=5, pairs=[("harmful", "benign")]
    )
    assert few.one("rank_correlation").labels == pair

    ceiling = rows.one("overlap_jaccard", first="harmful", second="harmful")
    assert ceiling.low > jaccard.mean, "a circuit is nearer to itself on other data than to another"
    assert all(row.low <= row.mean <= row.high for row in rows)


def lifts(masks: dict[str, WeightMask], terms: Terms | None = None) -> dict[str, float]:
    rows = content_rows(masks, {}, terms=terms)
    return {row.labels["relation"]: row.mean for row in rows.where("content_lift")}


def test_content_rows_average_the_right_pairs(harm_scores):
    """Masks made so that all four are the same.

    Then harm's are, and benign ones are the opposite.
    """
    same = top(harm_scores)
    lift = overlap(same, same).lift
    masks = {f"{use}/{topic}": same for use in ("harmful", "benign") for topic in ("a", "b")}
    relations = (
        "twin",
        "harm, other topic",
        "benign, other topic",
        "harm and benign, other topic",
    )
    assert lifts(masks) == pytest.approx(dict.fromkeys(relations, lift))

    opposite = top(-harm_scores)
    assert overlap(opposite, opposite).lift > 1
    masks["benign/a"] = masks["benign/b"] = opposite
    expected = (0, lift, overlap(opposite, opposite).lift, 0)
    assert lifts(masks) == pytest.approx(dict(zip(relations, expected, strict=True)))


def test_tokens_and_places_add_up(model, calibrations, circuits, harm_scores):
    mask = circuits["harmful"]
    rows = token_rows(model, "harmful", calibrations["harmful"], mask, {})
    total = sum(row.mean for row in rows)
    assert total == pytest.approx(harm_scores.sum_over(mask), rel=1e-4)

    located = location_rows(mask, weight_sites(model.bridge), {})
    of_matrices = located.where("weights_removed", by="matrix")
    assert sum(row.mean for row in of_matrices) == len(mask)
    by_chance = located.where("gini", chance="yes")
    assert {row.n for row in by_chance} == {20}
