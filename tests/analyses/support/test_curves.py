"""Curves by hand: `w50`, its censoring, the budget, and comparisons paired by items.

Would catch: a size that breaks kept abilities counted as `w50`, an unreached size taken for a
reached one, curves that are resampled apart.
"""

import math

import pytest
import torch
from support.curves import Budget, Curve, curve, gap, outcomes_of, rate_at, share_text, w50

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import random_like, top_fraction
from harmcircuits.measurements import Rows
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.search.attribution import magnitude_scores

N_ITEMS = 20
SHARES = (0.0, 0.001, 0.01, 0.1)


def outcomes(name: str, n_hits: int, nll: float = 0.3) -> Outcomes:
    """The first `n_hits` items, each asked about once, show the behaviour."""
    requests = PromptSet(tuple(Example(f"{name} {i}", group=f"{i:02}") for i in range(N_ITEMS)))
    behaviour = Behaviour(name, lambda split: requests, wanted="yes")
    verdicts = tuple("yes" if number < n_hits else "no" for number in range(N_ITEMS))
    return Outcomes(behaviour, requests, verdicts, torch.full((N_ITEMS,), nll))


def by_hand(shares, harm, benign=None, nll=None) -> Curve:
    benign = benign or [N_ITEMS] * len(shares)
    nll = nll or [0.3] * len(shares)
    points = []
    for n_harm, n_benign, loss in zip(harm, benign, nll, strict=True):
        harmful, good = outcomes("harmful", n_harm), outcomes("benign", n_benign, loss)
        points.append({"harmful": harmful, "benign": good})
    return Curve(tuple(shares), tuple(points))


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
    assert (estimate.values[0], estimate.is_reached[0], estimate.reach_rate) == (0.1, False, 0.0)
    row, reach_rate = estimate.rows("w50", {"model": "m"})
    assert (row.mean, row.labels["censored"], reach_rate.mean) == (0.1, "yes", 0.0)
    assert share_text(Rows([row])) == "over 10.00%"

    costly = by_hand(SHARES, [20, 0, 0, 0], benign=[20, 0, 0, 0])
    assert not w50(costly).is_reached.any()
    assert w50(costly, Budget(rate=1.0)).is_reached.all()


def test_intervals_are_those_of_the_binomial():
    """At half of 20 independent items, a resample has at most half with probability 0.588."""
    estimate = w50(by_hand((0.0, 0.01), [20, 10]))
    exact = sum(math.comb(20, k) for k in range(11)) / 2**20
    assert estimate.reach_rate == pytest.approx(exact, abs=0.04)
    # The rate of 10 of 20 items has the percentile interval 0.3 to 0.7.
    row = rate_at(by_hand(SHARES, [20, 10, 8, 0]), 0.001).row("rate", {})
    assert (row.low, row.high) == pytest.approx((0.3, 0.7), abs=0.051)


def test_comparisons_are_paired_by_items():
    first, second = by_hand(SHARES, [20, 12, 8, 0]), by_hand(SHARES, [20, 20, 12, 6])
    ratio = w50(first).over(w50(first)).row("r", {})
    assert (ratio.mean, ratio.low, ratio.high) == (1, 1, 1)
    assert w50(first).over(w50(second)).values[0] == pytest.approx(0.1)
    high, low = rate_at(second, 0.01), rate_at(first, 0.01)
    assert high.minus(low).row("gap", {}).mean == pytest.approx(0.2)
    assert (high.values >= low.values).all(), "the same items on every draw"


def test_a_gap_is_what_another_mask_leaves_beyond_the_curve(sft):
    magnitudes = magnitude_scores(sft.bridge)
    large = top_fraction(magnitudes, 0.3, within="model")
    small = random_like(top_fraction(magnitudes, 0.001, within="model"))
    path = curve(sft, [large], outcomes_of(sft, ["harmful"]), shares=(0.3,))
    under = sft.measure(mask=small, only="harmful").one("harm_valid_rate").mean
    hits = path.at(0.3)["harmful"].hits
    rate = sum(hits) / len(hits)
    assert gap(sft, small, path, 0.3).row("gap", {}).mean == pytest.approx(under - rate)
