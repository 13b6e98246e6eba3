"""The command of the search bench, and the pages that quote its committed rows.

Would catch: a page that quotes other rows, a table of methods that a run did not try, a model of
one's own that is measured as a ladder's, a method that is not known tried in silence.
"""

from pathlib import Path

import search_bench as bench
from pages import text_of
from support.bench import results
from support.markdown import frame_markdown

from harmcircuits.measurements import Rows


def test_the_pages_quote_the_committed_rows():
    folder = Path(bench.__file__).parent
    rows = Rows.read(folder / "rows" / "search_bench.jsonl")
    overview, cases = text_of("results.md"), text_of("search_bench.md")
    assert frame_markdown(results.table(rows, bench.every_method())) in overview
    assert results.times_text(rows) in overview
    assert frame_markdown(results.case_table(rows)) in cases
    assert results.times_text(rows) in cases
