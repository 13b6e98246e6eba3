"""F1 judges made-up rows by its rule.

Would catch: a circuit called compact that is larger than 1 % of the weights, that halves harm on too
few resamples or not at all, or that a control equals; a line of the one-shot mask that is judged in
place of the search's.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

compact = analysis("compact")
HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold here"


def a_seed(seed=0, *, high=0.004, reached=1.0, censored="no", gaps=(0.2, 0.3)):
    """The upper end of `w50`, its certainty, and the lower ends of the gaps to controls."""
    where = {"mask": "search", "split": "heldout"}
    rows = [
        Measurement("w50", {**where, "censored": censored}, 0.002, 0.001, high, 32),
        Measurement.exact("w50_reached", where, reached),
    ]
    one_shot = {**where, "mask": "one shot"}
    rows.append(Measurement("w50", {**one_shot, "censored": "yes"}, 0.02, 0.02, 0.02, 32))
    rows.append(Measurement.exact("w50_reached", one_shot, 0.0))
    for name, low in zip(("random", "opposite sign"), gaps, strict=True):
        rows.append(Measurement("gap", {"mask": name}, low + 0.1, low, low + 0.2, 32))
    rows.append(Measurement("kept_fall", {"behaviour": "benign"}, 0.03, 0.0, 0.06, 32))
    rows.append(Measurement.exact("harm_degenerate_rate", {"at": "w50"}, 0.25))
    return Rows(row.labelled(ladder="shipped", model="sft", seed=seed) for row in rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, HOLDS),
        ({"high": 0.01}, HOLDS),
        ({"high": 0.011}, FAILS),
        ({"reached": 0.975}, HOLDS),
        ({"reached": 0.974}, FAILS),
        ({"censored": "yes"}, FAILS),
        ({"gaps": (0.2, 0.01)}, HOLDS),
        ({"gaps": (0.2, 0.0)}, FAILS),
    ],
)
def test_a_seed_by_the_rule(change, expected):
    rows = a_seed(**change)
    assert compact.claim.result(rows).outcome == expected
    both = compact.claim.result(rows + a_seed(1))
    assert both.outcome == (HOLDS if expected == HOLDS else IN_PART)
    assert list(both.cases["seed"]) == [0, 1]


def test_the_key_numbers_name_the_strongest_control():
    numbers = compact.key_numbers(a_seed(gaps=(0.4, 0.1)) + a_seed(1, gaps=(0.4, 0.2)))
    control = numbers["at w50: harm that each control leaves more, at least"]
    assert control.endswith("(opposite sign)")
    assert numbers["w50, by the search"] == "0.20% [0.10%, 0.40%]"
    assert numbers["w50, in one shot"].startswith("over 2.00%")
