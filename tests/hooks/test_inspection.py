"""Arrays for views: token changes under a mask, attention, neurons, residuals.

Would catch: a change of the wrong sign, a neuron before its activation function, padding shown.
"""

import pytest
import torch
from helpers import random_mask

from harmcircuits.hooks.inspection import (
    attention_patterns,
    mean_residual,
    neuron_activations,
    prediction_changes,
    token_changes,
)
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import named_weights

HEADS = [(0, 1), (1, 3)]


@pytest.fixture
def mask(llama):
    return random_mask(llama, 0.5)


def test_token_changes_are_those_of_log_probability(llama, batch, mask):
    changes = token_changes(llama, mask, batch)
    assert (changes[:, 0] == 0).all(), "nothing predicts the first token"

    def log_p() -> torch.Tensor:
        logits = llama(batch.tokens)[:, :-1].detach().double()
        return logits.log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]

    unpruned = log_p()
    with masked(llama, mask):
        expected = log_p() - unpruned
    # Losses of order 1 from float32 logits.
    torch.testing.assert_close(changes[:, 1:].double(), expected, rtol=1e-4, atol=1e-5)
    assert changes[:, 1:][batch.is_token[:, 1:]].abs().min() > 0


def test_attention_is_that_of_the_first_example_before_and_under_a_mask(llama, batch, mask):
    unpruned = attention_patterns(llama, batch, HEADS)
    with masked(llama, mask):
        pruned = attention_patterns(llama, batch, HEADS)
        _, cache = llama.run_with_cache(batch.tokens[:1, batch.is_token[0]])
    for patterns, (layer, head) in zip(pruned, HEADS, strict=True):
        expected = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
        torch.testing.assert_close(patterns, expected)
    assert not torch.allclose(unpruned, pruned)


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX"])
def test_mean_residual_is_that_of_each_text_alone(open_model, name):
    bridge = open_model(name)
    rows = [[1, 5, 9, 12], [1, 7], [1, 8, 30, 31, 32, 33]]
    means = mean_residual(bridge, rows, [1, 0], skip=1, batch_size=2)
    for row, mean in zip(rows, means, strict=True):
        _, cache = bridge.run_with_cache(torch.tensor([row]))
        for place, layer in enumerate([1, 0]):
            expected = cache[f"blocks.{layer}.hook_out"][0, 1:].mean(dim=0)
            torch.testing.assert_close(mean[place], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="text 1: the model"):
        mean_residual(bridge, [[1, 5], [1]], [0], skip=1)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_neurons_are_read_after_their_activation_function(llama, batch):
    """By hand, from the raw model's weights: silu(W_gate x) * (W_up x)."""
    activations = neuron_activations(llama, batch, [(1, 5), (1, 0)])
    _, cache = llama.run_with_cache(batch.tokens[:1, batch.is_token[0]])
    x = cache["blocks.1.mlp.in.hook_in"][0]
    weights = named_weights(llama)
    gate, up = (weights[f"blocks.1.mlp.{kind}.weight"][[5, 0]] for kind in ("gate", "in"))
    expected = torch.nn.functional.silu(gate @ x.T) * (up @ x.T)
    torch.testing.assert_close(activations, expected.detach())


def test_prediction_changes_are_those_of_probabilities(llama, batch, mask):
    def p() -> torch.Tensor:
        return llama(batch.tokens[:1, batch.is_token[0]])[0].detach().softmax(-1)

    unpruned = p()
    with masked(llama, mask):
        expected = p() - unpruned
    torch.testing.assert_close(prediction_changes(llama, mask, batch), expected)
