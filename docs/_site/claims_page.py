"""The results of the claims: verdicts in tables written by hand, key numbers, and a dot for each case."""

import re
from dataclasses import replace
from functools import cache, partial

import attacks
from blocks import Blocks, committed, markdown
from matplotlib import rc_context
from six_findings import FINDINGS, result_of
from support.claims import FAILS, HOLDS, IN_PART, ClaimResult

from harmcircuits.views.figures import AMBER, GREEN, GREY, STYLE, Picture, subplots, with_legend

# None or all of 48 items, or of the 24 of attacks: the claims' page gives these intervals once.
EXTREME = r"\b(0%|100%) \[(?:0%, (?:9|17)%|(?:91|83)%, 100%|-9%, 9%)\]"
REFUSALS = "attacks, refusals preferred"
# Claims and questions that have a block -> their analysis.
ANALYSES = {
    **FINDINGS,
    "parts": "put_back",
    "patching": "activation_patching",
    "shared": "shared_circuits",
}


@cache
def result(name: str) -> ClaimResult:
    """The result of a claim or question, from its committed rows."""
    if name == REFUSALS:
        attacked = attacks.claim.result(committed("attacks_refuse"))
        return replace(attacked, name=name, outcome=None)
    return result_of(ANALYSES[name])


def block(name: str) -> str:
    """The outcome and the key numbers."""
    claim = result(name)
    numbers = markdown(claim.key_numbers.replace(EXTREME, r"\1", regex=True))
    if not claim.outcome:
        return numbers
    return f"**Result.** {claim.outcome.capitalize()}: {claim.count}.\n\n{numbers}"


def with_verdicts(page: str) -> str:
    """The text of a page with the verdict on every claim that one of its tables lists."""
    for claim in map(result, ANALYSES):
        if claim.outcome:
            row = rf"(\| {re.escape(claim.text)} \| )\*\*[^*]+\*\* \| [^|]+ \|"
            page = re.sub(row, rf"\g<1>**{claim.outcome}** | {claim.count} |", page)
            row = rf"(\| {claim.name}: [^|]+ \| )[^|]+ \|"  # in the list of analyses
            page = re.sub(row, rf"\g<1>{claim.outcome}, {claim.count} |", page)
    return page


@rc_context(STYLE)
def cases_picture() -> Picture:
    """A line of dots for each claim: a dot for each case."""
    colours = {HOLDS: GREEN, IN_PART: AMBER, FAILS: GREY}
    figure, (panel,) = subplots(1, height=3.6)
    for height, name in enumerate(reversed(FINDINGS)):
        outcomes = sorted(result(name).cases["outcome"], key=list(colours).index)
        dots = [colours[outcome] for outcome in outcomes]
        panel.scatter(range(len(dots)), [height] * len(dots), s=60, c=dots)
    for title, colour in (("borne out", GREEN), ("in part", AMBER), ("not", GREY)):
        panel.scatter([], [], s=60, c=colour, label=title)
    panel.set_yticks(range(len(FINDINGS)), list(FINDINGS)[::-1])
    panel.set_xticks([])
    panel.grid(visible=False)
    return with_legend(figure)


CLAIMS: Blocks = {name: partial(block, name) for name in FINDINGS}
RESULTS: Blocks = {"parts": partial(block, "parts")}
TOY_MODELS: Blocks = {name: partial(block, name) for name in ("patching", "shared")}
SEARCH: Blocks = {REFUSALS: partial(block, REFUSALS)}
PICTURES = {"claims.png": cases_picture}
