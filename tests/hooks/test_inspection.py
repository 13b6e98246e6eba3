"""Arrays for views: what a mask does to each token, where heads attend, what neurons do.

Would catch: a change of the wrong sign, a view of the unpruned model twice, padding that is shown, a
neuron read before its activation function, a prediction under the wrong token.
"""

import pytest
import torch

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.inspection import (
    attention_patterns,
    mean_residual,
    neuron_activations,
    prediction_changes,
    token_changes,
    token_texts,
    vocabulary,
)
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import model_fingerprint, named_weights

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


# Neurons


def test_neurons_are_read_after_their_activation_function(llama, batch):
    """By hand, from the raw model's weights: silu(W_gate x) * (W_up x)."""
    neurons = [(1, 5), (0, 39), (1, 0)]
    activations = neuron_activations(llama, batch, neurons)
    inputs, handles = {}, []
    for layer, block in enumerate(llama.original_model.model.layers):

        def keep(module, arguments, layer=layer):
            inputs[layer] = arguments[0][0].detach()

        handles.append(block.mlp.register_forward_pre_hook(keep))
    llama(batch.tokens[:1, : activations.shape[1]])
    for handle in handles:
        handle.remove()

    weights = named_weights(llama)
    assert activations.shape == (3, int(batch.is_token[0].sum()))
    for (layer, neuron), values in zip(neurons, activations, strict=True):
        gate = weights[f"blocks.{layer}.mlp.gate.weight"][neuron]
        up = weights[f"blocks.{layer}.mlp.in.weight"][neuron]
        x = inputs[layer]
        expected = torch.nn.functional.silu(x @ gate) * (x @ up)
        torch.testing.assert_close(values, expected.detach())


def test_a_neuron_without_its_weights_is_silent(llama, batch):
    name = "blocks.1.mlp.in.weight"
    shapes = {key: tuple(value.shape) for key, value in named_weights(llama).items()}
    row = torch.arange(5 * 24, 6 * 24)
    mask = WeightMask({name: row}, shapes, Source(model_fingerprint(llama), "test"))
    with masked(llama, mask):
        silent, other = neuron_activations(llama, batch, [(1, 5), (1, 6)])
    assert not silent.any() and other.any()


# Predictions


def test_prediction_changes_are_those_of_probabilities(llama, batch):
    mask = top_fraction(random_scores(llama), 0.5)
    changes = prediction_changes(llama, mask, batch)
    n_tokens = int(batch.is_token[0].sum())
    assert changes.shape == (n_tokens, llama.cfg.d_vocab)
    torch.testing.assert_close(changes.sum(dim=1), torch.zeros(n_tokens), atol=1e-5, rtol=0)

    # What is gained at position t belongs to token t + 1: as `token_changes`, in probabilities.
    with torch.no_grad():
        before = llama(batch.tokens[:1, :n_tokens])[0].softmax(-1)
    following = batch.tokens[0, 1:n_tokens]
    log_changes = token_changes(llama, mask, batch)[0, 1:n_tokens]
    p = before[:-1].gather(1, following[:, None])[:, 0]
    expected = p * (log_changes.exp() - 1)
    actual = changes[:-1].gather(1, following[:, None])[:, 0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# Names and errors


def test_tokens_and_predictions_have_names(llama, batch):
    for number, is_token in enumerate(batch.is_token):
        real = batch.tokens[number][is_token].tolist()
        texts = token_texts(llama, batch, number)
        assert texts == llama.tokenizer.convert_ids_to_tokens(real), "without padding"
    names = vocabulary(llama)
    assert names == llama.tokenizer.convert_ids_to_tokens(list(range(llama.cfg.d_vocab)))


REFUSED = [
    ("Llama", lambda bridge, batch: mean_residual(bridge, [[1, 2]], [2]), "0 to 1"),
    ("Llama", lambda bridge, batch: mean_residual(bridge, [[1, 2]], []), "layers=[]"),
    ("Llama", lambda bridge, batch: mean_residual(bridge, [[1]], [0], skip=1), "more than 1"),
    ("Llama", lambda bridge, batch: neuron_activations(bridge, batch, [(2, 0)]), "0 to 1"),
    ("Llama", lambda bridge, batch: neuron_activations(bridge, batch, []), "neurons"),
    ("Mixtral", lambda bridge, batch: neuron_activations(bridge, batch, [(0, 0)]), "experts"),
]


@pytest.mark.parametrize(("name", "call", "word"), REFUSED)
def test_what_there_is_not_is_named(open_model, batch, name, call, word):
    with pytest.raises(ValueError) as error:
        call(open_model(name), batch)
    assert word in str(error.value)
