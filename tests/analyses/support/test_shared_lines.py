"""The lines of what circuits share, from made-up rows.

Would catch: reference pairs that are not averaged or hold harm, masks of the search taken for those
in one shot, rates of another mask.
"""

import pytest
from support.shared_lines import shared_lines

from harmcircuits.measurements import Measurement, Rows

TASKS = ("benign", "parts", "kind")
LABELS = {"ladder": "shipped", "model": "sft", "seed": 0}


def lift(first: str, second: str, mean: float, selection: str = "one shot") -> Measurement:
    labels = {**LABELS, "first": first, "second": second, "selection": selection}
    return Measurement("overlap_lift", labels, mean, mean - 1, mean + 1, 9)


def rate(metric: str, mean: float, mask: str, **labels: str) -> Measurement:
    hits = [number < round(64 * mean) for number in range(64)]
    return Measurement.rate(metric, {**LABELS, "mask": mask, **labels}, hits, range(64))


@pytest.fixture
def rows() -> Rows:
    lifts = [lift("harmful", "benign", 6.5), lift("harmful", "harmful", 20)]
    lifts += [lift("benign", "parts", 2), lift("benign", "kind", 3), lift("parts", "kind", 7)]
    lifts += [lift("harmful", "benign", 99, "search")]
    unpruned = [rate("harm_valid_rate", 1, "none"), rate("benign_valid_rate", 1, "none")]
    of_harm = {"mask": "harmful", "protected": "others"}
    of_benign = {"mask": "benign", "protected": "others"}
    pruned = [rate("harm_valid_rate", 0, **of_harm), rate("benign_valid_rate", 1, **of_harm)]
    pruned += [rate("harm_valid_rate", 0.5, **of_benign), rate("benign_valid_rate", 0, **of_benign)]
    return Rows([*lifts, *unpruned, *pruned])


def test_the_reference_is_the_mean_of_all_pairs_of_tasks_with_the_widest_ends(rows):
    lines = shared_lines(rows, TASKS, ["others"])
    assert lines["benign, parts, kind among themselves, lift"] == "4.0 [1.0, 8.0]"
    assert lines["harmful and benign, lift"] == "6.5 [5.5, 7.5]", "in one shot"


def test_rates_and_dissociations_are_those_under_the_circuit_of_harm(rows):
    lines = shared_lines(rows, TASKS, ["others"])
    assert lines["sparing others: harm"] == "0%"
    assert lines["sparing others: benign"] == "100%"
    assert lines["sparing others: dissociates from benign"] == "graded double"
