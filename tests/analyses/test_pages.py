"""The pages of stability and of the planted organism quote their committed rows."""

import pytest
from pages import ROOT, text_of
from support import planted, stability
from support.markdown import frame_markdown

from harmcircuits.measurements import Rows

TABLES = {
    "planted": (planted.recovery_table, planted.reach_table, planted.relearning_table),
    "stability": (stability.overlap_table, stability.effect_table),
}
PAGES = {"planted": "planted.md", "stability": "log/stability.md"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_of_the_rows(name):
    rows = Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    for table in TABLES[name]:
        assert frame_markdown(table(rows)) in text_of(PAGES[name])
