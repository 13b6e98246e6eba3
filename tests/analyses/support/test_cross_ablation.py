"""Rows that compare circuits, against the masks themselves.

Would catch: circuits of unequal size, resamples that differ between behaviours, rows that contradict
the masks, a twin about other things.
"""

import numpy as np
import pytest
import torch
from support.cross_ablation import _topic_mean, content_rows, overlap_rows, resampled_circuits

import harmcircuits as hc
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.search.attribution import removal_effect

pytestmark = pytest.mark.slow
SIZE = 0.01


@pytest.fixture(scope="module")
def calibrations(sft):
    return sft.calibrations(["harmful", "benign"])


@pytest.fixture(scope="module")
def harm_scores(sft, calibrations) -> WeightScores:
    return removal_effect(sft.bridge, calibrations["harmful"].batches)


def top(scores: WeightScores) -> WeightMask:
    return top_fraction(scores, SIZE, within="model")


def test_rows_of_resamples_agree_with_the_masks(sft, calibrations, harm_scores):
    options = {"size": SIZE, "n_resamples": 4, "seed": 0}
    resampled = resampled_circuits(sft, calibrations, ["harmful", "benign"], **options)
    scores, masks = resampled["harmful"]
    for name, value in harm_scores.values.items():
        torch.testing.assert_close(scores.values[name], value, rtol=1e-3, atol=1e-8)
    assert {len(mask) for mask in masks} == {len(top(harm_scores))}
    assert len(masks[0] - masks[1]), "resamples differ"

    circuits = {name: top(scores) for name, (scores, _) in resampled.items()}
    rows = overlap_rows(resampled, circuits, size=SIZE, n_samples=5)
    pair = {"first": "harmful", "second": "benign", "selection": "one shot"}
    jaccard = rows.one("overlap_jaccard", **pair)
    assert jaccard.mean == pytest.approx(overlap(*circuits.values()).jaccard)
    ceiling = rows.one("overlap_jaccard", first="harmful", second="harmful")
    assert ceiling.low > jaccard.mean, "a circuit is nearer to itself on other data than to another"


def test_content_rows_average_the_right_pairs(harm_scores):
    """The circuits of harm are all one, and those of benign answers the opposite."""
    positive, negative = top(harm_scores), top(-harm_scores)
    masks = {"harmful/a": positive, "harmful/b": positive}
    masks |= {"benign/a": negative, "benign/b": negative}
    rows = content_rows(masks)
    lifts = {row.labels["relation"]: row.mean for row in rows.where("content_lift")}
    assert lifts == pytest.approx(
        {
            "twin": 0,
            "harm, other topic": overlap(positive, positive).lift,
            "benign, other topic": overlap(negative, negative).lift,
            "harm and benign, other topic": 0,
        }
    )


def test_b15_a_topic_that_is_drawn_twice_has_two_twins():
    """The interval of twins is the ordinary bootstrap of their mean."""
    values = np.random.default_rng(0).normal(size=12)
    table, is_twin = np.diag(values), np.eye(12, dtype=bool)
    draws = np.random.default_rng(1).integers(12, size=(500, 12))
    row = _topic_mean("x", {}, table, is_twin, draws)
    means = values[draws].mean(axis=1)
    expected = hc.Measurement.of_draws("x", {}, means, mean=values.mean(), n_groups=12)
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
