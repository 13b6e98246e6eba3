"""Greedy answers against token-by-token argmax, samples against the softmax, kept against made anew.

Would catch: padding that reaches the answers, answers out of order, a prefill that is dropped or
scored, samples that depend on what else is asked, answers of a masked model kept as its own, hook
points that change what is said.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import ARCHITECTURES, random_batch, random_mask, small_model, write_byte_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoTokenizer

from harmcircuits.batches import prompt_ids, tokenize
from harmcircuits.behaviours import generation
from harmcircuits.behaviours.generation import GenerationCache, generate
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.bridge import unhooked
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.organisms.shipped import load_organism
from harmcircuits.organisms.world import PREFILL, requests
from harmcircuits.prompts import PromptSet
from harmcircuits.search.attribution import random_scores


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


def greedy(bridge, prompt: str, *, prefill: str = "", template: str = "chat"):
    """The definition: append the most likely token until the end of text; the mean of -log p."""
    tokenizer, losses = bridge.tokenizer, []
    answer = tokenizer.encode(prefill, add_special_tokens=False)
    for _ in range(9):
        tokens = prompt_ids(prompt, tokenizer, template) + answer
        with torch.no_grad():
            log_chances = bridge(torch.tensor([tokens]))[0, -1].log_softmax(0)
        token = log_chances.argmax().item()
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
        losses.append(-log_chances[token].item())
    return tokenizer.decode(answer).strip(), sum(losses) / len(losses)


@pytest.mark.parametrize(("prefill", "template"), [("", "chat"), (PREFILL, "chat"), ("", "raw")])
def test_answers_are_the_argmax(sft, mixed, prefill, template):
    some, options = PromptSet(mixed.examples[::3]), {"prefill": prefill, "template": template}
    expected = [greedy(sft, example.prompt, **options)[0] for example in some]
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
    tokens = torch.tensor([prompt_ids(mixed.examples[0].prompt, sft.tokenizer, "chat")])
    with torch.no_grad():
        chances = (sft(tokens)[0, -1] / 4).softmax(0)
    decode = sft.tokenizer.decode
    words = [decode([n], skip_special_tokens=True).strip() for n in range(len(chances))]
    expected = Counter()
    for word, chance in zip(words, chances.tolist(), strict=True):
        expected[word] += chance

    drawn = answered(sft, mixed[:1], sampling=Sampling(2000, temperature=4), max_new_tokens=1)
    counts = Counter(drawn)
    likely = {word: chance for word, chance in expected.items() if chance > 0.02}
    assert len(likely) >= 3, "one likely word would show nothing"
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


@pytest.fixture
def calls(monkeypatch):
    """How many answers were made anew, batch by batch."""
    made = []
    really = generation.continuations

    def counted(bridge, contexts, *options):
        made.append(len(contexts))
        return really(bridge, contexts, *options)

    monkeypatch.setattr(generation, "continuations", counted)
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


@contextmanager
def global_hook(bridge):
    def flip(module, args, output):
        return output.flip(-1) if isinstance(module, nn.Linear) else None

    handle = register_module_forward_hook(flip)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(bridge):
    """On the bridge's own component, which generation without hook points would go round."""
    component = bridge.original_model.model.layers[0].mlp
    # Set as an attribute, it would replace that of the module that the component wraps.
    vars(component)["forward"] = lambda *args, **options: torch.zeros_like(args[0])
    try:
        yield
    finally:
        del vars(component)["forward"]


def test_only_the_model_as_it_was_is_stored(tmp_path, calls):
    model = small_model("sft")
    bridge, prompts = model.bridge, model.behaviours["harmful"].prompts("heldout")[:4]
    cache = GenerationCache(tmp_path, bridge)
    own = generate(bridge, prompts, max_new_tokens=9, cache=cache)
    # Half of all weights gone: no organism can answer; which weights these are does not matter.
    with masked(bridge, top_fraction(random_scores(bridge, seed=0), 0.5)):
        under = generate(bridge, prompts, max_new_tokens=9, cache=cache)
        assert under[0].text == greedy(bridge, prompts.examples[0].prompt)[0]
    assert sum(a != b for a, b in zip(own, under, strict=True)) > 2

    def silence(value, hook):
        return torch.zeros_like(value)

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", silence)]):
        assert generate(bridge, prompts, max_new_tokens=9, cache=cache) != own
    for change in (global_hook, replaced_forward):
        with change(bridge):
            assert generate(bridge, prompts, max_new_tokens=9, cache=cache) != own
    assert len(calls) == 5
    assert generate(bridge, prompts, max_new_tokens=9, cache=cache) == own
    assert len(calls) == 5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_hook_points_a_model_is_the_same_function(open_model, name):
    bridge, tokens = open_model(name), random_batch().tokens
    modules = list(bridge.original_model.modules())
    with masked(bridge, random_mask(bridge)), torch.no_grad():
        expected = bridge(tokens)
        with unhooked(bridge):
            logits = bridge.original_model(tokens).logits
            assert len(list(bridge.original_model.modules())) < len(modules)
    assert list(bridge.original_model.modules()) == modules
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    bound = 16 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("prefill", ["", "a b"])
def test_own_answers_are_scored_as_they_were_generated(open_model, tmp_path, prefill):
    """Tokenised again, the text of a byte-level tokenizer gives other tokens."""
    write_byte_model(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}:")
    bridge = open_model("Llama", vocab_size=320)
    bridge.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge.tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})
    prompts = PromptSet.of(["how to use it ?", "say it"])
    answers = generate(bridge, prompts, prefill=prefill, max_new_tokens=9)
    batches = tokenize(prompts.with_completions(answers), bridge.tokenizer, prefill=prefill)
    expected = [greedy(bridge, example.prompt, prefill=prefill)[1] for example in prompts]
    assert completion_nll(bridge, batches).tolist() == pytest.approx(expected, rel=1e-4)

    as_text = prompts.with_completions([answer.text for answer in answers])
    again = tokenize(as_text, bridge.tokenizer, prefill=prefill)
    assert again[0].tokens.tolist() != batches[0].tokens.tolist(), "the test must be able to fail"


def test_settings_of_the_model_bend_no_answer_and_the_cache_sees_what_does(tmp_path):
    model = small_model("sft")
    bridge = model.bridge
    prompts = model.behaviour("harmful").prompts("heldout")[:4]
    cache = GenerationCache(tmp_path, bridge)

    def answers(cache=None):
        return generate(bridge, prompts, prefill="sure", max_new_tokens=9, cache=cache)

    first = answers(cache)
    own = bridge.original_model.generation_config
    own.no_repeat_ngram_size, own.min_new_tokens = 1, 8
    assert answers() == first
    own.no_repeat_ngram_size = own.min_new_tokens = None

    end = own.eos_token_id
    own.eos_token_id = [end, first[0].tokens[3]]
    assert answers(cache) == answers() != first
    own.eos_token_id = end

    block = bridge.original_model.model.layers[1]
    hook = block.register_forward_hook(lambda _, __, output: output.flip(-1))
    assert answers(cache) == answers() != first
    hook.remove()

    # As a template that prints the date: the same request in other tokens.
    template = bridge.tokenizer.chat_template
    bridge.tokenizer.chat_template = template + "sure"
    fresh = answers()
    bridge.tokenizer.chat_template = template
    assert answers(cache) == first
    bridge.tokenizer.chat_template = template + "sure"
    assert answers(cache) == fresh
    bridge.tokenizer.chat_template = template
