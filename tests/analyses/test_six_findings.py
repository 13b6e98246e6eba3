"""The pages say what the committed rows give.

Would catch: an outcome or a number typed in, rows that no longer fit their analysis, an analysis
left out of the pages.
"""

import claims_page
import pytest
import six_findings

TEXTS = {name: (claims_page.ROOT / name).read_text(encoding="utf-8") for name in claims_page.PAGES}
RESULTS = {result.name: result for result in claims_page.results()}


@pytest.mark.parametrize("name", RESULTS)
def test_the_pages_are_as_the_command_writes_them(name):
    for text in TEXTS.values():
        assert claims_page.with_result(text, RESULTS[name]) == text
    assert [f"<!-- {name} -->" in text for text in TEXTS.values()].count(True) == 1


def test_the_command_sets_right_what_is_wrong():
    text = TEXTS["docs/claims.md"]
    wrong = text.replace("| **holds** |", "| **fails** |").replace("0.05% [", "0.06% [")
    assert wrong != text
    for result in RESULTS.values():
        wrong = claims_page.with_result(wrong, result)
    assert wrong == text


@pytest.mark.parametrize("name", six_findings.FINDINGS)
def test_three_ladders_are_committed(name):
    assert set(RESULTS[name].cases["ladder"]) == {"shipped", "seed1", "seed2"}
