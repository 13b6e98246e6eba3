"""The completion loss of a stub whose next-token probabilities are powers of two.

Would catch: logits and tokens off by one position, a mean over tokens in place of examples.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harmcircuits.batches import Batch
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import choice_margin, completion_loss, token_error

LOG2 = math.log(2)
# P(next | previous): row = previous token.
EIGHTHS = [[4, 2, 1, 1], [1, 4, 2, 1], [2, 2, 2, 2], [1, 1, 2, 4]]
CHAIN = torch.tensor(EIGHTHS) / 8


class MarkovModel(Bridge):
    """Stands in for a bridge.

    Logits are log CHAIN plus a constant per position, which softmax ignores.
    """

    cfg = SimpleNamespace(device="cpu")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    @property
    def original_model(self) -> "MarkovModel":
        return self

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        constant = torch.arange(tokens.shape[1])[:, None]
        return (CHAIN.log()[tokens] + constant).to(self.dtype)

    __call__ = forward


def batch_of(tokens: list[list[int]], is_target: list[list[int]]) -> Batch:
    return Batch(torch.tensor(tokens), torch.tensor(is_target).bool())


BATCH = batch_of(
    [[0, 1, 2, 3, 0], [0, 0, 3, 1, 1], [1, 1, 1, 1, 1]],
    [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]],
)


def test_losses_by_hand():
    # Row 0: P(2|1) = 1/4, P(3|2) = 1/4. Row 1: P(3|0) = 1/8. Row 2: P(1|1) = 1/2, four times.
    p = torch.tensor([1 / 4, 1 / 8, 1 / 2])
    torch.testing.assert_close(completion_loss(MarkovModel(), BATCH), -p.log())
    torch.testing.assert_close(token_error(MarkovModel(), BATCH), 1 - p)


def test_half_precision_logits_give_float32_losses():
    loss = completion_loss(MarkovModel(torch.bfloat16), BATCH)
    assert loss.dtype == torch.float32
    # The logits carry bfloat16's 8 bits; a loss computed in bfloat16 would fall on its grid.
    torch.testing.assert_close(loss, torch.tensor([2, 3, 1]) * LOG2, rtol=0.02, atol=0)
    assert not torch.equal(loss, loss.bfloat16().float())


class TinyTokenizer:
    """`yes` is token 1, `sure` 2, `no` 3; other words have none."""

    def encode(self, word: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {"yes": [1], "sure": [2, 0], "no": [3]}.get(word, [])


def test_the_margin_is_the_log_ratio_of_right_to_wrong_words():
    """After token 1: P(1) + P(2) = 3/4, P(3) = 1/8. Padding and later targets are ignored."""
    model: Any = MarkovModel()
    model.tokenizer = TinyTokenizer()
    margin = choice_margin(["yes", "sure"], ["no"])
    batch = batch_of(
        [[0, 1, 2, 0], [0, 0, 1, 3], [1, 2, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]
    )
    expected = [-math.log(6), math.log(6), -math.log(6)]
    torch.testing.assert_close(margin(model, batch), torch.tensor(expected))

    with pytest.raises(ValueError, match="rows 0"):
        margin(model, batch_of([[0, 1, 0]], [[0, 0, 1]]))
    with pytest.raises(ValueError, match="share a first token"):
        choice_margin(["yes"], ["yes", "no"])(model, batch)
