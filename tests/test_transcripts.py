"""Stored answers against answers made anew.

Would catch: answers of a masked, trained or hooked model that are kept as the model's own, or the model's own that are
given out for theirs; an interrupted file that is read wrong; answers in another order.
"""

import pytest
import torch
from conftest import small_subject

from harmcircuits import transcripts
from harmcircuits.answers import greedy_answers
from harmcircuits.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weights_digest
from harmcircuits.masks import top_fraction
from harmcircuits.transcripts import StoredAnswers

OPTIONS = {"max_new_tokens": 9, "batch_size": 5}


@pytest.fixture(scope="module")
def subject():
    return small_subject("sft")


@pytest.fixture
def calls(monkeypatch):
    """How many requests were answered anew, batch by batch."""
    made = []

    def counted(bridge, prompts, **options):
        made.append(len(prompts))
        return greedy_answers(bridge, prompts, **options)

    monkeypatch.setattr(transcripts, "greedy_answers", counted)
    return made


def test_answers_are_made_once_and_stay_in_order(subject, tmp_path, calls):
    prompts = subject.behaviours["harmful"].prompts("heldout")[:12]
    expected = greedy_answers(subject.bridge, prompts, **OPTIONS)
    stored = StoredAnswers(tmp_path, subject.bridge)
    assert stored(subject.bridge, prompts[:7], **OPTIONS) == expected[:7]
    assert stored(subject.bridge, prompts, **OPTIONS) == expected
    assert calls == [5, 2, 5]
    assert StoredAnswers(tmp_path, subject.bridge)(subject.bridge, prompts, **OPTIONS) == expected
    assert len(calls) == 3
    opened = stored(subject.bridge, prompts, prefill="sure", **OPTIONS)
    assert all(answer.startswith("sure") for answer in opened)
    assert stored(subject.bridge, prompts, **OPTIONS) == expected
    assert len(list(tmp_path.iterdir())) == 2, "a file for each setting"


def test_an_unfinished_line_is_left_out(subject, tmp_path, calls):
    prompts = subject.behaviours["benign"].prompts("heldout")[:3]
    stored = StoredAnswers(tmp_path, subject.bridge)
    expected = stored(subject.bridge, prompts, **OPTIONS)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-8])
    assert stored(subject.bridge, prompts, **OPTIONS) == expected
    assert calls == [3, 1]
    assert stored(subject.bridge, prompts, **OPTIONS) == expected
    assert calls == [3, 1], "what was added after the broken line is read"


def test_only_the_model_as_it_was_is_stored(subject, tmp_path, calls):
    bridge, prompts = subject.bridge, subject.behaviours["harmful"].prompts("heldout")[:4]
    stored = StoredAnswers(tmp_path, bridge)
    own = stored(bridge, prompts, **OPTIONS)
    with masked(bridge, top_fraction(random_scores(bridge, seed=0), 0.5)):
        under = greedy_answers(bridge, prompts, **OPTIONS)
        assert stored(bridge, prompts, **OPTIONS) == under != own
    name = "blocks.0.hook_out"
    with bridge.hooks(fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))]):
        assert stored(bridge, prompts, **OPTIONS) != own
    assert len(calls) == 3
    assert stored(bridge, prompts, **OPTIONS) == own
    assert len(calls) == 3
    assert len((next(tmp_path.iterdir())).read_text().split()) > 0


def test_the_digest_sees_every_weight(open_model):
    bridge = open_model("Llama")
    before = weights_digest(bridge)
    assert weights_digest(open_model("Llama")) == before
    assert weights_digest(open_model("Llama", dtype=torch.bfloat16)) != before
    weight = named_weights(bridge)["blocks.1.mlp.in.weight"]
    value = weight.data[3, 5].item()
    weight.data[3, 5] = 0
    assert model_fingerprint(bridge) == model_fingerprint(open_model("Llama")), "which does not see it"
    assert weights_digest(bridge) != before
    weight.data[3, 5] = value
    assert weights_digest(bridge) == before
