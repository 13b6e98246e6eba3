"""The page that quotes the committed rows of the search's settings."""

from pathlib import Path

import search_defaults as defaults
from pages import text_of
from support.bench.tables import variant_table

from harmcircuits.measurements import Rows
from harmcircuits.views.tables import frame_markdown


def test_the_page_quotes_the_committed_rows():
    folder = Path(defaults.__file__).parent
    rows = Rows.read(folder / "rows" / "search_defaults.jsonl")
    table = variant_table(rows, defaults.VARIANTS, defaults.SIZES)
    assert frame_markdown(table) in text_of("search_bench.md")
