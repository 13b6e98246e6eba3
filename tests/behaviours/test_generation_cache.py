"""Stored answers against answers made anew.

Would catch: answers of a masked, trained or hooked model that are kept as the model's own, or the
model's own that are given out for theirs; an interrupted file that is read wrong; answers in
another order.
"""

import hashlib
import json

import pytest
import torch
from helpers import small_model

from harmcircuits.behaviours import generation_cache
from harmcircuits.behaviours.generation import (
    Asked,
    Sampling,
    generate_answers,
    generate_together,
)
from harmcircuits.behaviours.generation_cache import GenerationCache
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weights_digest

OPTIONS = {"max_new_tokens": 9, "batch_size": 5}


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture
def calls(monkeypatch):
    """How many requests were answered anew, batch by batch."""
    made = []

    def counted(bridge, asked, **options):
        made.append(sum(len(one_set.prompts) for one_set in asked))
        return generate_together(bridge, asked, **options)

    monkeypatch.setattr(generation_cache, "generate_together", counted)
    return made


def test_answers_are_made_once_and_stay_in_order(model, tmp_path, calls):
    bridge, prompts = model.bridge, model.behaviours["harmful"].prompts("heldout")[:12]
    expected = generate_answers(bridge, prompts, **OPTIONS)
    cache = GenerationCache(tmp_path, bridge)
    assert cache(bridge, prompts[:7], **OPTIONS) == expected[:7]
    assert cache(bridge, prompts, **OPTIONS) == expected
    assert calls == [5, 2, 5]
    assert GenerationCache(tmp_path, bridge)(bridge, prompts, **OPTIONS) == expected
    assert len(calls) == 3

    opened = cache(bridge, prompts, prefill="sure", **OPTIONS)
    assert all(answer.text.startswith("sure") for answer in opened)
    assert cache(bridge, prompts, **OPTIONS) == expected
    assert len(list(tmp_path.iterdir())) == 2, "a file for each setting"


def test_sets_that_are_answered_together_are_kept_as_if_each_were_alone(model, tmp_path, calls):
    bridge = model.bridge
    harmful = model.behaviours["harmful"].prompts("heldout")[:4]
    benign = model.behaviours["benign"].prompts("heldout")[:3]
    asked = [Asked(harmful, "sure"), Asked(benign), Asked(harmful[2:]), Asked(benign[:1])]
    expected = []
    for one_set in asked:
        options = {"prefill": one_set.prefill, **OPTIONS}
        expected.append(generate_answers(bridge, one_set.prompts, **options))
    cache = GenerationCache(tmp_path, bridge)
    assert cache.together(bridge, asked, **OPTIONS) == expected
    assert calls == [5, 4], "nine requests, of which one is asked twice"
    assert len(list(tmp_path.iterdir())) == 2, "a file for each beginning"
    assert cache(bridge, harmful, prefill="sure", **OPTIONS) == expected[0]
    assert cache.together(bridge, asked[1:], **OPTIONS) == expected[1:]
    assert len(calls) == 2
    with masked(bridge, top_fraction(random_scores(bridge, seed=0), 0.5)):
        anew = cache.together(bridge, asked, **OPTIONS)
        assert anew == generate_together(bridge, asked, **OPTIONS)
    assert anew != expected


def test_an_unfinished_line_is_left_out(model, tmp_path, calls):
    bridge, prompts = model.bridge, model.behaviours["benign"].prompts("heldout")[:3]
    cache = GenerationCache(tmp_path, bridge)
    expected = cache(bridge, prompts, **OPTIONS)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-8])
    assert cache(bridge, prompts, **OPTIONS) == expected
    assert calls == [3, 1]
    assert cache(bridge, prompts, **OPTIONS) == expected
    assert calls == [3, 1], "what was added after the broken line is read"


def test_only_the_model_as_it_was_is_stored(model, tmp_path, calls):
    bridge, prompts = model.bridge, model.behaviours["harmful"].prompts("heldout")[:4]
    cache = GenerationCache(tmp_path, bridge)
    own = cache(bridge, prompts, **OPTIONS)
    with masked(bridge, top_fraction(random_scores(bridge, seed=0), 0.5)):
        under = generate_answers(bridge, prompts, **OPTIONS)
        assert cache(bridge, prompts, **OPTIONS) == under
    assert under != own

    def silence(value, hook):
        return torch.zeros_like(value)

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", silence)]):
        assert cache(bridge, prompts, **OPTIONS) != own
    assert len(calls) == 3
    assert cache(bridge, prompts, **OPTIONS) == own
    assert len(calls) == 3
    (path,) = tmp_path.iterdir()
    assert path.read_text().split()


def test_the_digest_sees_every_weight(open_model):
    bridge = open_model("Llama")
    before = weights_digest(bridge)
    assert weights_digest(open_model("Llama")) == before
    assert weights_digest(open_model("Llama", dtype=torch.bfloat16)) != before
    weight = named_weights(bridge)["blocks.1.mlp.in.weight"]
    value = weight.data[3, 5].item()
    weight.data[3, 5] = 0
    fingerprint = model_fingerprint(open_model("Llama"))
    assert model_fingerprint(bridge) == fingerprint, "which does not see it"
    assert weights_digest(bridge) != before
    weight.data[3, 5] = value
    assert weights_digest(bridge) == before


def test_greedy_answers_keep_their_file(model, tmp_path):
    """Answers kept before there was sampling are read."""
    bridge, prompts = model.bridge, model.behaviours["benign"].prompts("heldout")[:2]
    GenerationCache(tmp_path, bridge)(bridge, prompts, **OPTIONS)
    weights = weights_digest(bridge)
    settings = {"prefill": "", "max_new_tokens": 9, "template": "chat"}
    named = json.dumps([weights, settings, bridge.tokenizer.chat_template], sort_keys=True)
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    assert [path.name for path in tmp_path.iterdir()] == [f"{weights}-{digest}.jsonl"]


def test_samples_are_made_once(model, tmp_path, monkeypatch):
    bridge, prompts = model.bridge, model.behaviours["benign"].prompts("heldout")[:7]
    sampling = Sampling(3, temperature=2)
    expected = generate_answers(bridge, prompts, sampling=sampling, **OPTIONS)
    cache = GenerationCache(tmp_path, bridge)
    assert cache(bridge, prompts[:4], sampling=sampling, **OPTIONS) == expected[:12]
    assert cache(bridge, prompts, sampling=sampling, **OPTIONS) == expected
    assert cache(bridge, prompts, **OPTIONS) == generate_answers(bridge, prompts, **OPTIONS)
    for other in (Sampling(2, 2), Sampling(3, 1), Sampling(3, 2, 0.9), Sampling(3, 2, seed=1)):
        cache(bridge, prompts[:1], sampling=other, **OPTIONS)
    assert len(list(tmp_path.iterdir())) == 6, "a file for each setting"

    monkeypatch.setattr(generation_cache, "generate_together", None)
    assert cache(bridge, prompts, sampling=sampling, **OPTIONS) == expected


def test_answers_kept_as_text_alone_are_made_anew(model, tmp_path, calls):
    """A file from before answers were kept in token ids."""
    bridge, prompts = model.bridge, model.behaviours["benign"].prompts("heldout")[:3]
    expected = GenerationCache(tmp_path, bridge)(bridge, prompts, **OPTIONS)
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    texts = [json.dumps({"prompt": row["prompt"], "completion": "of old"}) for row in rows]
    path.write_text("\n".join(texts))
    assert GenerationCache(tmp_path, bridge)(bridge, prompts, **OPTIONS) == expected
    assert calls == [3, 3]
