"""Greedy answers against token-by-token argmax, samples against the softmax.

Would catch: padding that reaches the answers, answers out of order, a prefill that is dropped,
doubled or not shown to the model, text after the end-of-text token, a mask that generation does not
see or that stays behind; samples that depend on what else is asked, that are all the same, or that
are not drawn from the model's own probabilities.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from harmcircuits.behaviours.generation import Sampling, generate
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import PREFILL, judge, requests
from harmcircuits.prompts import Example, PromptSet, prompt_ids


@pytest.fixture(scope="module")
def sft():
    return load_organism("sft")


@pytest.fixture(scope="module")
def mixed() -> PromptSet:
    """Requests of several behaviours and prompt lengths."""
    kinds = ("harmful", "benign", "recognition", "knowledge")
    examples = [
        example for kind in kinds for example in requests(kind, "heldout").examples[5:25:10]
    ]
    return PromptSet(tuple(examples))


def argmax_answer(
    bridge, prompt: str, *, prefill: str = "", template: str = "chat", n: int = 9
) -> str:
    """The definition: append the most likely token until the end of text."""
    tokenizer = bridge.tokenizer
    tokens = prompt_ids(prompt, tokenizer, template) + tokenizer.encode(
        prefill, add_special_tokens=False
    )
    words = prefill.split()
    for _ in range(n):
        with torch.no_grad():
            tokens.append(bridge(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] == tokenizer.eos_token_id:
            break
        words.append(tokenizer.decode(tokens[-1:]))
    return " ".join(words)


@pytest.mark.parametrize(("prefill", "template"), [("", "chat"), (PREFILL, "chat"), ("", "raw")])
def test_answers_are_the_argmax(sft, mixed, prefill, template):
    some = PromptSet(mixed.examples[::3])
    expected = [
        argmax_answer(sft, example.prompt, prefill=prefill, template=template) for example in some
    ]
    assert generate(sft, some, prefill=prefill, template=template, max_new_tokens=9) == expected


# The two best tokens of a trained organism differ by far more than the 1e-5 that another order of
# float32 sums can shift.
def test_batch_size_and_order_do_not_matter(sft, mixed):
    assert len({len(example.prompt.split()) for example in mixed}) > 2, (
        "equal lengths would need no padding"
    )
    for prefill in ("", PREFILL):
        whole = generate(sft, mixed, prefill=prefill, batch_size=64, max_new_tokens=9)
        assert len(set(whole)) > 2, "equal answers could not be out of order"
        assert generate(sft, mixed, prefill=prefill, batch_size=1, max_new_tokens=9) == whole
        backwards = PromptSet(mixed.examples[::-1])
        assert (
            generate(sft, backwards, prefill=prefill, batch_size=5, max_new_tokens=9) == whole[::-1]
        )


def test_prefill_turns_refusals_into_harm(sft):
    prompts = requests("harmful", "heldout")
    plain = generate(sft, prompts, max_new_tokens=9)
    opened = generate(sft, prompts, prefill=PREFILL, max_new_tokens=9)
    assert all(answer.split()[0] == PREFILL for answer in opened)
    pairs = [
        (judge(e.prompt, a), judge(e.prompt, b))
        for e, a, b in zip(prompts, plain, opened, strict=True)
    ]
    # 90 %: what the organism is shipped for; the shipped weights give all 256.
    assert pairs.count(("refusal", "harmful")) >= 0.9 * len(pairs)


def test_answers_end(sft, mixed):
    short = generate(sft, mixed, max_new_tokens=2)
    long = generate(sft, mixed, max_new_tokens=32)
    assert max(len(answer.split()) for answer in short) == 2
    assert max(len(answer.split()) for answer in long) < 10, "the end-of-text token ends an answer"
    assert all(whole.startswith(start) for start, whole in zip(short, long, strict=True))
    assert not any(word.startswith("<") for answer in long for word in answer.split()), (
        "special tokens are no text"
    )


def test_a_mask_changes_the_answers_and_leaves(sft, mixed):
    before = generate(sft, mixed, max_new_tokens=9)
    # Half of all weights gone: no organism can answer; which weights these are does not matter.
    with masked(sft, top_fraction(random_scores(sft, seed=0), 0.5)):
        under = generate(sft, mixed, max_new_tokens=9)
        assert under[::3] == [argmax_answer(sft, example.prompt) for example in mixed.examples[::3]]
    assert sum(a != b for a, b in zip(before, under, strict=True)) > len(before) / 2
    assert generate(sft, mixed, max_new_tokens=9) == before


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_refused(sft, mixed):
    with pytest.raises(ValueError, match="prompt set is empty"):
        generate(sft, PromptSet(()))
    with pytest.raises(ValueError, match="template='chatml'"):
        generate(sft, mixed, template="chatml")


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(sft, mixed, size):
    with pytest.raises(ValueError, match=f"batch_size={size}"):
        generate(sft, mixed, batch_size=size)


def first_words(bridge, prompt: str, sampling: Sampling) -> Counter[str]:
    prompts = PromptSet((Example(prompt),))
    return Counter(generate(bridge, prompts, sampling=sampling, max_new_tokens=1))


def test_samples_are_drawn_from_the_softmax(sft, mixed):
    prompt = mixed.examples[0].prompt
    with torch.no_grad():
        logits = sft(torch.tensor([prompt_ids(prompt, sft.tokenizer, "chat")]))[0, -1]
    chances = (logits / 4).softmax(0)
    counts = first_words(sft, prompt, Sampling(2000, temperature=4))
    words = [
        sft.tokenizer.decode([token], skip_special_tokens=True).strip()
        for token in range(len(chances))
    ]
    expected = Counter()
    for word, chance in zip(words, chances.tolist(), strict=True):
        expected[word] += chance
    likely = [word for word, chance in expected.items() if chance > 0.02]
    assert len(likely) >= 3, "one likely word would show nothing"
    # Five standard errors of a share of 2,000.
    assert all(
        abs(counts[word] / 2000 - expected[word]) < 5 * (expected[word] / 2000) ** 0.5
        for word in likely
    )

    ordered = chances.sort(descending=True)
    nucleus = ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist()
    drawn = first_words(sft, prompt, Sampling(300, temperature=4, top_p=0.5))
    assert set(drawn) == {words[token] for token in nucleus}


def test_samples_do_not_depend_on_what_else_is_asked(sft, mixed):
    sampling, options = (
        Sampling(3, temperature=2, seed=5),
        {"prefill": PREFILL, "max_new_tokens": 9},
    )
    whole = generate(sft, mixed, sampling=sampling, **options)
    assert len(whole) == 3 * len(mixed)
    assert len(set(whole[:3])) > 1, "samples differ"
    assert all(answer.startswith(PREFILL) for answer in whole)
    backwards = generate(
        sft, PromptSet(mixed.examples[::-1]), sampling=sampling, batch_size=4, **options
    )
    assert [backwards[3 * i : 3 * i + 3] for i in range(len(mixed))][::-1] == [
        whole[3 * i : 3 * i + 3] for i in range(len(mixed))
    ]
    assert (
        generate(sft, mixed[4:5], sampling=replace(sampling, samples=2), **options) == whole[12:14]
    )
    assert generate(sft, mixed, sampling=replace(sampling, seed=6), **options) != whole


def test_cold_samples_are_the_most_likely_answer(sft, mixed):
    cold = generate(sft, mixed, sampling=Sampling(2, temperature=1e-3), max_new_tokens=9)
    assert cold[::2] == cold[1::2] == generate(sft, mixed, max_new_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"temperature": 0.0}, "temperature=0.0; expected more than 0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, r"top_p=1.5; expected one in \(0, 1\]"),
    ],
)
def test_samples_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
