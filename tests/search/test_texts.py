"""How answers are shared out among pricing and checking.

Would catch: answers of one request on both sides, a rise that is credited to another behaviour.
"""

import oracle
import pytest
import torch
from helpers import random_batch

from harmcircuits.batches import Batch, split_for_checks
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.search.attribution import removal_effect
from harmcircuits.search.texts import Protection

FIRST = [random_batch(7, 8, seed=1)]
SECOND = [random_batch(4, 6, seed=2), random_batch(2, 10, seed=3)]


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The tokens of every example, without padding."""
    return [tuple(tokens[0].tolist()) for tokens, _ in oracle.examples(batches)]


def test_every_third_request_is_set_apart_with_all_its_answers():
    training, third = split_for_checks(SECOND, 3)
    examples = rows(SECOND)
    assert rows(third) == examples[2::3]
    assert rows(training) == [example for example in examples if example not in examples[2::3]]

    tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [9, 6, 7], [3, 6, 7], [3, 6, 8]])
    is_target = torch.tensor([[False, False, True]]).expand(5, 3)
    training, third = split_for_checks([Batch(tokens, is_target)], 3)
    assert rows(training) == [(5, 6, 7), (5, 6, 8), (9, 6, 7)]
    assert rows(third) == [(3, 6, 7), (3, 6, 8)]


def test_rises_are_those_of_each_behaviour_by_itself(llama):
    protection = Protection.of(llama, {"first": FIRST, "second": SECOND}, 0.1)
    mask = top_fraction(removal_effect(llama, FIRST), 0.1)
    rises = {row.labels["protected"]: row for row in protection.rises(llama, mask)}
    for name, batches in (("first", FIRST), ("second", SECOND)):
        _, checked = split_for_checks(batches, 3)
        change = completion_nll(llama, checked, mask=mask) - completion_nll(llama, checked)
        assert rises[name].mean == pytest.approx(change.mean().item(), abs=1e-5)
        half = 1.959964 * change.std().item() / len(change) ** 0.5
        assert rises[name].high - rises[name].mean == pytest.approx(half, abs=1e-5)

        for share, is_allowed in ((1.01, True), (0.99, False)):
            budget = {"first": 100.0, "second": 100.0, name: share * rises[name].mean}
            bound = Protection.of(llama, {"first": FIRST, "second": SECOND}, budget)
            assert bound.allows(bound.rises(llama, mask)) == is_allowed
