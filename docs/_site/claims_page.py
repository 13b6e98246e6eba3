# %% [markdown]
# # The results on the pages
# `python docs/_site/claims_page.py` writes what committed rows say: verdicts into the tables of
# `docs/claims.md` and both READMEs, and key numbers between `<!-- NAME -->` and `<!-- /NAME -->` on any
# page. What stands around them is written by hand; tests hold the pages to the rows.

# %%
import re
import sys
from pathlib import Path

from support.claims import ClaimResult
from support.markdown import frame_markdown

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/claims.md",
    "docs/results.md",
    "docs/log/toy_models.md",
    "analyses/README.md",
)
# Whose numbers are on a page besides those of the findings.
QUESTIONS = ("put_back", "activation_patching", "second_opinion", "shared_circuits")


def with_result(page: str, result: ClaimResult) -> str:
    """The page with the outcome of a claim and its key numbers, where it has places for them."""
    start, end = f"<!-- {result.name} -->", f"<!-- /{result.name} -->"
    parts = [start, frame_markdown(result.key_numbers), end]
    if result.outcome:
        row = rf"(\| {re.escape(result.text)} \| )\*\*[^*]+\*\* \| [^|]+ \|"
        page = re.sub(row, rf"\g<1>**{result.outcome}** | {result.count} |", page)
        row = rf"(\| {result.name}: [^|]+ \| )[^|]+ \|"  # in the list of analyses
        page = re.sub(row, rf"\g<1>{result.outcome}, {result.count} |", page)
        parts.insert(1, f"**Result.** {result.outcome.capitalize()}: {result.count}.")
    return re.sub(f"{start}.*{end}", lambda _: "\n\n".join(parts), page, flags=re.DOTALL)


def results() -> list[ClaimResult]:
    """What the committed rows of the findings and the questions say."""
    if str(ROOT / "analyses") not in sys.path:
        sys.path.insert(0, str(ROOT / "analyses"))
    from six_findings import FINDINGS, committed

    return committed([*FINDINGS.values(), *QUESTIONS])


# %%
if __name__ == "__main__":
    every_result = results()
    for path in [ROOT / name for name in PAGES]:
        page = path.read_text(encoding="utf-8")
        for result in every_result:
            page = with_result(page, result)
        path.write_text(page, encoding="utf-8")
