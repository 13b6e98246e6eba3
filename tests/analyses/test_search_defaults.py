"""The page that quotes the committed rows of the search's settings."""

from pathlib import Path

import search_defaults as defaults
from pages import markdown, text_of

from harmcircuits.measurements import Rows


def test_the_page_quotes_the_committed_rows():
    folder = Path(defaults.__file__).parent
    rows = Rows.read(folder / "rows" / "search_defaults.jsonl")
    assert markdown(defaults.variants(rows)) in text_of("search_bench.md")
