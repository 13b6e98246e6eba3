"""Arrays for views: what a mask does to each token, and where heads attend.

Would catch: a change of the wrong sign, a view of the unpruned model twice, padding that is shown.
"""

import pytest
import torch

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.inspection import (
    attention_patterns,
    mean_residual,
    token_changes,
    token_texts,
)
from harmcircuits.hooks.masking import masked

HEADS = [(0, 1), (1, 3)]


def test_token_changes_are_those_of_log_probability(llama, batch):
    mask = top_fraction(random_scores(llama), 0.5)
    changes = token_changes(llama, mask, batch)
    assert changes.shape == batch.tokens.shape
    assert (changes[:, 0] == 0).all(), "nothing predicts the first token"

    def log_p() -> torch.Tensor:
        with torch.no_grad():
            logits = llama(batch.tokens)[:, :-1].double()
        return logits.log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]

    before = log_p()
    with masked(llama, mask):
        expected = log_p() - before
    # Losses of order 1 from float32 logits.
    torch.testing.assert_close(changes[:, 1:].double(), expected, rtol=1e-4, atol=1e-5)
    assert changes[:, 1:][batch.is_token[:, 1:]].abs().min() > 0

    empty = top_fraction(random_scores(llama), 0.0)
    assert (token_changes(llama, empty, batch) == 0).all()


def test_token_texts_leave_padding_out(llama, batch):
    for number, is_token in enumerate(batch.is_token):
        texts = token_texts(llama, batch, number)
        real = batch.tokens[number][is_token].tolist()
        assert texts == llama.tokenizer.convert_ids_to_tokens(real)


def test_attention_is_that_of_the_first_example_before_and_under_a_mask(llama, batch):
    mask = top_fraction(random_scores(llama), 0.5)
    n_tokens = int(batch.is_token[0].sum())
    before = attention_patterns(llama, batch, HEADS)
    with masked(llama, mask):
        under = attention_patterns(llama, batch, HEADS)

    for patterns in (before, under):
        assert patterns.shape == (2, n_tokens, n_tokens)
        # Rows of a causal attention pattern sum to one; float32.
        torch.testing.assert_close(patterns.sum(-1), torch.ones(2, n_tokens))
        assert (patterns.triu(1) == 0).all()
    assert not torch.allclose(before, under)

    swapped = attention_patterns(llama, batch, HEADS[::-1])
    assert torch.equal(swapped, before.flip(0)), "in the order that was given"


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Gemma2", "Mixtral"])
def test_mean_residual_is_that_of_each_text_alone(open_model, name):
    bridge = open_model(name)
    rows = [[1, 5, 9, 12], [1, 7], [1, 8, 30, 31, 32, 33]]
    means = mean_residual(bridge, rows, [1, 0], skip=1, batch_size=2)
    assert means.shape == (3, 2, bridge.cfg.d_model)
    for row, mean in zip(rows, means, strict=True):
        _, cache = bridge.run_with_cache(torch.tensor([row]))
        for place, layer in enumerate([1, 0]):
            expected = cache[f"blocks.{layer}.hook_out"][0, 1:].mean(dim=0)
            torch.testing.assert_close(mean[place], expected, rtol=1e-4, atol=1e-5)
    assert mean_residual(bridge, [], [0]).shape == (0, 1, bridge.cfg.d_model)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_what_has_no_mean_residual_is_refused(llama):
    for layers in ([], [2], [-1]):
        with pytest.raises(ValueError, match=r"layers=.*expected some of 0 to 1"):
            mean_residual(llama, [[1, 2]], layers)
    with pytest.raises(ValueError, match="text 1 has 1 tokens; expected more than 1"):
        mean_residual(llama, [[1, 2], [1]], [0], skip=1)
