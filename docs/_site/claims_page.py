# %% [markdown]
# # The results on the pages
# `python docs/_site/claims_page.py` writes what committed rows say: verdicts into the tables of
# `docs/claims.md` and both READMEs, and key numbers between `<!-- NAME -->` and `<!-- /NAME -->` on any
# page; and draws every case into `docs/figures/claims.png`. What stands around them is written by hand; tests hold the pages to the rows.

# %%
import re
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib import rc_context
from support.claims import FAILS, HOLDS, IN_PART, ClaimResult
from support.markdown import between, frame_markdown

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import (
    AMBER,
    GREEN,
    GREY,
    STYLE,
    Picture,
    subplots,
    with_legend,
)

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/claims.md",
    "docs/results.md",
    "docs/search_bench.md",
    "docs/log/toy_models.md",
    "analyses/README.md",
)
DOTS = {HOLDS: GREEN, IN_PART: AMBER, FAILS: GREY}
# None or all of 48 items, or of the 24 of attacks: their intervals are said once, on the claims' page.
EXTREME = re.compile(r"\b(0%|100%) \[(?:0%, (?:9|17)%|(?:91|83)%, 100%|-9%, 9%)\]")
# Whose numbers are on a page besides those of the findings.
QUESTIONS = ("put_back", "activation_patching", "shared_circuits")


def with_result(page: str, result: ClaimResult) -> str:
    """The page with the outcome of a claim and its key numbers, where it has places for them."""
    parts = [EXTREME.sub(r"\1", frame_markdown(result.key_numbers))]
    if result.outcome:
        row = rf"(\| {re.escape(result.text)} \| )\*\*[^*]+\*\* \| [^|]+ \|"
        page = re.sub(row, rf"\g<1>**{result.outcome}** | {result.count} |", page)
        row = rf"(\| {result.name}: [^|]+ \| )[^|]+ \|"  # in the list of analyses
        page = re.sub(row, rf"\g<1>{result.outcome}, {result.count} |", page)
        parts.insert(0, f"**Result.** {result.outcome.capitalize()}: {result.count}.")
    return between(page, result.name, *parts)


def results() -> list[ClaimResult]:
    """What the committed rows of the findings and the questions say."""
    if str(ROOT / "analyses") not in sys.path:
        sys.path.insert(0, str(ROOT / "analyses"))
    from six_findings import FINDINGS, committed

    return [*committed([*FINDINGS.values(), *QUESTIONS]), attacks_on_refusals()]


def attacks_on_refusals() -> ClaimResult:
    """The attacks on masks that were told to prefer refusals."""
    from attacks import claim

    rows = Rows.read(ROOT / "analyses" / "rows" / "attacks_refuse.jsonl")
    return replace(claim.result(rows), name="attacks, refusals preferred", outcome=None)


@rc_context(STYLE)
def cases_picture(of_claims: list[ClaimResult]) -> Picture:
    """A line of dots for each claim: a dot for each case."""
    figure, (panel,) = subplots(1, height=3.6)
    names = [result.name for result in of_claims]
    for height, result in enumerate(reversed(of_claims)):
        outcomes = sorted(result.cases["outcome"], key=list(DOTS).index)
        colours = [DOTS[outcome] for outcome in outcomes]
        panel.scatter(range(len(outcomes)), [height] * len(outcomes), s=60, c=colours)
    for title, colour in (("borne out", GREEN), ("in part", AMBER), ("not", GREY)):
        panel.scatter([], [], s=60, c=colour, label=title)
    panel.set_yticks(range(len(names)), names[::-1])
    panel.set_xticks([])
    panel.grid(visible=False)
    return with_legend(figure)


# %%
if __name__ == "__main__":
    every_result = results()
    findings = [result for result in every_result if result.outcome and result.name != "parts"]
    cases_picture(findings).save(ROOT / "docs" / "figures" / "claims.png")
    for path in [ROOT / name for name in PAGES]:
        page = path.read_text(encoding="utf-8")
        for result in every_result:
            page = with_result(page, result)
        path.write_text(page, encoding="utf-8")
