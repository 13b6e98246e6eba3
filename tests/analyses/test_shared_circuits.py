"""The comparison of circuits, and the page's table of it.

Would catch: a table that its rows do not give, a model whose rows are lost.
"""

from pathlib import Path

import shared_circuits as analysis
from pages import text_of

from harmcircuits.measurements import Rows

ROOT = Path(__file__).parents[2]
ROWS = Rows.read(ROOT / "analyses" / "rows" / "shared_circuits.jsonl")


def test_the_page_holds_the_table_that_the_rows_give():
    table = analysis.summary(ROWS, *analysis.covered(ROWS))
    assert table in text_of("results.md")


def test_the_table_needs_only_the_rows_that_are_kept():
    assert analysis.reported(ROWS) == ROWS


def test_the_committed_rows_are_of_finished_models():
    for row in ROWS.where("compared"):
        of_model = ROWS.where("harm_valid_rate", **row.labels)
        assert of_model.one(mask="none").mean >= 0.9, "a rung that can do harm at all"
        for protected in ("none", "others"):
            assert of_model.one(mask="harmful", protected=protected)
