"""Own answers are scored as they were generated: the loss is that of the model's own choices.

Would catch: an answer that is stripped and tokenised again (on a byte-level tokenizer the first
token loses its leading space), a prefill or an end-of-text token that counts.
"""

import pytest
import torch
from helpers import ARCHITECTURES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from harmcircuits.behaviours.generation import Sampling, generate
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.prompts import Answer, PromptSet, prompt_ids, tokenize

PROMPTS = PromptSet.of(["how to use it ?", "say it"])
N_TOKENS = 5
SPACED = "{% for m in messages %}{{ m.content }}{% endfor %}:"  # ends without a space


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer in which " a" is one token and "a" another."""
    words = [f"Ġ{letter}" for letter in "abcdefghij"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set, in another order each time
    entries = ["<pad>", "<bos>", "<eos>", *words, *letters]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    merges = [("Ġ", word[1:]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=SPACED,
    )


def loss_while_generating(bridge, prompt: str, prefill: str, template: str) -> float:
    """The mean of -log p of the tokens that transformers chooses, the end of text left out."""
    tokenizer = bridge.tokenizer
    opening = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    context = prompt_ids(prompt, tokenizer, template) + opening
    config = GenerationConfig(
        max_new_tokens=N_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = bridge.original_model.generate(
        input_ids=torch.tensor([context]), generation_config=config
    )
    losses = []
    new_tokens = output.sequences[0, len(context) :]
    for token, logits in zip(new_tokens, output.logits, strict=True):
        if token != tokenizer.eos_token_id:
            losses.append(-logits[0].float().log_softmax(0)[token].item())
    return sum(losses) / len(losses)


def losses_of_answers(bridge, prefill: str, template: str) -> list[float]:
    answers = generate(bridge, PROMPTS, prefill=prefill, template=template, max_new_tokens=N_TOKENS)
    answered = PROMPTS.with_completions(answers)
    batches = tokenize(answered, bridge.tokenizer, template=template, prefill=prefill)
    return completion_nll(bridge, batches).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_generating(open_model, name):
    bridge = open_model(name, vocab_size=320)  # what the tokenizer has
    for prefill, template in (("", "raw"), ("sure", "chat")):
        losses = losses_of_answers(bridge, prefill, template)
        expected = [loss_while_generating(bridge, e.prompt, prefill, template) for e in PROMPTS]
        assert losses == pytest.approx(expected, rel=1e-4), (prefill, template)


@pytest.fixture
def spaced(open_model):
    bridge = open_model("Llama", vocab_size=320)
    bridge.tokenizer = byte_level()
    return bridge


@pytest.mark.parametrize("prefill", ["", "a b"])
def test_leading_spaces_are_kept(spaced, prefill):
    losses = losses_of_answers(spaced, prefill, "chat")
    expected = [loss_while_generating(spaced, e.prompt, prefill, "chat") for e in PROMPTS]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_text_alone_loses_them(spaced):
    """The negative twin: the same text, tokenised again, has other tokens."""
    tokens = tuple(spaced.tokenizer.encode(" a b", add_special_tokens=False))
    generated = PROMPTS[:1].with_completions([Answer("a b", tokens)])
    (as_generated,) = tokenize(generated, spaced.tokenizer)
    (as_text,) = tokenize(generated.with_completions(["a b"]), spaced.tokenizer)
    assert as_generated.tokens[0, -2:].tolist() == list(tokens)
    assert as_text.tokens[0, -2:].tolist() != list(tokens)


def test_samples_have_their_own_tokens(spaced):
    sampling, tokenizer = Sampling(3, temperature=2), spaced.tokenizer
    answers = generate(spaced, PROMPTS, sampling=sampling, max_new_tokens=N_TOKENS)
    for answer in answers:
        assert tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() == answer.text
    assert len({answer.tokens for answer in answers}) > 3
