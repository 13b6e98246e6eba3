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
TITLES = {"F5": "narrow fine-tuning", "attacks": "elicitation, not training"}
# Rows of another search than that of 1 December.
DAYS = {"F5": "30 Nov"}


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
    benign = removed.one(question="benign training", at=5)
    return {
        "F1": f"harmful {read_blind('none')} to {read_blind('search')}",
        "F2": f"by loss: {unseen:.2f} of {all_types:.2f} nats",
        "F3": "by loss: one of two runs",
        "F6": "by loss: one of two runs",
        "attacks": f"training: refused {whole.mean:.0%} to {harmful.mean:.0%}",
        "benign": f"refused {whole.mean:.0%} to {benign.mean:.0%}",
    }


def claim_line(claim: ClaimResult, real: str) -> dict[str, str]:
    """A claim of the paper."""
    title = TITLES.get(claim.name, claim.text.partition(":")[0])
    return {
        "claim": f"[{claim.name}](claims.md#{claim.name.lower()}): {title}",
        "effect": claim.effect.partition(" (")[0],
        "with controls": claim.with_controls.partition(" (")[0],
        "real model": real,
        "toy rows": DAYS.get(claim.name, "1 Dec"),
    }


def glance_table() -> DataFrame:
    """A line for each claim of the paper, and for each statement about what follows a removal."""
    real = real_results()
    lines = []
    for claim in map(claims_page.result, FINDINGS):
        lines.append(claim_line(claim, real.get(claim.name, NOT_MEASURED)))
    for statement, cases in removed_or_hidden_page.verdicts().itertuples(index=False):
        if statement.startswith("[..."):  # finer than a glance
            continue
        is_benign = "(#benign)" in statement
        lines.append(
            {
                "claim": statement.replace("(#", "(removed_or_hidden.md#"),
                "effect": DASH,
                "with controls": cases,
                "real model": real["benign"] if is_benign else NOT_MEASURED,
                "toy rows": "1 Dec",
            }
        )
    return DataFrame(lines)


BLOCKS: Blocks = {"glance": glance_table, **study_page.GLANCE}
