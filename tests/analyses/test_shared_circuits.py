"""The comparison of circuits, and the README's table of it.

Would catch: a table that its rows do not give, a test of dissociation on the wrong masks, a model whose rows are lost.
"""

from pathlib import Path

import pytest
import shared_circuits as analysis

from harmcircuits.metrics import rate
from harmcircuits.records import Measurement, read_rows, select

ROOT = Path(__file__).parents[2]
ROWS = read_rows(ROOT / "analyses" / "rows" / "shared_circuits.jsonl")


def test_the_readme_holds_the_table_that_the_rows_give():
    table = analysis.summary(ROWS, *analysis.covered(ROWS))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_needs_only_the_rows_that_are_kept():
    assert analysis.needed(ROWS) == ROWS


def rates(model: str, protected: str, **hits: dict[str, int]) -> list[Measurement]:
    """mask -> metric -> hits of 64."""
    return [
        rate(
            metric,
            {"model": model, "ladder": "x", "mask": mask, "protected": protected},
            [i < n for i in range(64)],
            range(64),
        )
        for mask, found in hits.items()
        for metric, n in found.items()
    ]


def test_each_ability_is_compared_under_its_own_circuit_and_the_other_s():
    harm, benign = "harm_valid_rate", "benign_valid_rate"
    rows = rates("sft", "none", none={harm: 64, benign: 64}, harmful={harm: 0, benign: 64}, benign={harm: 60, benign: 2})
    rows += rates("sft", "others", harmful={harm: 0, benign: 20}, benign={harm: 0, benign: 20})
    (pair, free), *others = analysis.dissociations(rows, "none").items()
    assert (pair, others) == (("harmful", "benign"), [])
    assert (free.first_gap.mean, free.second_gap.mean) == pytest.approx((60 / 64, 62 / 64))
    assert (free.first_cost.mean, free.second_cost.mean) == pytest.approx((4 / 64, 0))
    held = analysis.dissociations(rows, "others")["harmful", "benign"]
    assert held.verdict == "none", "the unpruned rates are shared, the masked ones are not"


def test_the_committed_rows_are_of_finished_models():
    for row in select(ROWS, "compared"):
        mine = select(ROWS, **row.labels)
        assert select(mine, "harm_valid_rate", mask="none")[0].mean >= 0.9, "a rung that can do harm at all"
        for protected in ("none", "others"):
            assert select(mine, "harm_valid_rate", mask="harmful", protected=protected)
