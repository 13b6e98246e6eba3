"""The table of what circuits share, from made-up rows.

Would catch: reference pairs that are not averaged or hold harm, masks of the search taken for those
in one shot, rates of another mask, ladders that are not pooled.
"""

import pytest

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.shared_table import shared_lines, shared_table

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
    assert lines["left without harmful, sparing others"] == "harm 0%, benign 100%"
    assert lines["harmful dissociates, sparing others"] == "benign: graded double"


def test_ladders_are_pooled_and_what_a_model_lacks_is_a_dash(rows):
    other = [row.labelled(ladder="seed1") for row in rows]
    other += [lift("harmful", "benign", 8.5).labelled(ladder="seed1", model="dpo")]
    table = shared_table(Rows([*rows, *other]), TASKS, ["others"]).set_index(" ")
    assert table.loc["harmful and benign, lift", "sft"] == "6.5 [5.5, 7.5]"
    assert table.loc["harmful and benign, lift", "dpo"] == "8.5 [7.5, 9.5]"
    assert table.loc["benign, parts, kind among themselves, lift", "dpo"] == "–"
