"""The page of the planted organism quotes its committed rows."""

from importlib import import_module
from pathlib import Path

from pages import text_of
from support.bench import tables
from support.markdown import frame_markdown

from harmcircuits.measurements import Rows

analysis = import_module("planted")


def test_the_page_quotes_the_committed_rows():
    folder = Path(analysis.__file__).parent
    rows = Rows.read(folder / "rows" / "planted.jsonl")
    text = text_of("planted.md")
    for table in (tables.recovery_table, tables.reach_table, tables.relearning_table):
        assert frame_markdown(table(rows)) in text
