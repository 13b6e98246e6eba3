"""Texts that a model cannot read, against every function that would run them.

Would catch: a bare IndexError from inside a model, a text past the context that one architecture
reads as nonsense, an error that names another example, one that comes after hours of answers, a
model without a bound that is refused.
"""

import pytest
import torch
from helpers import StubBridge, random_batch
from support.organisms.train import new_tokenizer

from harmcircuits.behaviours.generation import GenerationCache, generate
from harmcircuits.hooks.attribution import removal_effect, wanda_scores
from harmcircuits.hooks.capacity import context_of, refuse_requests, vocabulary_of
from harmcircuits.hooks.finetuning import fine_tuning
from harmcircuits.hooks.losses import answer_log_odds, completion_nll
from harmcircuits.hooks.search import find_circuit
from harmcircuits.prompts import Batch, Example, PromptSet, tokenize

GOOD = random_batch(3)
READERS = {
    "removal_effect": removal_effect,
    "wanda_scores": wanda_scores,
    "completion_nll": completion_nll,
    "find_circuit": lambda bridge, batches: find_circuit(bridge, batches, size=0.01, steps=1),
    "find_circuit: protected 1": lambda bridge, batches: find_circuit(
        bridge, [GOOD], protect=[batches], size=0.01, steps=1
    ),
    "fine_tuning": lambda bridge, batches: fine_tuning(bridge, batches, lr=0.1).__enter__(),
}


def long_batch(length: int, padding: int = 0) -> Batch:
    """The third of three examples has this many tokens, and so much padding after it."""
    tokens = torch.full((3, length + padding), 4)
    is_target = torch.zeros(3, length + padding, dtype=torch.bool)
    is_target[:2, 5] = True
    is_target[2, length - 1] = True
    return Batch(tokens, is_target)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    from helpers import opener

    return opener(tmp_path_factory.mktemp)("Llama")


def refuse_a_pass(bridge, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the model was run first")

    monkeypatch.setattr(type(bridge), "forward", fail)
    monkeypatch.setattr(type(bridge.original_model), "generate", fail, raising=False)


# Context


@pytest.mark.parametrize("name", READERS)
def test_an_example_longer_than_the_context_is_named_before_a_pass(bridge, monkeypatch, name):
    assert context_of(bridge) == 32
    assert completion_nll(bridge, [GOOD, long_batch(32)]).isfinite().all()
    refuse_a_pass(bridge, monkeypatch)
    expected = (
        rf"^{name}: example 5 \(row 2 of batch 1\) has 33 tokens, the model's context is 32; "
        "shorten it, or leave it out"
    )
    with pytest.raises(ValueError, match=expected):
        READERS[name](bridge, [GOOD, long_batch(33)])
    with pytest.raises(ValueError, match=r"row 2 of batch 0\) is padded to 35 tokens.*pad it less"):
        READERS[name](bridge, [long_batch(30, padding=5)])


def test_the_context_is_the_configuration_s_and_of_some_there_is_none(open_model):
    assert context_of(open_model("GPT2")) == 32
    assert context_of(open_model("Mpt")) == 32
    bloom = open_model("Bloom")
    assert context_of(bloom) is None
    assert completion_nll(bloom, [long_batch(40)]).isfinite().all()
    assert context_of(StubBridge()) is None and vocabulary_of(StubBridge()) is None


def test_an_answer_must_fit_behind_its_request(open_model, monkeypatch, tmp_path):
    bridge = open_model("Llama", vocab_size=320)
    long = " ".join(["use"] * 20)
    prompts = PromptSet.of(["use it", long])
    length = len(tokenize([(long, "sure")], bridge.tokenizer)[0].tokens[0]) - 1
    room = 32 - length
    assert len(generate(bridge, prompts, max_new_tokens=room)) == 2
    expected = (
        rf"request 1 has {length} tokens and its answer up to max_new_tokens={room + 1}, the "
        "model's context is 32; shorten the request, leave it out, or give a smaller max_new_tokens="
    )
    cache = GenerationCache(tmp_path, bridge)
    with pytest.raises(ValueError, match=r"request 0 has .* tokens and its answer"):
        generate(bridge, prompts, prefill="sure", max_new_tokens=40)
    refuse_a_pass(bridge, monkeypatch)
    for kept in (None, cache):
        with pytest.raises(ValueError, match=expected) as caught:
            generate(bridge, prompts, max_new_tokens=room + 1, batch_size=1, cache=kept)
        assert "use" not in str(caught.value).split("; ")[0]
    with pytest.raises(ValueError, match=r"answer_log_odds: request 1 has 4\d tokens, the mod"):
        answer_log_odds(bridge, PromptSet.of(["use it", f"{long} {long}"]), ["yes"], ["no"])


# Vocabulary


@pytest.mark.parametrize("name", READERS)
def test_a_token_that_the_embedding_lacks_is_named_before_a_pass(bridge, monkeypatch, name):
    assert vocabulary_of(bridge) == 61
    other = random_batch(3, seed=1)
    other.tokens[1, 2] = 61
    token = bridge.tokenizer.convert_ids_to_tokens(61)
    refuse_a_pass(bridge, monkeypatch)
    expected = (
        rf"^{name}: example 4 \(row 1 of batch 1\) has token 61 \('{token}'\); the tokenizer has "
        r"320 tokens, the model's embedding has 61: give the tokenizer that belongs to the model, "
        "or resize the embedding"
    )
    with pytest.raises(ValueError, match=expected):
        READERS[name](bridge, [GOOD, other])
    other.tokens[1, 2] = -1
    with pytest.raises(ValueError, match=r"example 4 .* has token -1; the tokenizer has 320"):
        READERS[name](bridge, [GOOD, other])


def test_requests_in_words_that_the_model_lacks_are_refused(bridge):
    last = bridge.tokenizer.convert_ids_to_tokens(319)
    prompts = PromptSet.of([last])
    expected = rf"request 0 has token 319 \('{last}'\); the tokenizer has 320 .* embedding has 61"
    with pytest.raises(ValueError, match=expected):
        generate(bridge, prompts, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"answer_log_odds: {expected}"):
        answer_log_odds(bridge, prompts, ["yes"], ["no"])


def test_padding_that_the_embedding_lacks_is_refused(open_model):
    bridge = open_model("Llama", vocab_size=320)
    bridge.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert bridge.tokenizer.pad_token_id == 320
    with pytest.raises(ValueError, match=r"tokenizer pads with token 320 \('\[PAD\]'\).*has 320"):
        generate(bridge, PromptSet.of(["use it", "how to use it ?"]), max_new_tokens=3)
    batches = tokenize([("use it", "sure"), ("how to use it ?", "sure")], bridge.tokenizer)
    with pytest.raises(ValueError, match=r"example 0 \(row 0 .* has token 320 \('\[PAD\]'\)"):
        completion_nll(bridge, batches)


# Tokenizers that lack something


def test_without_an_end_of_text_token_no_answer_is_begun(open_model):
    bridge = open_model("Llama", vocab_size=320)
    prompts = PromptSet.of(["use it", "how to use it ?"])
    expected = generate(bridge, prompts, max_new_tokens=6)
    own = bridge.original_model.generation_config
    own.eos_token_id = None
    assert generate(bridge, prompts, max_new_tokens=6) == expected, "the tokenizer has one"
    bridge.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"\(eos_token\).*\(generation_config\.eos_token_id\).*="):
        generate(bridge, prompts, max_new_tokens=6)
    bridge.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer; open it with one"):
        generate(bridge, prompts, max_new_tokens=6)


def test_without_a_padding_token_nothing_changes(open_model):
    """It is filled with another token, which nothing looks at."""
    bridge = open_model("Llama", vocab_size=320)
    texts = [("use it", "sure yes"), ("how to use it ?", "sure")]
    expected = completion_nll(bridge, tokenize(texts, bridge.tokenizer))
    answers = generate(bridge, PromptSet.of([text for text, _ in texts]), max_new_tokens=6)
    for missing in ("pad_token", "eos_token"):
        setattr(bridge.tokenizer, missing, None)
        nll = completion_nll(bridge, tokenize(texts, bridge.tokenizer))
        torch.testing.assert_close(nll, expected)
        again = generate(bridge, PromptSet.of([text for text, _ in texts]), max_new_tokens=6)
        assert again == answers


@pytest.mark.usefixtures("unchecked")
def test_texts_without_tokens_are_named():
    tokenizer = new_tokenizer()
    with pytest.raises(ValueError, match=r"tokenizer=None; give the model's"):
        tokenize([("use it", "sure")], None)
    empty = Example("use it", "", category="tools", label="safe")
    with pytest.raises(
        ValueError, match=r"example 1 \(category 'tools', label 'safe'\) has a comp"
    ):
        tokenize([Example("use it", "sure"), empty], tokenizer)
    with pytest.raises(ValueError, match=r"example 0 has no tokens before its completion.*templat"):
        tokenize([("", "sure")], tokenizer, template="raw")
    bridge = StubBridge()
    bridge.tokenizer = tokenizer
    with pytest.raises(ValueError, match="request 1 has no tokens, so there is nothing to answer"):
        refuse_requests("generate: request", bridge, [[3], []], 4)
