"""The page that quotes the committed rows of the search's settings."""

import search_defaults as defaults
from pages import text_of
from support.bench.tables import variant_table
from support.markdown import frame_markdown


def test_the_page_quotes_the_committed_rows():
    table = variant_table(defaults.rows, defaults.VARIANTS, defaults.SIZES)
    assert frame_markdown(table) in text_of("search_bench.md")
