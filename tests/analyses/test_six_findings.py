"""The table of claims is what the committed rows give.

Would catch: an outcome or a figure typed in, rows that no longer fit their analysis, an analysis
left out of the table.
"""

from pathlib import Path

import pytest
import six_findings
from pages import text_of

from harmcircuits.measurements import Rows
from harmcircuits.studies.claims import summary_table

ROOT = Path(__file__).parents[2]
ROWS = Rows.read(ROOT / "analyses" / "rows" / "six_findings.jsonl")


def test_the_page_holds_the_table_that_the_rows_give():
    results = []
    for analysis in six_findings.ANALYSES:
        results.append(analysis.result(ROWS.where(finding=analysis.NAME)))
    assert summary_table(results) in text_of("claims.md")


@pytest.mark.parametrize("analysis", six_findings.ANALYSES, ids=lambda analysis: analysis.NAME)
def test_the_result_needs_only_the_rows_that_are_kept(analysis):
    rows = ROWS.where(finding=analysis.NAME)
    assert analysis.reported(rows) == rows
    assert {row.labels["seed"] for row in rows if "seed" in row.labels} == {0, 1, 2}
