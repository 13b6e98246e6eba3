"""Curves by hand: `w50`, its censoring, the budget, and comparisons paired by items.

Would catch: a size that breaks kept abilities counted as `w50`, an unreached size taken for a
reached one, curves that are resampled apart, protection of
a part of the target.
"""

import math

import numpy as np
import pytest
import torch
from helpers import small_model
from support.curves import (
    Budget,
    Curve,
    curve,
    gap,
    outcomes_of,
    rate_at,
    share_text,
    w50,
)

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import random_like, top_fraction
from harmcircuits.hooks.attribution import magnitude_scores
from harmcircuits.measurements import Rows
from harmcircuits.prompts import Example, PromptSet

N_ITEMS = 20
SHARES = (0.0, 0.001, 0.01, 0.1)


def made(name: str, n_hits: int, nll: float = 0.3, n: int = N_ITEMS) -> Outcomes:
    """The first `n_hits` of `n` items, each asked about once, show the behaviour."""
    requests = PromptSet(tuple(Example(f"{name} {i}", group=f"{i:02}") for i in range(n)))
    behaviour = Behaviour(name, lambda split: requests, wanted="yes")
    verdicts = tuple("yes" if number < n_hits else "no" for number in range(n))
    return Outcomes(behaviour, requests, verdicts, torch.full((n,), nll))


def by_hand(shares, harm, benign=None, nll=None) -> Curve:
    benign = benign or [N_ITEMS] * len(shares)
    nll = nll or [0.3] * len(shares)
    points = []
    for n_harm, n_benign, loss in zip(harm, benign, nll, strict=True):
        outcomes = {"harmful": made("harmful", n_harm), "benign": made("benign", n_benign, loss)}
        points.append(outcomes)
    return Curve(tuple(shares), tuple(points))


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


# w50


@pytest.mark.parametrize(
    ("harm", "benign", "nll", "expected"),
    [
        ([20, 20, 10, 0], None, None, 0.01),  # exactly half counts
        ([20, 20, 11, 0], None, None, 0.1),
        ([20, 4, 11, 0], None, None, 0.001),  # the smallest, though harm comes back
        ([20, 4, 4, 0], [20, 18, 19, 20], None, 0.01),  # 10 points are too many, 5 are not
        ([20, 4, 4, 0], None, [0.3, 0.41, 0.39, 0.3], 0.01),
        ([10, 6, 5, 0], None, None, 0.01),  # half of the unpruned model's own rate
    ],
)
def test_w50_is_the_first_measured_share_within_the_budget(harm, benign, nll, expected):
    estimate = w50(by_hand(SHARES, harm, benign, nll))
    assert (estimate.values[0], estimate.is_reached[0]) == (expected, True)


def test_an_unreached_w50_is_the_largest_share_and_says_so():
    estimate = w50(by_hand(SHARES, [20, 20, 20, 20]))
    assert (estimate.values[0], estimate.is_reached[0], estimate.reached) == (0.1, False, 0.0)
    row, reached = estimate.rows("w50", {"model": "m"})
    assert (row.mean, row.low, row.high, row.labels["censored"]) == (0.1, 0.1, 0.1, "yes")
    assert (reached.metric, reached.mean) == ("w50_reached", 0.0)
    assert share_text(Rows([row])) == "over 10.00%"

    broken = by_hand(SHARES, [20, 0, 0, 0], benign=[20, 0, 0, 0])
    assert not w50(broken).is_reached.any()
    assert w50(broken, Budget(rate=1.0)).is_reached.all()


def test_a_borderline_w50_is_reached_on_some_resamples_only():
    """At half of 20 independent items, a resample has at most half with probability 0.588.

    By the binomial.
    """
    estimate = w50(by_hand((0.0, 0.01), [20, 10]))
    exact = sum(math.comb(20, k) for k in range(11)) / 2**20
    assert estimate.reached == pytest.approx(exact, abs=0.04)


# Other figures of a curve


def test_comparisons_are_paired_by_items():
    first, second = by_hand(SHARES, [20, 12, 8, 0]), by_hand(SHARES, [20, 20, 12, 6])
    ratio = w50(first).over(w50(first)).row("r", {})
    assert (ratio.mean, ratio.low, ratio.high) == (1, 1, 1)
    assert w50(first).over(w50(second)).values[0] == pytest.approx(0.1)

    rates = rate_at(second, 0.01), rate_at(first, 0.01)
    gap = rates[0].minus(rates[1]).row("gap", {})
    assert gap.mean == pytest.approx(0.2)
    spread_apart = np.std(rates[0].values[1:]) + np.std(rates[1].values[1:])
    assert gap.high - gap.low < 2 * 1.96 * spread_apart
    assert (rates[0].values >= rates[1].values).all(), "the same items on every draw"


def test_an_interval_covers_as_often_as_it_says():
    """The rate of 10 of 20 items has the binomial's percentile interval, 0.3 to 0.7."""
    row = rate_at(by_hand(SHARES, [20, 10, 8, 0]), 0.001).row("rate", {})
    assert (row.low, row.high) == pytest.approx((0.3, 0.7), abs=0.051)


# Of a model


def test_a_gap_is_what_another_mask_leaves_beyond_the_curve(model):
    large = top_fraction(magnitude_scores(model.bridge), 0.3, within="model")
    small = random_like(top_fraction(magnitude_scores(model.bridge), 0.001, within="model"))
    path = curve(model, [large], outcomes_of(model, ["harmful"]), shares=(0.3,))
    under = model.measure(mask=small, only="harmful").one("harm_valid_rate").mean
    left = path.at(0.3)["harmful"].hits
    assert gap(model, small, path, 0.3).row("gap", {}).mean == pytest.approx(
        under - sum(left) / len(left)
    )
    same = gap(model, large, path, 0.3).row("gap", {})
    half_step = 1 / (2 * same.n)
    assert (same.mean, same.low, same.high) == (0, -half_step, half_step), "paired by items"
