"""Changes of outcomes, request by request.

Would catch: an interval of changes whose steps ignore that an answer is sampled several times.
"""

import numpy as np
import pytest
import torch

from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.measurements import Measurement
from harmcircuits.prompts import Example, PromptSet


def test_changes_of_three_samples_move_in_thirds(sft):
    behaviour = sft.behaviour("benign")
    answers = PromptSet(tuple(Example(f"q{n // 3}") for n in range(12)))
    nll = torch.full((4,), float("nan"))

    def outcomes(hits: str) -> Outcomes:
        verdicts = tuple("benign" if hit == "x" else "other" for hit in hits)
        return Outcomes(behaviour, answers, verdicts, nll)

    unpruned, pruned = outcomes("xx.x..xxx..."), outcomes("x....." + "xx.x..")
    (row,) = pruned.changes(unpruned, {})
    steps = torch.from_numpy(np.array([-1 / 3, -1 / 3, -1 / 3, 1 / 3]))
    exact = Measurement.average("x", {}, steps, ["0", "1", "2", "3"], are_counts=True)
    assert (row.low, row.high) == pytest.approx((exact.low, exact.high))
