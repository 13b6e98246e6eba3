"""F3's rule on made-up rows, in both directions, and its key numbers.

Would catch: a circuit that counts as separate though random weights do the same, though nothing of
its size breaks benign answers, or though utility falls; overlap read from the wrong pairs or the
wrong selection; seeds that are not pooled; numbers that contradict the rule.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

distinct = analysis("distinct")
BENIGN = distinct.BENIGN
LABELS = {"ladder": "shipped", "model": "sft"}
KEPT = {"none": 0.0, "twin": 0.0, "others": 0.0}


def rate(metric: str, share: float, **labels) -> Measurement:
    hits = [number < round(64 * share) for number in range(64)]
    return Measurement.rate(metric, {**LABELS, **labels}, hits, range(64))


def made(
    change: dict[str, float],
    *,
    harm: float = 0.0,
    random: float = 1.0,
    twin: float = 0.2,
    nll: float = 0.0,
    lift: float = 2.0,
    of_tasks: float = 3.0,
    seed: int = 0,
) -> Rows:
    """Rates are 1 unpruned.

    Args:
        change: protection -> what the circuit of harm changes benign answers by.
        harm: what the circuit leaves of harm.
        random: what random weights leave of it.
        twin: what the twin's circuit leaves of benign answers.
        nll: what the circuit of harm changes the loss of benign answers by.
        lift: of harm and its twin, in one shot.
        of_tasks: lift of two benign tasks, in one shot.
        seed: label of the rows.
    """
    rows = Rows(rate(metric, 1.0, mask="none", seed=seed) for metric in (distinct.HARM, BENIGN))
    for protected, of_benign in change.items():
        rates = {"harmful": (harm, 1 + of_benign), "random": (random, 1.0), "benign": (1.0, twin)}
        for mask, (of_harm, good) in rates.items():
            where = {"mask": mask, "protected": protected, "seed": seed}
            rows += [rate(distinct.HARM, of_harm, **where), rate(BENIGN, good, **where)]
            changes = {"benign_nll_change": nll, f"{BENIGN}_change": good - 1}
            for metric, value in changes.items():
                rows += [Measurement.exact(metric, {**LABELS, **where}, value)]
    lifts = {("harmful", "benign"): lift, ("benign", "parts"): of_tasks, ("harmful", "kind"): 9.0}
    for (first, second), value in lifts.items():
        for selection, of_selection in (("one shot", value), ("search", 1.0)):
            pair = {"first": first, "second": second, "selection": selection, "seed": seed}
            rows += [Measurement.exact("overlap_lift", {**LABELS, **pair}, of_selection)]
    return rows


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        pytest.param(made(KEPT), "holds", id="apart"),
        pytest.param(made(KEPT, lift=6.0), "holds in part", id="shared with the twin"),
        pytest.param(made(KEPT | {"none": -0.2}), "holds in part", id="only where it is spared"),
        pytest.param(made({**KEPT, "none": -0.2, "twin": -0.2}), "holds in part", id="only others"),
        pytest.param(made(dict.fromkeys(KEPT, -0.2)), "does not hold here", id="utility goes"),
        pytest.param(made(KEPT, nll=0.1), "does not hold here", id="the loss rises"),
        pytest.param(made(KEPT, harm=0.6), "does not hold here", id="harm stays"),
        pytest.param(made(KEPT, random=0.0), "does not hold here", id="random does the same"),
        pytest.param(made(KEPT, twin=1.0), "does not hold here", id="nothing breaks benign"),
    ],
)
def test_f3_comes_out_by_its_rule(rows, outcome):
    assert distinct.claim.result(rows).outcome == outcome


def test_without_benign_tasks_harm_is_not_called_apart():
    rows = Rows(row for row in made(KEPT) if row.labels.get("second") != "parts")
    assert distinct.claim.result(rows).outcome == "holds in part"
    assert distinct.key_numbers(rows)["lifts of pairs of benign tasks"] == "–"


def test_seeds_are_pooled_and_the_worst_model_counts():
    both_seeds = made(KEPT, lift=4.0) + made(KEPT, of_tasks=5.0, seed=1)
    assert distinct.claim.result(both_seeds).outcome == "holds", "2 to 4 is within 3 to 5"
    other = Rows(row.labelled(model="dpo") for row in made(KEPT, random=0.0))
    assert distinct.claim.result(made(KEPT) + other).outcome == "does not hold here"


def test_the_key_numbers_say_where_utility_is_kept():
    numbers = distinct.key_numbers(made(KEPT | {"none": -0.2}))
    assert numbers["sparing nothing: utility"] == "not kept"
    assert numbers["sparing its twin: utility"] == "kept"
    lift = numbers["lift of harm and its twin"]
    assert lift.startswith("2.0"), "in one shot, where the search says 1.0"
