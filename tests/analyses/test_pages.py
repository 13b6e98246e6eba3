"""The pages of stability and of the planted organism quote their committed rows."""

import pytest
from pages import ROOT, text_of
from support.bench import tables
from support.markdown import frame_markdown

from harmcircuits.measurements import Rows

TABLES = {
    "planted": (tables.recovery_table, tables.reach_table, tables.relearning_table),
    "stability": (tables.overlap_table, tables.effect_table),
}
PAGES = {"planted": "planted.md", "stability": "log/stability.md"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_of_the_rows(name):
    rows = Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    for table in TABLES[name]:
        assert frame_markdown(table(rows)) in text_of(PAGES[name])
