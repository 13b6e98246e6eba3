"""Greedy answers against token-by-token argmax, samples against the softmax, kept against made anew.

Would catch: padding that reaches the answers, answers out of order, a prefill that is dropped or
scored, samples that depend on what else is asked, answers of a masked model kept as its own.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from harmcircuits.behaviours import generation
from harmcircuits.behaviours.generation import GenerationCache, Sampling, generate
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import PREFILL, requests
from harmcircuits.prompts import PromptSet, prompt_ids, tokenize


@pytest.fixture(scope="module")
def sft():
    return load_organism("sft")


@pytest.fixture(scope="module")
def mixed() -> PromptSet:
    """Requests of several behaviours and prompt lengths."""
    examples = []
    for kind in ("harmful", "benign", "recognition", "knowledge"):
        examples += requests(kind, "heldout").examples[5:25:10]
    assert len({len(example.prompt.split()) for example in examples}) > 2, "or none is padded"
    return PromptSet(tuple(examples))


def answered(bridge, prompts: PromptSet, **options) -> list[str]:
    answers = generate(bridge, prompts, **{"max_new_tokens": 9, **options})
    return [answer.text for answer in answers]


def argmax_answer(bridge, prompt: str, *, prefill: str = "", template: str = "chat") -> str:
    """The definition: append the most likely token until the end of text."""
    tokenizer = bridge.tokenizer
    tokens = prompt_ids(prompt, tokenizer, template)
    tokens += tokenizer.encode(prefill, add_special_tokens=False)
    words = prefill.split()
    for _ in range(9):
        with torch.no_grad():
            tokens.append(bridge(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] == tokenizer.eos_token_id:
            break
        words.append(tokenizer.decode(tokens[-1:]))
    return " ".join(words)


@pytest.mark.parametrize(("prefill", "template"), [("", "chat"), (PREFILL, "chat"), ("", "raw")])
def test_answers_are_the_argmax(sft, mixed, prefill, template):
    some, options = PromptSet(mixed.examples[::3]), {"prefill": prefill, "template": template}
    expected = [argmax_answer(sft, example.prompt, **options) for example in some]
    assert answered(sft, some, **options) == expected
    short = answered(sft, some, max_new_tokens=2, **options)
    assert short == [" ".join(text.split()[: 2 + len(prefill.split())]) for text in expected]
    assert "<" not in "".join(expected), "special tokens are no text"


# The two best tokens of a trained organism differ by far more than the 1e-5 that another order of
# float32 sums can shift.
def test_batch_size_order_and_company_do_not_matter(sft, mixed):
    backwards, expected = PromptSet(mixed.examples[::-1]), []
    for prefill in ("", PREFILL):
        whole = answered(sft, mixed, prefill=prefill, batch_size=1)
        assert len(set(whole)) > 2, "equal answers could not be out of order"
        assert answered(sft, backwards, prefill=prefill, batch_size=5) == whole[::-1]
        expected += whole
    prefills = [""] * len(mixed) + [PREFILL] * len(mixed)
    both = PromptSet(mixed.examples * 2)
    assert answered(sft, both, prefill=prefills, batch_size=64) == expected


def test_samples_are_drawn_from_the_softmax(sft, mixed):
    prompt = mixed.examples[0].prompt
    tokens = torch.tensor([prompt_ids(prompt, sft.tokenizer, "chat")])
    with torch.no_grad():
        logits = sft(tokens)[0, -1]
    chances = (logits / 4).softmax(0)
    decode = sft.tokenizer.decode
    words = [decode([n], skip_special_tokens=True).strip() for n in range(len(chances))]
    expected = Counter()
    for word, chance in zip(words, chances.tolist(), strict=True):
        expected[word] += chance
    likely = {word: chance for word, chance in expected.items() if chance > 0.02}
    assert len(likely) >= 3, "one likely word would show nothing"
    drawn = answered(sft, mixed[:1], sampling=Sampling(2000, temperature=4), max_new_tokens=1)
    counts = Counter(drawn)
    for word, chance in likely.items():
        five_standard_errors = 5 * (chance / 2000) ** 0.5
        assert abs(counts[word] / 2000 - chance) < five_standard_errors

    ordered = chances.sort(descending=True)
    nucleus = ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1]
    sampling = Sampling(300, temperature=4, top_p=0.5)
    drawn = answered(sft, mixed[:1], sampling=sampling, max_new_tokens=1)
    assert set(drawn) == {words[token] for token in nucleus.tolist()}


def test_samples_do_not_depend_on_what_else_is_asked(sft, mixed):
    sampling = Sampling(3, temperature=2, seed=5)
    whole = answered(sft, mixed, prefill=PREFILL, sampling=sampling)
    of_request = [whole[start : start + 3] for start in range(0, len(whole), 3)]
    assert len(of_request) == len(mixed)
    assert len(set(whole[:3])) > 1, "samples differ"
    two = replace(sampling, samples=2)
    assert answered(sft, mixed[4:5], prefill=PREFILL, sampling=two) == of_request[4][:2]
    other = replace(sampling, seed=6)
    assert answered(sft, mixed, prefill=PREFILL, sampling=other) != whole
    cold = answered(sft, mixed, sampling=Sampling(2, temperature=1e-3))
    assert cold[::2] == cold[1::2] == answered(sft, mixed)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        Sampling(3, temperature=0.0)


# Kept on disk


@pytest.fixture
def calls(monkeypatch):
    """How many answers were made anew, batch by batch."""
    made = []
    really = generation._continued

    def counted(bridge, contexts, *options):
        made.append(len(contexts))
        return really(bridge, contexts, *options)

    monkeypatch.setattr(generation, "_continued", counted)
    return made


def test_answers_are_made_once_and_stay_in_order(sft, mixed, tmp_path, calls):
    options = {"max_new_tokens": 9, "batch_size": 5, "sampling": Sampling(2, temperature=2)}
    expected = generate(sft, mixed, **options)
    n_made = sum(calls)
    cache = GenerationCache(tmp_path, sft)
    assert generate(sft, mixed[:3], cache=cache, **options) == expected[:6]
    for again in (cache, GenerationCache(tmp_path, sft)):
        assert generate(sft, mixed, cache=again, **options) == expected
        assert sum(calls) == 2 * n_made

    opened = generate(sft, mixed, prefill="sure", cache=cache, **options)
    assert all(answer.text.startswith("sure") for answer in opened)
    for other in ({"max_new_tokens": 3}, {"template": "raw"}, {"sampling": None}):
        generate(sft, mixed[:1], cache=cache, **{**options, **other})
    assert len(list(tmp_path.iterdir())) == 4, "a file for each setting"


def test_only_the_model_as_it_was_is_stored(tmp_path, calls):
    model = small_model("sft")
    bridge, prompts = model.bridge, model.behaviours["harmful"].prompts("heldout")[:4]
    cache = GenerationCache(tmp_path, bridge)
    own = generate(bridge, prompts, max_new_tokens=9, cache=cache)
    # Half of all weights gone: no organism can answer; which weights these are does not matter.
    with masked(bridge, top_fraction(random_scores(bridge, seed=0), 0.5)):
        under = generate(bridge, prompts, max_new_tokens=9, cache=cache)
        assert under[0].text == argmax_answer(bridge, prompts.examples[0].prompt)
    assert sum(a != b for a, b in zip(own, under, strict=True)) > 2

    def silence(value, hook):
        return torch.zeros_like(value)

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", silence)]):
        assert generate(bridge, prompts, max_new_tokens=9, cache=cache) != own
    assert len(calls) == 3
    assert generate(bridge, prompts, max_new_tokens=9, cache=cache) == own
    assert len(calls) == 3


# Own answers are scored as they were generated: on a byte-level tokenizer, an answer that is
# stripped and tokenised again loses the leading space of its first token.

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


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
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
