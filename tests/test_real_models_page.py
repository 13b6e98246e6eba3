"""The tables of the page of real models are those of the committed rows, and so is its picture.

Would catch: a figure typed in, a mask whose rows are gone, an answer under another prefill in place of
the usual one.
"""

import pytest
import real_ends
import real_models_page
from pages import README, text_of

from harmcircuits.measurements import Measurement, Rows


def test_the_page_is_as_the_command_writes_it():
    text = text_of("real_models.md")
    assert real_models_page.with_tables(text) == text
    for name in real_models_page.TABLES:
        assert f"<!-- {name} -->\n\n| " in text


def row_of(title: str, metric: str) -> Measurement:
    name, mask = real_models_page.SMALL[title]
    row = real_models_page.row_of(name, metric, mask)
    assert row is not None, f"{title} has no {metric}"
    return row


@pytest.mark.parametrize("title", real_models_page.DRAWN)
def test_a_bar_of_the_picture_is_all_answers_of_one_mask(title):
    rows = [row_of(title, metric) for metric in real_models_page.ANSWERS.values()]
    assert sum(row.mean for row in rows) == pytest.approx(1)
    assert {row.n for row in rows} == {37}


def test_what_other_pages_say_of_it():
    """The README's line on it, and the published method beside the claims."""
    rows = Rows.read(real_ends.ROWS).where(beginning="scored")
    text = " ".join(README.read_text(encoding="utf-8").split())
    n_removed = rows.one("n_removed", mask="search").mean
    refused, before = (rows.one("harm_refusal_rate", mask=mask).mean for mask in ("search", "none"))
    assert f"{n_removed:,.0f} of 357,826,560 weights" in text
    assert f"refuse {100 * refused:.0f} % of harmful" in text
    assert f"({100 * before:.0f} before)" in text

    titles = ("search, within the budget", "unpruned")
    within, unpruned = (f"{row_of(title, 'harm_valid_rate').mean:.0%}" for title in titles)
    box = " ".join(text_of("real_models.md").split())
    assert f"{within} stay harmful within the budget".replace("%", " %") in box
    assert within == unpruned, "the page says: as without a mask"

    text = " ".join(text_of("claims.md").split())
    changes = {}
    for name in ("harm_nll", "benign_nll", "prefilled_nll"):
        published, whole = (rows.one(name, mask=mask).mean for mask in ("published", "none"))
        changes[name] = f"{published - whole:+.2f}"
    assert f"harm {changes['harm_nll']} nats" in text
    assert f"benign {changes['benign_nll']} nats" in text
    assert f"with the same prefill {changes['prefilled_nll']}" in text
