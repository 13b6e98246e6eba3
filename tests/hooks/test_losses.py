"""Losses of a model on texts, against closed forms, brute force and the loss of transformers.

Would catch: a likelihood over prompt tokens, KL in the wrong direction, log-odds at the padding.
"""

import math

import oracle
import pytest
import torch
from helpers import random_batch, random_mask

from harmcircuits.batches import prompt_ids
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.losses import answer_log_odds, completion_nll, kl_under, perplexity
from harmcircuits.hooks.weights import model_fingerprint, named_weights
from harmcircuits.organisms.shipped import load_organism
from harmcircuits.organisms.world import PERMISSIONS, requests
from harmcircuits.search.circuit import find_circuit

BATCHES = [random_batch(), random_batch(2, 7, seed=1)]
YES, NO = PERMISSIONS["benign"], PERMISSIONS["harmful"]


def test_completion_nll_is_the_loss_of_transformers(llama):
    """Row by row, unpadded, with every label but the targets' ignored."""
    expected = []
    for tokens, is_target in oracle.examples(BATCHES):
        labels = tokens.where(is_target, -100)
        expected.append(llama.original_model(input_ids=tokens, labels=labels).loss.item())
    nll = completion_nll(llama, BATCHES)
    assert not nll.requires_grad
    # float32 sums in another order
    torch.testing.assert_close(nll, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_perplexity_is_that_of_all_tokens(llama):
    batch = random_batch(3, 9)
    row = perplexity(llama, [batch], {"model": "x"})
    nll = completion_nll(llama, [batch]).mean().item()
    assert row.mean == pytest.approx(math.exp(nll), rel=1e-5)
    assert row.low < row.mean < row.high


def test_kl_by_hand(llama, open_model):
    """In float64, against a second copy of the model whose weights are zeroed for good.

    Row by row, without padding.
    """
    mask = random_mask(llama, 0.1)
    pruned = open_model("Llama")
    with torch.no_grad():
        for name, weight in named_weights(pruned).items():
            weight[mask.dense(name)] = 0
    forward, reverse = [], []
    for tokens, _ in oracle.examples(BATCHES):
        p, q = (model(tokens)[0].detach().double().softmax(-1) for model in (llama, pruned))
        forward.append((p * (p / q).log()).sum(-1).mean())
        reverse.append((q * (q / p).log()).sum(-1).mean())
    expected, reversed_kl = torch.stack(forward), torch.stack(reverse)
    divergence = kl_under(llama, mask, BATCHES).double()
    # float32 log-probabilities carry 1e-6 each; the divergences are about 0.1.
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0.01).all()
    assert not torch.allclose(expected, reversed_kl, rtol=1e-2), "the direction must show"


@pytest.mark.parametrize("prefill", ["", "the"])
def test_log_odds_by_definition(prefill):
    """Each request alone, unpadded, in float64; over more requests than one pass of 64 holds."""
    sft = load_organism("sft")
    prompts = requests("recognition", "heldout")[:70]
    lengths = {len(example.prompt.split()) for example in prompts.examples[62:68]}
    assert len(lengths) > 1, "equal lengths need no padding"
    odds = answer_log_odds(sft, prompts, YES, NO, prefill=prefill)
    assert odds.shape == (70,)
    vocabulary = sft.tokenizer.get_vocab()
    for index in (0, 1, 2, 5, 62, 63, 64, 65, 69):
        tokens = prompt_ids(prompts.examples[index].prompt, sft.tokenizer, "chat")
        tokens += [vocabulary[word] for word in prefill.split()]
        p = sft(torch.tensor([tokens]))[0, -1].detach().double().softmax(-1)
        yes, no = (sum(p[vocabulary[word]].item() for word in words) for words in (YES, NO))
        # Log-odds of order 10 from float32 logits: 1e-6 relative each, over four layers.
        assert odds[index].item() == pytest.approx(math.log(yes / no), abs=1e-4)


def test_dropout_changes_no_measurement(open_model):
    """After training, a model is often left in train mode."""
    bridge = open_model("GPT2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    batches, mask = [random_batch(6)], WeightMask({}, {}, Source(model_fingerprint(bridge), "test"))
    expected = completion_nll(bridge, batches)
    options = {"protect": [[random_batch(6, seed=5)]], "size": 0.01, "steps": 5}
    circuit = find_circuit(bridge, batches, **options)
    for module in (bridge, bridge.original_model):
        module.train()
    assert torch.equal(completion_nll(bridge, batches), expected)
    assert kl_under(bridge, mask, batches).abs().max() < 1e-6
    assert find_circuit(bridge, batches, **options) == circuit
    assert bridge.original_model.training
