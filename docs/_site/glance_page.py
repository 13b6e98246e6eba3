"""The tables of "Results at a glance": claims and what follows, on toy models and on a real one."""

import claims_page
import removed_or_hidden_page
import study_page
from blocks import Blocks, committed
from pandas import DataFrame
from six_findings import FINDINGS
from support.claims import ClaimResult

from harmcircuits.views.tables import DASH

NOT_MEASURED = "not measured"
TITLES = {
    "F1": "a tiny share of the weights carries harm",
    "F2": "one mechanism for all types of harm",
    "F3": "harm is separate from benign capability",
    "F4": "alignment compresses harm",
    "F5": "narrow fine-tuning misaligns through harm's weights",
    "F6": "recognition, explanation and refusal survive",
    "attacks": "pruning withstands elicitation, not training",
}


def read_blind(mask: str) -> str:
    """Harmful answers under a mask behind the prefill, read blind in each of two draws, in %."""
    rates = []
    for file in ("real_ends", "real_ends_second"):
        rates.append(committed(file).one("read_rate", mask=mask, kind="begun", **{"as": "harmful"}))
    return " and ".join(dict.fromkeys(f"{100 * rate.mean:.0f}" for rate in rates)) + " %"


def real_results() -> dict[str, str]:
    """What the rows of the real model say of each claim."""
    rises = committed("loss").where("nll_rise", of="harmful", protected="benign")
    unseen, all_types = (rises.one(mask=mask).mean for mask in ("all but its type", "harmful"))
    removed = committed("real_removed").where("harm_refusal_rate", line="search")
    whole = removed.one(question="dose", at=0.0)
    harmful = removed.one(question="relearning", at=5)
    steps = removed.where(question="benign training")
    benign = sorted(100 * row.mean for row in steps)
    return {
        "F1": f"harmful answers {read_blind('none')} → {read_blind('search')}",
        "F2": f"loss +{unseen:.2f} nats (type unseen), +{all_types:.2f} (seen)",
        "F3": "shown in one of two analyses",
        "F6": "shown in one of two analyses",
        "attacks": f"training: refusals {whole.mean:.0%} → {harmful.mean:.0%}",
        "benign": f"training: refusals {whole.mean:.0%} → {benign[0]:.0f}–{benign[-1]:.0f}%",
    }


def claim_line(claim: ClaimResult, real: str) -> dict[str, str]:
    """A claim of the paper."""
    return {
        "claim": f"[{claim.name}](claims.md#{claim.name.lower()}): {TITLES[claim.name]}",
        "paper's effect": claim.effect.partition(" (")[0],
        "with controls": claim.with_controls.partition(" (")[0],
        "real model": real,
    }


def glance_table() -> DataFrame:
    """A line for each claim of the paper, and for each statement about what follows a removal."""
    real = real_results()
    lines = []
    for claim in map(claims_page.result, FINDINGS):
        lines.append(claim_line(claim, real.get(claim.name, NOT_MEASURED)))
    for statement, cases in removed_or_hidden_page.verdicts().itertuples(index=False):
        if statement in removed_or_hidden_page.DETAILS:
            continue
        is_benign = "(#benign)" in statement
        lines.append(
            {
                "claim": statement.replace("(#", "(removed_or_hidden.md#"),
                "paper's effect": DASH,
                "with controls": cases,
                "real model": real["benign"] if is_benign else NOT_MEASURED,
            }
        )
    return DataFrame(lines)


BLOCKS: Blocks = {"glance": glance_table, **study_page.GLANCE}
