"""The pages say what the committed rows give.

Would catch: an outcome or a number typed in, rows that no longer fit their analysis, an analysis
left out of the pages.
"""

from functools import cache

import claims_page
import pytest
import six_findings
from support.claims import ClaimResult

TEXTS = {name: (claims_page.ROOT / name).read_text(encoding="utf-8") for name in claims_page.PAGES}


@cache
def results() -> dict[str, ClaimResult]:
    return {result.name: result for result in claims_page.results()}


@pytest.mark.parametrize("page", TEXTS)
def test_the_command_writes_the_pages_as_they_are(page):
    text = TEXTS[page]
    for result in results().values():
        assert claims_page.with_result(text, result) == text


def test_it_sets_right_what_is_wrong():
    text = TEXTS["docs/claims.md"]
    wrong = text.replace("**holds**", "**fails**").replace("0.05% [", "0.06% [")
    assert wrong != text
    for result in results().values():
        wrong = claims_page.with_result(wrong, result)
    assert wrong == text


def test_the_numbers_of_every_analysis_are_on_one_page():
    for name in results():
        assert [f"<!-- {name} -->" in text for text in TEXTS.values()].count(True) == 1


@pytest.mark.parametrize("name", six_findings.FINDINGS)
def test_three_seeds_of_the_shipped_ladder_are_committed(name):
    cases = results()[name].cases
    assert "shipped" in set(cases["ladder"])
    if "seed" in cases:
        assert set(cases.loc[cases["ladder"] == "shipped", "seed"]) == {0, 1, 2}
