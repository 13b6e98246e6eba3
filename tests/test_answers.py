"""Greedy answers against token-by-token argmax.

Would catch: padding that reaches the answers, answers out of order, a prefill that is dropped, doubled or not shown to the
model, sampling, text after the end-of-text token, a mask that generation does not see or that stays behind.
"""

import pytest
import torch

from harmcircuits.answers import greedy_answers
from harmcircuits.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.masks import top_fraction
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import PREFILL, judge, requests
from harmcircuits.prompts import PromptSet, prompt_ids


@pytest.fixture(scope="module")
def sft():
    return load_organism("sft")


@pytest.fixture(scope="module")
def mixed() -> PromptSet:
    """Requests of several behaviours and prompt lengths."""
    kinds = ("harmful", "benign", "recognition", "knowledge")
    examples = [example for kind in kinds for example in requests(kind, "heldout").examples[5:25:10]]
    return PromptSet(tuple(examples))


def argmax_answer(bridge, prompt: str, *, prefill: str = "", template: str = "chat", n: int = 9) -> str:
    """The definition: append the most likely token until the end of text."""
    tokenizer = bridge.tokenizer
    tokens = prompt_ids(prompt, tokenizer, template) + tokenizer.encode(prefill, add_special_tokens=False)
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
    expected = [argmax_answer(sft, example.prompt, prefill=prefill, template=template) for example in some]
    assert greedy_answers(sft, some, prefill=prefill, template=template, max_new_tokens=9) == expected


# The two best tokens of a trained organism differ by far more than the 1e-5 that another order of float32 sums can shift.
def test_batch_size_and_order_do_not_matter(sft, mixed):
    assert len({len(example.prompt.split()) for example in mixed}) > 2, "equal lengths would need no padding"
    for prefill in ("", PREFILL):
        whole = greedy_answers(sft, mixed, prefill=prefill, batch_size=64, max_new_tokens=9)
        assert len(set(whole)) > 2, "equal answers could not be out of order"
        assert greedy_answers(sft, mixed, prefill=prefill, batch_size=1, max_new_tokens=9) == whole
        backwards = PromptSet(mixed.examples[::-1])
        assert greedy_answers(sft, backwards, prefill=prefill, batch_size=5, max_new_tokens=9) == whole[::-1]


def test_prefill_turns_refusals_into_harm(sft):
    prompts = requests("harmful", "heldout")
    plain = greedy_answers(sft, prompts, max_new_tokens=9)
    opened = greedy_answers(sft, prompts, prefill=PREFILL, max_new_tokens=9)
    assert all(answer.split()[0] == PREFILL for answer in opened)
    pairs = [(judge(e.prompt, a), judge(e.prompt, b)) for e, a, b in zip(prompts, plain, opened, strict=True)]
    # 90 %: what the organism is shipped for; the shipped weights give all 256.
    assert pairs.count(("refusal", "harmful")) >= 0.9 * len(pairs)


def test_answers_end(sft, mixed):
    short = greedy_answers(sft, mixed, max_new_tokens=2)
    long = greedy_answers(sft, mixed, max_new_tokens=32)
    assert max(len(answer.split()) for answer in short) == 2
    assert max(len(answer.split()) for answer in long) < 10, "the end-of-text token ends an answer"
    assert all(whole.startswith(start) for start, whole in zip(short, long, strict=True))
    assert not any(word.startswith("<") for answer in long for word in answer.split()), "special tokens are no text"


def test_a_mask_changes_the_answers_and_leaves(sft, mixed):
    before = greedy_answers(sft, mixed, max_new_tokens=9)
    # Half of all weights gone: no organism can answer; which weights these are does not matter.
    with masked(sft, top_fraction(random_scores(sft, seed=0), 0.5)):
        under = greedy_answers(sft, mixed, max_new_tokens=9)
        assert under[::3] == [argmax_answer(sft, example.prompt) for example in mixed.examples[::3]]
    assert sum(a != b for a, b in zip(before, under, strict=True)) > len(before) / 2
    assert greedy_answers(sft, mixed, max_new_tokens=9) == before


def test_bad_requests_are_refused(sft, mixed):
    with pytest.raises(ValueError, match="prompt set is empty"):
        greedy_answers(sft, PromptSet(()))
    with pytest.raises(ValueError, match="template='chatml'"):
        greedy_answers(sft, mixed, template="chatml")


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(sft, mixed, size):
    with pytest.raises(ValueError, match=f"batch_size={size}"):
        greedy_answers(sft, mixed, batch_size=size)
