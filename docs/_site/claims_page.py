"""The results of the claims: in how many training runs each is shown, and key numbers."""

import re
from dataclasses import replace
from functools import cache, partial

import attacks
from blocks import Blocks, committed, markdown
from pandas import DataFrame
from six_findings import FINDINGS, result_of
from support.claims import ClaimResult

# None or all of 48 items, or of the 24 of attacks: the log of claims gives these intervals once.
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
        return replace(attacked, name=name, cases=DataFrame())
    return result_of(ANALYSES[name])


def block(name: str) -> str:
    """The result and the key numbers."""
    claim = result(name)
    numbers = markdown(claim.key_numbers.replace(EXTREME, r"\1", regex=True))
    if not claim.verdict:
        return numbers
    return f"**Result.** T{claim.verdict[1:]}.\n\n{numbers}"


def claim_table() -> DataFrame:
    """A line for each claim of the paper: in how many training runs it is shown."""
    lines = []
    for claim in map(result, FINDINGS):
        lines.append(
            {
                "": f"[{claim.name}](#{claim.name.lower()})",
                "claim": claim.text,
                "training runs with the paper's effect": claim.effect,
                "with controls": claim.with_controls,
            }
        )
    return DataFrame(lines)


def with_verdicts(page: str) -> str:
    """The text of a page with the verdict on every claim that its list of analyses has."""
    for claim in map(result, ANALYSES):
        if claim.verdict:
            row = rf"(\| {claim.name}: [^|]+ \| )[^|]+ \|"
            page = re.sub(row, rf"\g<1>{claim.verdict} |", page)
    return page


CLAIMS: Blocks = {"claims": claim_table}
KEY_NUMBERS: Blocks = {name: partial(block, name) for name in FINDINGS}
TOY_MODELS: Blocks = {name: partial(block, name) for name in ("parts", "patching", "shared")}
SEARCH: Blocks = {REFUSALS: partial(block, REFUSALS)}
