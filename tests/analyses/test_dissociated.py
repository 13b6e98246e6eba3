"""F6's rule on made-up rows, in both directions, and its key numbers.

Would catch: pairs of one model that are judged in place of all, a fall that random weights cause as
well, protection that is read the wrong way round, numbers that contradict the rule.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

dissociated = analysis("dissociated")
LABELS = {"ladder": "shipped", "model": "sft", "seed": 0}


def rate(metric: str, share: float, **labels) -> Measurement:
    hits = [number < round(64 * share) for number in range(64)]
    return Measurement.rate(metric, {**LABELS, **labels}, hits, range(64))


def made(free: float, apart: float, *, random: float = 1.0, **labels) -> Rows:
    """Rates are 1 unpruned, and 0.3 under an ability's own circuit.

    Args:
        free: what each ability keeps under the others' circuits when nothing is spared.
        apart: the same when all others are spared.
        random: what it keeps under random weights.
        labels: of the rows.
    """
    rows = Rows()
    metrics = {name: dissociated.METRICS[name] for name in dissociated.PRUNED}
    for metric in (*metrics.values(), dissociated.PLAIN):
        rows += [rate(metric, 1.0, mask="none", **labels)]
        for protected, spared in (("none", free), ("others", apart)):
            where = {"protected": protected, **labels}
            for mask, own in metrics.items():
                rows += [rate(metric, 0.3 if metric == own else spared, mask=mask, **where)]
            rows += [rate(metric, random, mask="random", **where)]
    return rows


def only_harm(rows: Rows) -> Rows:
    """Of a model that shows no other ability of which a circuit is found."""
    return Rows(row for row in rows if row.labels["mask"] in ("none", "harmful", "random"))


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        pytest.param(made(0.7, 1.0), "holds", id="clean"),
        pytest.param(made(0.3, 1.0), "holds in part", id="not without protection"),
        pytest.param(made(0.7, 0.7), "holds in part", id="graded"),
        pytest.param(made(1.0, 0.3), "does not hold here", id="only without protection"),
        pytest.param(made(0.7, 1.0, random=0.5), "does not hold here", id="random does the same"),
        pytest.param(only_harm(made(0.7, 1.0)), "does not hold here", id="no other circuits"),
    ],
)
def test_f6_comes_out_by_its_rule(rows, outcome):
    assert dissociated.claim.result(rows).outcome == outcome


def test_pairs_of_all_models_are_counted_together():
    apart, together = made(1.0, 1.0), made(1.0, 0.3, model="dpo")
    result = dissociated.claim.result(apart + together)
    assert list(result.cases["outcome"]) == ["holds", "does not hold here"]
    assert result.outcome == "holds in part", "three of six pairs"
    more = together + made(1.0, 0.3, model="dpo", seed=1)
    assert dissociated.claim.result(apart + more).outcome == "does not hold here"


def test_the_key_numbers_say_what_is_left_and_how_often_abilities_come_apart():
    rows = made(0.3, 1.0)
    numbers = dissociated.key_numbers(rows)
    assert numbers["sparing nothing: pairs, none"] == "3 of 3"
    assert numbers["sparing all others: harm"] == "30%"
    assert numbers["sparing all others: recognises"] == "100%"
    assert numbers["sparing all others: pairs, clean double"] == "3 of 3"
    plain = "plain harm, without the circuit of refusal"
    assert numbers[plain].startswith("100% to ")
    without = dissociated.key_numbers(Rows(row for row in rows if row.labels["mask"] != "refusal"))
    assert plain not in without
    assert without["sparing all others: pairs, clean double"] == "2 of 2"
