"""The test of double dissociation on hand-made rates, and Newcombe's interval against the published example.

Would catch: rates of different abilities compared with each other, a verdict from points instead of intervals, a cost that
is read under the wrong mask.
"""

import pytest

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.dissociation import dissociation, dissociations


def rates(metric: str, *hits: int, n: int = 64):
    """Rates of these numbers of hits of n: unpruned, under the own circuit, under the other's."""
    return [
        Measurement.rate(metric, {}, [i < hit for i in range(n)], list(range(n))) for hit in hits
    ]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((64, 0, 64), (64, 0, 64), "clean double"),
        ((64, 0, 50), (64, 10, 64), "graded double"),
        ((64, 0, 64), (64, 30, 30), "single"),
        ((64, 60, 64), (64, 62, 64), "none"),
        ((64, 0, 0), (64, 0, 0), "none"),
        ((40, 0, 40), (64, 20, 64), "graded double"),
    ],
)
def test_verdicts(first, second, verdict):
    """The last: nothing is lost, but 40 of 64 is too uncertain to be called spared."""
    assert dissociation(rates("a", *first), rates("b", *second)).verdict == verdict


def test_gaps_and_costs_compare_one_ability_with_itself():
    found = dissociation(rates("a", 64, 16, 48), rates("b", 60, 30, 50))
    assert (found.first_gap.mean, found.second_gap.mean) == pytest.approx(
        ((48 - 16) / 64, (50 - 30) / 64)
    )
    assert (found.first_cost.mean, found.second_cost.mean) == pytest.approx(
        ((64 - 48) / 64, (60 - 50) / 64)
    )
    assert found.first_gap.metric == "a_gap"


def test_newcombe_s_own_example():
    """56/70 - 48/80 by method 10: 0.0524 to 0.3339 (Newcombe 1998, table II)."""
    first, second = rates("x", 56, n=70)[0], rates("x", 48, n=80)[0]
    found = Measurement.difference("d", {}, first, second)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="three rates of one metric"):
        dissociation(rates("a", 1, 2), rates("b", 1, 2, 3))
    with pytest.raises(ValueError, match="three rates of one metric"):
        dissociation([*rates("a", 1, 2), *rates("c", 3)], rates("b", 1, 2, 3))


def ablated(protected: str, **hits: dict[str, int]) -> Rows:
    """mask -> metric -> hits of 64."""
    return [
        Measurement.rate(
            metric, {"mask": mask, "protected": protected}, [i < n for i in range(64)], range(64)
        )
        for mask, found in hits.items()
        for metric, n in found.items()
    ]


def test_each_ability_is_compared_under_its_own_circuit_and_the_other_s():
    harm, benign = "harm_valid_rate", "benign_valid_rate"
    rows = ablated(
        "none",
        none={harm: 64, benign: 64},
        harmful={harm: 0, benign: 64},
        benign={harm: 60, benign: 2},
    )
    rows += ablated("others", harmful={harm: 0, benign: 20}, benign={harm: 0, benign: 20})
    (pair, free), *others = dissociations(rows, "none").items()
    assert (pair, others) == (("harmful", "benign"), [])
    assert (free.first_gap.mean, free.second_gap.mean) == pytest.approx((60 / 64, 62 / 64))
    assert (free.first_cost.mean, free.second_cost.mean) == pytest.approx((4 / 64, 0))
    held = dissociations(rows, "others")["harmful", "benign"]
    assert held.verdict == "none", "the unpruned rates are shared, the masked ones are not"
