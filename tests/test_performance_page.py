"""The tables of docs/performance.md are those of the committed rows of the benchmark."""

import performance_page as page

from harmcircuits.measurements import Rows


def test_the_page_is_that_of_the_rows():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_results(text, Rows.read(page.ROWS)) == text
