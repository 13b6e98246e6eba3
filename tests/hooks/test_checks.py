"""Errors for texts that a model cannot read, and for numbers that are not finite.

Would catch: a score, loss or answer of NaN that looks like any other, an error about another text.
"""

import math
from functools import partial

import pytest
import torch
from helpers import random_batch, random_mask

from harmcircuits.batches import Batch, tokenize
from harmcircuits.behaviours.generation import generate
from harmcircuits.hooks.checks import NotFiniteError, context_of
from harmcircuits.hooks.finetuning import fine_tuning
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.inspection import mean_residual
from harmcircuits.hooks.losses import answer_log_odds, completion_nll, kl_under
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.patching import activation_patching
from harmcircuits.hooks.weights import named_weights
from harmcircuits.prompts import PromptSet
from harmcircuits.search.attribution import (
    removal_effect,
    snip_scores,
    token_contributions,
    token_price,
    wanda_scores,
)
from harmcircuits.search.circuit import find_circuit

GOOD = random_batch(3, seed=1)
GOOD.tokens[GOOD.tokens == 7] = 4  # a test spoils token 7
WEIGHT = "blocks.1.mlp.in.weight"
READS_ALL = {"vocab_size": 320}  # as many as the tests' tokenizer has
TEXTS = PromptSet.of(["use it", "clean it", "how to use it ?"])

# Functions that read batches, each as the same call.
READERS = {
    "removal_effect": removal_effect,
    "snip_scores": snip_scores,
    "token_price": token_price,
    "wanda_scores": wanda_scores,
    "completion_nll": completion_nll,
    "kl_under": lambda bridge, batches: kl_under(bridge, small_mask(bridge), batches),
    "token_contributions": lambda bridge, batches: token_contributions(
        bridge, small_mask(bridge), batches
    ),
    "activation_patching": lambda bridge, batches: activation_patching(
        bridge, small_mask(bridge), batches[-1], parts=["mlp"], positions=[]
    ),
    "find_circuit": lambda bridge, batches: find_circuit(bridge, batches, size=0.01, steps=1),
    "fine_tuning": lambda bridge, batches: train(bridge, batches),
}
small_mask = partial(random_mask, fraction=0.01)


def train(bridge, batches) -> None:
    with fine_tuning(bridge, batches, lr=0.1) as run:
        run.until(2)


def long_batch(length: int) -> Batch:
    """Three examples, of which the third has this many tokens."""
    is_target = torch.zeros(3, length, dtype=torch.bool)
    is_target[:2, 5] = True
    is_target[2, length - 1] = True
    return Batch(torch.full((3, length), 4), is_target)


def test_an_unreadable_text_is_named_before_a_pass(llama, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the model was run first")

    assert completion_nll(llama, [GOOD, long_batch(32)]).isfinite().all()
    unknown = random_batch(3, seed=2)
    unknown.tokens[2, 2] = 61
    monkeypatch.setattr(type(llama), "forward", fail)
    for odd, words in ((long_batch(33), ["context is 32"]), (unknown, ["token 61", "has 61"])):
        for name, read in READERS.items():
            with pytest.raises(ValueError) as error:
                read(llama, [GOOD, odd])
            index = "example 2" if name == "activation_patching" else "example 5 (row 2 of batch 1)"
            assert all(word in str(error.value) for word in [name, index, *words])


def test_the_context_is_that_of_the_configuration_if_it_has_one(open_model):
    assert context_of(open_model("GPT2")) == context_of(open_model("Mpt")) == 32
    bloom = open_model("Bloom")
    assert context_of(bloom) is None
    assert completion_nll(bloom, [long_batch(40)]).isfinite().all()


def test_requests_that_cannot_be_read_or_answered_are_named(open_model, llama):
    bridge, padded, endless = (open_model("Llama", **READS_ALL) for _ in range(3))
    length = len(tokenize([(" ".join(["use"] * 20), "sure")], bridge.tokenizer)[0].tokens[0]) - 1
    prompts = PromptSet.of(["use it", " ".join(["use"] * 20)])
    assert len(generate(bridge, prompts, max_new_tokens=32 - length)) == 2
    padded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    endless.original_model.generation_config.eos_token_id = None
    endless.tokenizer.eos_token = None
    unreadable = PromptSet.of([llama.tokenizer.convert_ids_to_tokens(319)])
    far = PromptSet.of(["use it", " ".join(["use"] * 60)])
    calls = [
        (lambda: generate(bridge, prompts, max_new_tokens=33 - length), "request 1 has 33 tokens"),
        (lambda: answer_log_odds(bridge, far, ["yes"], ["no"]), "request 1 has 6"),
        (lambda: generate(llama, unreadable, max_new_tokens=3), "request 0 has token 319"),
        (lambda: generate(padded, TEXTS, max_new_tokens=3), "pads with token 320"),
        (lambda: generate(endless, TEXTS, max_new_tokens=3), "eos_token"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_without_a_padding_token_nothing_changes(open_model):
    """Another token is the padding, and no text attends to it."""
    bridge = open_model("Llama", **READS_ALL)
    texts = [("use it", "sure yes"), ("how to use it ?", "sure")]
    expected = completion_nll(bridge, tokenize(texts, bridge.tokenizer))
    answers = generate(bridge, TEXTS, max_new_tokens=6)
    for missing in ("pad_token", "eos_token"):
        setattr(bridge.tokenizer, missing, None)
        nll = completion_nll(bridge, tokenize(texts, bridge.tokenizer))
        torch.testing.assert_close(nll, expected)
        assert generate(bridge, TEXTS, max_new_tokens=6) == answers


def test_every_reader_refuses_a_weight_that_is_not_finite(llama):
    named_weights(llama)[WEIGHT].data[2, 3] = math.nan
    for name, read in READERS.items():
        with pytest.raises(ValueError) as error:
            read(llama, [GOOD, random_batch(3, seed=2)])
        place = WEIGHT if name == "wanda_scores" else "example 0 (row 0"
        assert place in str(error.value), name


def test_the_example_and_the_loss_are_named(llama):
    """Of six examples the last alone has a token whose embedding is infinite."""
    spoiled = Batch(GOOD.tokens.clone(), GOOD.is_target)
    spoiled.tokens[2, 1] = 7
    llama.original_model.get_input_embeddings().weight.data[7] = math.inf
    for read in (completion_nll, removal_effect, token_price):
        with pytest.raises(NotFiniteError, match="completion_loss is nan") as error:
            read(llama, [GOOD, spoiled])
        assert "example 5 (row 2 of batch 1)" in str(error.value)
        assert error.value.index == 5
    with pytest.raises(NotFiniteError, match=r"mild|protected, from"):
        find_circuit(llama, [GOOD], {"mild": [GOOD, spoiled]}, size=0.01, steps=1)


def test_a_gradient_that_is_not_finite_is_named_by_its_matrix(open_model):
    bridge = open_model("Llama", dtype=torch.float16)

    def enormous(bridge, batch):
        return 1e6 * completion_loss(bridge, batch)

    with pytest.raises(NotFiniteError, match=r"gradient of enormous at blocks\.") as error:
        removal_effect(bridge, [GOOD], enormous)
    assert "65,504" in str(error.value)


def test_answers_log_odds_and_residuals_of_nan_name_the_text(open_model):
    sampling = Sampling(samples=2, temperature=0.5, seed=1)
    bridge = open_model("Llama", **READS_ALL)
    rows = [bridge.tokenizer.encode(text, add_special_tokens=False) for text in ("use", "how to")]
    token = bridge.tokenizer.convert_tokens_to_ids("how")
    bridge.original_model.get_input_embeddings().weight.data[token] = math.nan
    calls = [
        (lambda: generate(bridge, TEXTS, max_new_tokens=5), 2),
        (lambda: generate(bridge, TEXTS, sampling=sampling, max_new_tokens=5), 2),
        (lambda: answer_log_odds(bridge, TEXTS, ["yes"], ["no"]), 2),
        (lambda: mean_residual(bridge, rows, [1]), 1),
    ]
    for call, index in calls:
        with pytest.raises(NotFiniteError) as error:
            call()
        assert f" {index}: the model's output is not finite" in str(error.value)
    generate(bridge, TEXTS[:2], sampling=sampling, max_new_tokens=5)
