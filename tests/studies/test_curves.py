"""Curves by hand: `w50`, its censoring, the budget, the area, and comparisons paired by items.

Would catch: a size that breaks kept abilities counted as `w50`, an unreached size taken for a reached one, curves that are
resampled apart, an area that is not over the logarithm, protection of a part of the target.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import small_model

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import random_like, top_fraction
from harmcircuits.hooks.attribution import magnitude_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import named_weights
from harmcircuits.organisms import detailed_behaviours
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.studies.curves import (
    Budget,
    Curve,
    area,
    curve,
    log_spaced,
    outcomes_of,
    rate_at,
    restricted,
    share_text,
    w50,
)

N_ITEMS = 20


def made(name: str, n_hits: int, nll: float = 0.3, n: int = N_ITEMS) -> Outcomes:
    """The first `n_hits` of `n` items, each asked about once, show the behaviour."""
    asked = PromptSet(tuple(Example(f"{name} {i}", group=f"{i:02}") for i in range(n)))
    behaviour = Behaviour(name, f"{name}_rate", f"{name}_nll", "yes", lambda split: asked)
    return Outcomes(
        behaviour,
        asked,
        tuple("yes" if i < n_hits else "no" for i in range(n)),
        torch.full((n,), nll),
    )


def by_hand(shares, harm, benign=None, nll=None) -> Curve:
    benign, nll = benign or [N_ITEMS] * len(shares), nll or [0.3] * len(shares)
    points = [
        {"harmful": made("harmful", h), "benign": made("benign", b, loss)}
        for h, b, loss in zip(harm, benign, nll, strict=True)
    ]
    return Curve(tuple(shares), tuple(points))


SHARES = (0.0, 0.001, 0.01, 0.1)


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
    found = w50(by_hand(SHARES, harm, benign, nll))
    assert (found.values[0], found.is_reached[0]) == (expected, True)


def test_an_unreached_w50_is_the_largest_share_and_says_so():
    found = w50(by_hand(SHARES, [20, 20, 20, 20]))
    assert (found.values[0], found.is_reached[0], found.reached) == (0.1, False, 0.0)
    row, reached = found.rows("w50", {"model": "m"})
    assert (row.mean, row.low, row.high, row.labels["censored"]) == (0.1, 0.1, 0.1, "yes")
    assert (reached.metric, reached.mean) == ("w50_reached", 0.0)
    assert share_text([row]).startswith("over 10.00%")
    broken = by_hand(SHARES, [20, 0, 0, 0], benign=[20, 0, 0, 0])
    assert not w50(broken).is_reached.any()
    assert w50(broken, Budget(rate=1.0)).is_reached.all()


def test_a_borderline_w50_is_reached_on_some_resamples_only():
    """At half of 20 independent items, a resample has at most half with probability 0.588 (binomial)."""
    found = w50(by_hand((0.0, 0.01), [20, 10]))
    exact = sum(math.comb(20, k) for k in range(11)) / 2**20
    assert found.reached == pytest.approx(exact, abs=0.04)


def test_the_area_is_a_mean_over_the_logarithm():
    assert area(by_hand(SHARES, [20, 20, 20, 20])).values[0] == pytest.approx(1)
    assert area(by_hand(SHARES, [20, 0, 0, 0])).values[0] == 0
    assert area(by_hand(SHARES, [20, 20, 10, 0])).values[0] == pytest.approx((0.75 + 0.25) / 2)
    uneven = by_hand((0.0, 0.001, 0.01, 0.1, 0.2), [20, 20, 0, 0, 0])
    assert area(uneven).values[0] == pytest.approx(0.5 / (2 + math.log10(2)))


def test_comparisons_are_paired_by_items():
    first, second = by_hand(SHARES, [20, 12, 8, 0]), by_hand(SHARES, [20, 20, 12, 6])
    ratio, change = (
        w50(first).over(w50(first)).row("r", {}),
        area(first).minus(area(first)).row("d", {}),
    )
    assert (ratio.mean, ratio.low, ratio.high) == (1, 1, 1)
    assert (change.mean, change.low, change.high) == (0, 0, 0)
    assert w50(first).over(w50(second)).values[0] == pytest.approx(0.1)
    gap = rate_at(second, 0.01).minus(rate_at(first, 0.01)).row("gap", {})
    assert gap.mean == pytest.approx(0.2)
    spread_apart = np.std(rate_at(second, 0.01).values[1:]) + np.std(
        rate_at(first, 0.01).values[1:]
    )
    assert gap.high - gap.low < 2 * 1.96 * spread_apart
    assert (
        rate_at(second, 0.01).values >= rate_at(first, 0.01).values
    ).all()  # the same items on every draw


def test_an_interval_covers_as_often_as_it_says():
    """The rate of 10 of 20 items has the binomial's percentile interval, 0.3 to 0.7."""
    row = rate_at(by_hand(SHARES, [20, 10, 8, 0]), 0.001).row("rate", {})
    assert (row.low, row.high) == pytest.approx((0.3, 0.7), abs=0.051)


def test_sizes_on_a_logarithmic_scale():
    assert log_spaced(16, 5) == (1, 2, 4, 8, 16)
    assert log_spaced(3, 9) == (1, 2, 3)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="increasing strictly"):
        by_hand((0.01, 0.1), [20, 10])
    with pytest.raises(ValueError, match="must measure 'harmful'"):
        Curve((0.0,), ({"benign": made("benign", 3)},))
    with pytest.raises(ValueError, match="same requests"):
        Curve((0.0, 0.1), ({"harmful": made("harmful", 3)}, {"harmful": made("harmful", 3, n=5)}))
    with pytest.raises(ValueError, match="at least two masks"):
        area(by_hand((0.0, 0.1), [20, 0]))
    with pytest.raises(ValueError, match=r"share=0\.5"):
        rate_at(by_hand(SHARES, [20, 0, 0, 0]), 0.5)
    longer = by_hand((*SHARES, 0.2), [20, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="cannot be paired"):
        w50(by_hand(SHARES, [20, 0, 0, 0])).over(w50(longer))


def test_a_curve_measures_what_masks_do():
    model = small_model("sft")
    bridge = model.bridge
    large = top_fraction(magnitude_scores(bridge), 0.3, within="model")
    small = random_like(top_fraction(magnitude_scores(bridge), 0.001, within="model"))
    unpruned = outcomes_of(model, ["harmful", "benign"])
    found = curve(model, [large, small], unpruned)
    assert found.shares == (0.0, *(mask.n_removed / mask.n_weights for mask in (small, large)))
    with masked(bridge, large):
        expected = model.measure(only=["harmful", "benign"])
    rows = {(row.metric, row.labels["share"]): row.mean for row in found.rows({})}
    assert {row.metric: rows[row.metric, found.shares[2]] for row in expected} == {
        r.metric: r.mean for r in expected
    }
    assert w50(found, Budget(rate=1.0, nll=100.0)).values[0] == found.shares[2]
    assert not w50(found).is_reached[0]  # the language is gone too
    assert set(named_weights(bridge)) == set(large.shapes)


def test_outcomes_are_per_request():
    model = small_model("sft")
    found = model.outcomes("harmful", "heldout")
    prompts = model.behaviours["harmful"].prompts("heldout")
    assert [e.prompt for e in found.answers] == [e.prompt for e in prompts]
    assert found.groups == [e.group for e in prompts]
    rate, *_, nll = found.rows({"split": "heldout"})
    assert rate.mean == sum(found.hits) / len(prompts)
    assert (nll.metric, nll.mean) == ("harm_nll", pytest.approx(float(found.nll.mean()), abs=1e-6))


def test_parts_of_behaviours_are_not_protected():
    detailed = dataclasses.replace(small_model("sft"), behaviours=detailed_behaviours())
    names = set(restricted(detailed).behaviours)
    assert names == {"harmful", "benign", "recognition", "explanation", "knowledge", "refusal"}


def test_requests_without_a_reference_count_in_rates_only():
    nll = torch.full((N_ITEMS,), torch.nan)
    nll[:5], dear = 0.3, torch.full((N_ITEMS,), torch.nan)
    dear[:5] = 0.41
    points = [
        {"harmful": made("harmful", h), "benign": made("benign", N_ITEMS)} for h in (20, 4, 2)
    ]
    for one, losses in zip(points, (nll, dear, nll), strict=True):
        one["benign"] = dataclasses.replace(one["benign"], nll=losses, judge="a judge")
    found = w50(Curve((0.0, 0.01, 0.1), tuple(points)))
    assert (found.values[0], found.is_reached[0]) == (0.1, True), (
        "the five losses are over the budget at the first share"
    )
    assert found.reached > 0.95, "a resample without any of the five items reaches nothing"
    rates, losses = points[1]["benign"].rows({})
    assert (rates.n, rates.labels["judge"]) == (N_ITEMS, "a judge")
    assert (losses.metric, losses.n, losses.mean) == ("benign_nll", 5, pytest.approx(0.41))
    unknown = [
        {**one, "benign": dataclasses.replace(one["benign"], nll=torch.full_like(nll, torch.nan))}
        for one in points
    ]
    assert w50(Curve((0.0, 0.01, 0.1), tuple(unknown))).values[0] == 0.01, (
        "a loss that is not measured is not in the budget"
    )
    assert [row.metric for row in unknown[0]["benign"].rows({})] == ["benign_rate"]


def test_outcomes_keep_the_order_of_requests():
    model = small_model("sft")
    every = model.outcomes("benign", "choice").nll
    kept = [number % 3 > 0 for number in range(len(every))]
    asked = model.behaviours["benign"].prompts("choice")
    some = asked.with_completions(
        [one.completion * keep for one, keep in zip(asked, kept, strict=True)]
    )
    behaviour = dataclasses.replace(model.behaviours["benign"], prompts=lambda split: some)
    model = dataclasses.replace(model, behaviours={"benign": behaviour}, judge_name="a judge")
    found = model.outcomes("benign", "choice")
    assert (~found.nll.isnan()).tolist() == kept
    assert found.nll[torch.tensor(kept)] == pytest.approx(every[torch.tensor(kept)], abs=1e-5)
    assert len(found.verdicts) == len(asked)
    assert found.judge == "a judge"
