"""The rule of putting parts back judges made-up rows, and its key numbers are what it read.

Would catch: a point judged in place of its interval, another share or the random order read for the
best tenth, one seed that decides for all.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

parts = analysis("put_back")
HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold here"


def a_seed(seed=0, *, best=0.6, low=0.5, whole=1.0):
    """What a tenth of the units restores, and its lower end; all of them restore `whole`."""
    rows = []
    for share in (parts.FEW, 1.0):
        restored = best if share == parts.FEW else whole
        lows = {"best first": low if share == parts.FEW else whole, "random": 0.0}
        for order, lowest in lows.items():
            mean = restored if order == "best first" else 0.1
            labels = {"order": order, "share": share}
            rows.append(Measurement("restored", labels, mean, lowest, mean, 32))
    for layer, restored in enumerate((0.2, 0.3)):
        rows.append(Measurement.exact("restored", {"back": "layer", "layer": layer}, restored))
    rows += [Measurement.exact("units", {}, 40), Measurement.exact("best_alone", {}, 0.05)]
    return Rows(row.labelled(ladder="shipped", model="sft", seed=seed) for row in rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, HOLDS),
        ({"low": 0.49}, FAILS),
        ({"best": 0.9, "low": 0.3}, FAILS),  # far above a half, by a wide interval
        ({"best": 0.1, "low": 0.0}, FAILS),
    ],
)
def test_a_seed_by_the_rule(change, expected):
    rows = a_seed(**change)
    assert parts.claim.result(rows).outcome == expected
    both = parts.claim.result(rows + a_seed(1))
    assert both.outcome == (HOLDS if expected == HOLDS else IN_PART)
    assert list(both.cases["outcome"]) == [expected, HOLDS]


def test_the_key_numbers_name_the_best_tenth_and_the_best_layer():
    numbers = parts.key_numbers(a_seed())
    assert numbers["heads and neurons that the circuit touches"] == "40"
    assert numbers["restored by the best tenth"] == "60% [50%, 60%]"
    assert numbers["restored by a tenth drawn at random"] == "10% [0%, 10%]"
    assert numbers["restored by the most useful layer"].startswith("30%")
    assert numbers["restored by the most useful layer"].endswith("(layer 1)")
