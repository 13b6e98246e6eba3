# %% [markdown]
# # The results on the page of claims
# `python docs/_site/claims_page.py` writes outcomes and quotes of `docs/claims.md`, and the verdicts of
# the README, from the committed rows. What stands around them is written by hand; tests hold both pages
# to the rows.

# %%
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from harmcircuits.studies.claims import ClaimResult

ROOT = Path(__file__).parents[2]
WIDTH = 100


# %%
def quote(words: str) -> str:
    """Paragraphs as a quotation."""
    paragraphs = [
        fill(paragraph, WIDTH, initial_indent="> ", subsequent_indent="> ", break_on_hyphens=False)
        for paragraph in words.splitlines()
    ]
    return "\n>\n".join(paragraphs)


def with_result(page: str, result: ClaimResult) -> str:
    """The page of claims with this outcome in its table, and outcome and words in its section."""
    page = with_outcome(page, result)
    section = rf"(\{{ #{result.name.lower()} \}}\n.*?\*\*Result\.\*\* )[^\n]*\n\n(?:>[^\n]*\n)+"
    outcome = f"{result.outcome.capitalize()}.\n\n{quote(result.words)}\n"
    return re.sub(section, lambda match: match[1] + outcome, page, count=1, flags=re.DOTALL)


def with_verdicts(readme: str, results: Iterable[ClaimResult]) -> str:
    """The README with these outcomes in its table."""
    for result in results:
        readme = with_outcome(readme, result)
    return readme


def with_outcome(page: str, result: ClaimResult) -> str:
    """A page with this outcome in the line of a table that names its claim."""
    row = rf"(\| {re.escape(result.text)} \| )\*\*[^*]+\*\*"
    return re.sub(row, rf"\g<1>**{result.outcome}**", page)


# %%
def main() -> None:
    sys.path.insert(0, str(ROOT / "analyses"))
    from six_findings import committed

    results = committed()
    path = ROOT / "docs" / "claims.md"
    page = path.read_text(encoding="utf-8")
    for result in results:
        page = with_result(page, result)
    path.write_text(page, encoding="utf-8")

    path = ROOT / "README.md"
    readme = with_verdicts(path.read_text(encoding="utf-8"), results)
    path.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
