"""The test of double dissociation on hand-made rates.

Would catch: rates of different abilities compared with each other, an outcome from points instead
of intervals, a cost that is read under the wrong mask.
"""

import pytest
from support.dissociation import (
    dissociation,
    dissociations,
)

from harmcircuits.measurements import Measurement, Rows

HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"
METRICS = {"harmful": HARM, "benign": BENIGN}


def rate(metric: str, n_hits: int, labels: dict | None = None, n: int = 64) -> Measurement:
    hits = [number < n_hits for number in range(n)]
    return Measurement.rate(metric, labels or {}, hits, range(n))


def rates(metric: str, *hits: int) -> list[Measurement]:
    """Of 64: unpruned, under the own circuit, under the other's."""
    return [rate(metric, n_hits) for n_hits in hits]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ((64, 0, 64), (64, 0, 64), "clean double"),
        ((64, 0, 50), (64, 10, 64), "graded double"),
        ((64, 0, 64), (64, 30, 30), "single"),
        ((64, 60, 64), (64, 62, 64), "none"),
        ((64, 0, 0), (64, 0, 0), "none"),
        ((40, 0, 40), (64, 20, 64), "graded double"),
    ],
)
def test_outcomes(first, second, outcome):
    """The last: nothing is lost, but 40 of 64 is too uncertain to be called spared."""
    assert dissociation(rates("a", *first), rates("b", *second)).outcome == outcome


def test_gaps_and_costs_compare_one_ability_with_itself():
    test = dissociation(rates("a", 64, 16, 48), rates("b", 60, 30, 50))
    gaps = (test.first_gap.mean, test.second_gap.mean)
    assert gaps == pytest.approx(((48 - 16) / 64, (50 - 30) / 64))
    costs = (test.first_cost.mean, test.second_cost.mean)
    assert costs == pytest.approx(((64 - 48) / 64, (60 - 50) / 64))
    assert test.first_gap.metric == "a_gap"
    rows = test.rows({"model": "m"})
    assert rows.metrics == ["first_gap", "second_gap", "first_cost", "second_cost"]
    second_cost = rows.one("second_cost", model="m")
    assert (second_cost.mean, second_cost.high) == (test.second_cost.mean, test.second_cost.high)


def ablated(protected: str, **masks: tuple[int, int]) -> Rows:
    """mask -> hits of 64 in harm and in benign answers."""
    rows = Rows()
    for mask, (harm, benign) in masks.items():
        where = {"mask": mask, "protected": protected}
        rows += [rate(HARM, harm, where), rate(BENIGN, benign, where)]
    return rows


def test_each_ability_is_compared_under_its_own_circuit_and_the_other_s():
    rows = ablated("none", none=(64, 64), harmful=(0, 64), benign=(60, 2))
    rows += ablated("others", harmful=(0, 20), benign=(0, 20))
    tests = dissociations(rows, "none", METRICS)
    assert list(tests) == [("harmful", "benign")]
    free = tests["harmful", "benign"]
    gaps = (free.first_gap.mean, free.second_gap.mean)
    assert gaps == pytest.approx((60 / 64, 62 / 64))
    assert (free.first_cost.mean, free.second_cost.mean) == pytest.approx((4 / 64, 0))

    spared = dissociations(rows, "others", METRICS)["harmful", "benign"]
    assert spared.outcome == "none", "the unpruned rates are shared, the masked ones are not"
