"""The tables of the page of real models are those of the committed rows, and so is its picture.

Would catch: a figure typed in, a mask whose rows are gone, an answer under another prefill in place of
the usual one.
"""

import pytest
import real_models_page
from pages import text_of


def test_the_page_is_as_the_command_writes_it():
    text = text_of("real_models.md")
    assert real_models_page.with_tables(text) == text
    for name in real_models_page.TABLES:
        assert f"<!-- {name} -->\n\n| " in text


@pytest.mark.parametrize("title", real_models_page.DRAWN)
def test_a_bar_of_the_picture_is_all_answers_of_one_mask(title):
    name, mask = real_models_page.SMALL[title]
    rows = [
        real_models_page.row_of(name, metric, mask) for metric in real_models_page.ANSWERS.values()
    ]
    assert sum(row.mean for row in rows) == pytest.approx(1)
    assert {row.n for row in rows} == {37}
