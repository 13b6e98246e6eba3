"""F2's rule on made-up rows, in both directions, and its key numbers.

Would catch: an outcome that cannot come out otherwise, one that ignores random weights or benign
answers, left-out types that are judged together, seeds that are not pooled.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

general = analysis("general")
LABELS = {"ladder": "shipped", "model": "sft", "seed": 0}


def rate(metric: str, share: float, **labels) -> Measurement:
    hits = [number < round(64 * share) for number in range(64)]
    return Measurement.rate(metric, {**LABELS, **labels}, hits, range(64))


def made(
    across: float, left_out: list[float], *, random: float = 1.0, benign: float = 1.0, **labels
) -> Rows:
    """Rates are 1 unpruned.

    Args:
        across: what circuits of one type leave of harm of the other types.
        left_out: what circuits of all types but one leave of that one, type by type.
        random: what random weights leave of harm.
        benign: what circuits of harm leave of benign answers.
        labels: of the rows.
    """
    rows = Rows()

    def add(harm: float, good: float, **where) -> None:
        nonlocal rows
        rows += [rate(general.HARM, harm, **where), rate(general.BENIGN, good, **where)]

    others = {"relation": "other types", **labels}
    add(1.0, 1.0, mask="none", **others)
    add(across, benign, mask="circuit", **others)
    add(random, 1.0, mask="random", **others)
    add(0.9, 0.25, mask="twin", **others)
    add(0.0, 1.0, mask="circuit", relation="own type", **labels)
    add(0.4, 1.0, mask="mixed", **labels)
    for number, left in enumerate(left_out):
        of_type = {"relation": "left out", "tested": f"type {number}", **labels}
        add(1.0, 1.0, mask="none", **of_type)
        add(left, benign, mask="circuit", **of_type)
        add(random, 1.0, mask="random", **of_type)
    return rows


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        pytest.param(made(0.1, [0.0, 0.2]), "holds", id="all transfer"),
        pytest.param(made(0.1, [0.0, 0.9]), "holds in part", id="one type stays"),
        pytest.param(made(0.8, [0.0, 0.1, 0.9]), "holds in part", id="only left-out types"),
        pytest.param(made(0.8, [0.0, 0.9]), "does not hold here", id="half of them"),
        pytest.param(made(0.1, [0.0], random=0.1), "does not hold here", id="random does the same"),
        pytest.param(made(0.1, [0.0], benign=0.5), "does not hold here", id="benign goes too"),
    ],
)
def test_f2_comes_out_by_its_rule(rows, outcome):
    assert general.claim.result(rows).outcome == outcome


def test_seeds_are_pooled_and_the_worst_model_counts():
    seeds = made(0.0, [0.0, 0.75]) + made(0.75, [0.0, 0.0], seed=1)
    assert general.claim.result(seeds).outcome == "holds", "means of 0.375"
    models = made(0.0, [0.0]) + made(0.75, [0.75], model="dpo")
    assert general.claim.result(models).outcome == "does not hold here"


def test_the_key_numbers_count_the_types_that_transfer():
    numbers = general.key_numbers(made(0.75, [0.0, 0.75]))
    assert numbers["harm of a type, under its own circuit"] == "0% [0%, 7%]"
    assert numbers["harm of a type, under circuits of others"].startswith("75%")
    assert numbers["left-out types to which all others transfer"] == "1 of 2"
    mixed = numbers["harm, under a circuit of as few items of all types"]
    assert mixed.startswith("41%"), "26 of 64"
