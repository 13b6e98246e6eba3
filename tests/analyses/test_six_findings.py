"""The page of claims says what the committed rows give.

Would catch: an outcome or a figure typed in, rows that no longer fit their analysis, an analysis
left out of the page.
"""

from functools import cache
from importlib import import_module

import claims_page
import pytest
import six_findings
from pages import README, text_of

from harmcircuits.studies.claims import ClaimResult


@cache
def results() -> dict[str, ClaimResult]:
    return {result.name: result for result in six_findings.committed()}


@pytest.mark.parametrize("name", six_findings.FINDINGS)
def test_the_page_holds_outcome_and_words(name):
    result = results()[name]
    page = " ".join(text_of("claims.md").replace("\n>", "\n").split())
    assert f"| {result.text} | **{result.outcome}** |" in page
    for paragraph in result.words.splitlines():
        assert " ".join(paragraph.split()) in page


def test_the_command_writes_the_pages_as_they_are():
    """And sets right what is wrong."""
    page, readme = text_of("claims.md"), README.read_text(encoding="utf-8")
    changed = page.replace("**holds**", "**fails**").replace("> sft", "> SFT")
    assert changed != page
    for result in results().values():
        assert claims_page.with_result(page, result) == page
        changed = claims_page.with_result(changed, result)
    assert changed == page
    assert claims_page.with_verdicts(readme, results().values()) == readme


@pytest.mark.parametrize("name", six_findings.FINDINGS)
def test_three_seeds_of_the_shipped_ladder_are_committed(name):
    cases = results()[name].cases
    assert "shipped" in set(cases["ladder"])
    if "seed" in cases:
        assert set(cases.loc[cases["ladder"] == "shipped", "seed"]) == {0, 1, 2}


@pytest.mark.parametrize("name", ["put_back", "activation_patching", "second_opinion"])
def test_the_results_quote_these_in_words(name):
    analysis = import_module(name)
    page = " ".join(text_of("results.md").replace("\n>", "\n").split())
    for paragraph in analysis.claim.report(analysis.rows).splitlines():
        assert " ".join(paragraph.split()) in page
