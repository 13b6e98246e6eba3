"""What a model makes of texts, against closed forms, brute force and transformers' own loss.

Would catch: a likelihood over prompt tokens, KL in the wrong direction, log-odds at the padding.
"""

import math

import pytest
import torch
from helpers import random_batch

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.losses import answer_log_odds, completion_nll, kl_under, perplexity
from harmcircuits.hooks.weights import named_weights
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import ALLOWED, requests
from harmcircuits.prompts import prompt_ids

BATCHES = [random_batch(), random_batch(2, 7, seed=1)]
YES, NO = ALLOWED["benign"], ALLOWED["harmful"]


@pytest.fixture(scope="module")
def sft():
    return load_organism("sft")


def test_completion_nll_is_the_loss_of_transformers(llama):
    """Row by row, unpadded, with every label but the targets' ignored."""
    expected = []
    for batch in BATCHES:
        rows = zip(batch.tokens, batch.is_target, batch.is_token, strict=True)
        for tokens, is_target, is_token in rows:
            tokens, is_target = tokens[is_token][None], is_target[is_token][None]
            labels = tokens.where(is_target, -100)
            with torch.no_grad():
                loss = llama.original_model(input_ids=tokens, labels=labels).loss
            expected.append(loss.item())
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
    assert (row.metric, row.labels, row.n) == ("perplexity", {"model": "x"}, 3)


def test_kl_by_hand(llama, open_model):
    """In float64, against a second copy of the model whose weights are zeroed for good.

    Row by row, without padding.
    """
    mask = top_fraction(random_scores(llama, seed=0), 0.1)
    pruned = open_model("Llama")
    with torch.no_grad():
        for name, weight in named_weights(pruned).items():
            weight[mask.dense(name)] = 0
    forward, reverse = [], []
    for batch in BATCHES:
        for tokens, is_token in zip(batch.tokens, batch.is_token, strict=True):
            with torch.no_grad():
                p = llama(tokens[is_token][None])[0].double().softmax(-1)
                q = pruned(tokens[is_token][None])[0].double().softmax(-1)
            forward.append((p * (p / q).log()).sum(-1).mean())
            reverse.append((q * (q / p).log()).sum(-1).mean())
    expected, other_way = torch.stack(forward), torch.stack(reverse)
    divergence = kl_under(llama, mask, BATCHES).double()
    # float32 log-probabilities carry 1e-6 each; the divergences are about 0.1.
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0.01).all()
    assert not torch.allclose(expected, other_way, rtol=1e-2), "the direction must show"


def test_log_odds_by_definition(sft):
    """Each request alone, unpadded, in float64; over more requests than one pass of 64 holds."""
    prompts = requests("recognition", "heldout")[:70]
    lengths = {len(example.prompt.split()) for example in prompts.examples[62:68]}
    assert len(lengths) > 1, "equal lengths would need no padding"
    odds = answer_log_odds(sft, prompts, YES, NO)
    assert odds.shape == (70,)
    vocabulary = sft.tokenizer.get_vocab()
    for index in (0, 1, 2, 5, 62, 63, 64, 65, 69):
        tokens = prompt_ids(prompts.examples[index].prompt, sft.tokenizer, "chat")
        with torch.no_grad():
            p = sft(torch.tensor([tokens]))[0, -1].double().softmax(-1)
        yes = sum(p[vocabulary[word]].item() for word in YES)
        no = sum(p[vocabulary[word]].item() for word in NO)
        # Log-odds of order 10 from float32 logits: 1e-6 relative each, over four layers.
        assert odds[index].item() == pytest.approx(math.log(yes / no), abs=1e-4)
