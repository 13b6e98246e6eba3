"""The cross-ablation by loss judges made-up rows by its rule.

Would catch: a rule that ignores a control or benign answers, an ability compared with itself.
"""

import by_loss as analysis
import pytest

from harmcircuits.measurements import Measurement, Rows

LABELS = {"model": "m", "ladder": "own"}


def a_run(*, unseen=0.8, random=0.0, benign=0.05, gaps=(0.3, 0.3)) -> Rows:
    """Rises of harm (1.0 under the circuit of all types) and benign answers, and both gaps."""

    def row(metric: str, mean: float, **labels: str) -> Measurement:
        return Measurement(metric, {**LABELS, **labels}, mean, mean - 0.1, mean + 0.1, 40)

    rows = Rows([row("lift", 2.0, mask="harmful", of="benign", protected="none")])
    for protected in ("none", "benign"):
        where = {"protected": protected}
        rises = {
            ("harmful", "harmful"): 1.0,
            ("harmful", "benign"): benign,
            ("benign", "harmful"): 0.1,
            ("benign", "benign"): 1.0,
            (analysis.UNSEEN, "harmful"): unseen,
            (analysis.UNSEEN, "benign"): benign,
            (analysis.OPPOSITE, "harmful"): -0.2,
            ("random 0", "harmful"): random,
        }
        rows += [
            row("nll_rise", mean, mask=mask, of=of, **where) for (mask, of), mean in rises.items()
        ]
        rows += [row("nll_gap", gaps[0], of="harmful", against="benign", **where)]
        rows += [row("nll_gap", gaps[1], of="benign", against="harmful", **where)]
        rows += [row("weights_removed", 100, mask="harmful", **where)]
    return rows


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "holds"),
        ({"unseen": 0.4}, "holds in part"),  # below half of the rise under the circuit of all types
        ({"random": 0.7}, "holds in part"),
        ({"benign": 0.7}, "holds in part"),
        ({"gaps": (0.3, 0.05)}, "holds in part"),  # general, and one gap's interval holds zero
        ({"unseen": 0.4, "gaps": (0.05, 0.3)}, "does not hold here"),
    ],
)
def test_the_rule(change, expected):
    rows = a_run(**change)
    result = analysis.claim.result(rows)
    assert result.outcome == expected
    is_general = change.get("unseen", 1) > 0.5 and not {"random", "benign"} & set(change)
    assert result.key_numbers.set_index("")["m of own"]["by the rule"] == (
        "general" if is_general else "not general"
    )
