"""Sets of prompts, splits and batches against hand-computed token ids.

Would catch: a target mask shifted by one or reaching into the prompt, the prefill or the padding; a
request in two splits, or one that moves when others are added; thinking scored as the answer.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.organisms.train import new_tokenizer

from harmcircuits.batches import (
    Batch,
    Chat,
    at_matches,
    prompt_ids,
    refuse_no_batches,
    tokenize,
    tokenize_text,
)
from harmcircuits.prompts import SPLITS, Example, PromptSet

EXAMPLES = (Example("how to use it ?", "sure yes", category="tools", group="one"),)


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    """ids("<bos> yes") -> the ids of these words, looked up one by one in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return lambda text: [vocabulary[word] for word in text.split()]


def test_a_set_is_made_of_requests_pairs_and_examples_in_order():
    pair = Example("where ?", "here")
    items = ["who ?", ("where ?", "here"), EXAMPLES[0]]
    prompts = PromptSet.of(items)
    assert prompts.examples == (Example("who ?"), pair, EXAMPLES[0])
    assert PromptSet.of(iter(items)) == prompts
    assert PromptSet.of(prompts) is prompts
    assert PromptSet.of("who ?").examples == (Example("who ?"),), "not a request a letter"

    assert prompts[1:] == PromptSet((pair, EXAMPLES[0]))
    assert prompts.where(lambda example: bool(example.completion)) == prompts[1:]
    changed = prompts.with_completions(["x", "y", "z"]).examples
    assert [example.completion for example in changed] == ["x", "y", "z"]
    assert changed[2] == Example("how to use it ?", "z", category="tools", group="one")


def test_digest_is_of_all_texts_in_order():
    def digest(*pairs):
        return PromptSet(tuple(Example(*pair) for pair in pairs)).digest

    # Files name this value: it may not change between versions.
    assert digest(("a", "b")) == "cccb00f1aa26751e"
    others = [digest(("ab", "")), digest(("a", "")), digest(("a", "b"), ("c", "d"))]
    assert len({digest(("a", "b")), digest(("c", "d"), ("a", "b")), *others}) == 5


def walls(n: int) -> PromptSet:
    """Two requests to each of n walls."""
    examples = []
    for number in range(n):
        where = {"category": "abc"[number % 3], "group": f"wall {number}"}
        examples += [Example(f"{verb} wall {number}", **where) for verb in ("paint", "build")]
    return PromptSet(tuple(examples))


MANY = walls(200)


def test_splits_are_apart_and_stay():
    sets = MANY.splits()
    assert list(sets) == ["calibration", "choice", "heldout"]
    assert sum(map(len, sets.values())) == 400
    assert {example for members in sets.values() for example in members} == set(MANY)
    # A share of 0.6 of 200 groups has a standard error of 7.
    assert len(sets["calibration"]) / 2 == pytest.approx(120, abs=25)
    for split, members in walls(150).splits().items():
        assert set(members) <= set(sets[split]), "a request stays where it is"
    for members in sets.values():
        assert len(members) == 2 * len({example.group for example in members}), "groups are whole"
        assert {example.category for example in members} == set("abc")

    limited = MANY.splits(limits={"calibration": 0, "choice": 5, "heldout": 4})
    assert [len(members) for members in limited.values()] == [len(sets["calibration"]), 10, 8]
    assert set(limited["choice"]) <= set(sets["choice"])


def test_given_heldout_requests_are_the_heldout_ones():
    sets = MANY[:200].splits(MANY[200:])
    assert sets["heldout"] == MANY[200:]
    assert set(sets["calibration"]) | set(sets["choice"]) == set(MANY[:200])
    asked_before = MANY.splits(MANY[200:])
    assert asked_before == sets, "what asks the same as a held-out request is left out"


def test_targets_are_exactly_the_completion(tokenizer, ids):
    prompts = PromptSet.of([("abuse it", "yes fine no"), ("use", "never")])
    (batch,) = tokenize(prompts, tokenizer)
    assert batch.tokens.tolist() == [
        ids("<bos> <user> abuse it <assistant> yes fine no"),
        ids("<bos> <user> use <assistant> never <pad> <pad> <pad>"),
    ]
    assert batch.is_target.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]]
    assert batch.is_token.int().tolist() == [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]]


def test_a_prefill_is_context_and_the_end_of_text_pads_where_nothing_else_does(ids):
    tokenizer = new_tokenizer()
    tokenizer.pad_token = None
    prompts = PromptSet.of([("use", "sure yes fine"), ("use", "no")])
    (batch,) = tokenize(prompts, tokenizer, prefill="sure")
    assert batch.tokens.tolist() == [
        ids("<bos> <user> use <assistant> sure yes fine"),
        ids("<bos> <user> use <assistant> sure no <eos>"),
    ]
    assert batch.tokens[batch.is_target].tolist() == ids("yes fine no")
    assert batch.is_token.int().tolist() == [[1] * 7, [1] * 6 + [0]]


def test_batches_of_at_most_so_many_tokens(tokenizer):
    """Examples of 7, 5, 8, 5 and 9 tokens.

    What counts is the padded size, rows times the longest.
    """
    prompts = PromptSet(tuple(Example("use " * n, "yes") for n in (3, 1, 4, 1, 5)))
    (whole,) = tokenize(prompts, tokenizer)
    for options, shapes in (
        ({"batch_size": 2}, [(2, 7), (2, 8), (1, 9)]),
        ({"max_tokens": 9}, [(1, 7), (1, 5), (1, 8), (1, 5), (1, 9)]),
        ({"max_tokens": 15}, [(2, 7), (1, 8), (1, 5), (1, 9)]),
        ({"max_tokens": 27, "batch_size": 2}, [(2, 7), (2, 8), (1, 9)]),
    ):
        split = tokenize(prompts, tokenizer, **options)
        assert [tuple(batch.tokens.shape) for batch in split] == shapes
        texts = torch.cat([batch.tokens[batch.is_token] for batch in split])
        assert torch.equal(texts, whole.tokens[whole.is_token])
    assert tokenize([], tokenizer) == []


def test_a_sample_keeps_a_share_of_the_groups_of_every_category():
    examples = []
    for group in ("a0", "a1", "a2", "a3", "b0"):
        where = {"category": group[0], "group": group}
        examples += [Example(f"{group} {turn}", **where) for turn in range(3)]
    whole = PromptSet(tuple(examples))
    half = whole.sampled(0.5, seed=1)
    groups = {example.group for example in half}
    assert len(groups) == 3 and "b0" in groups, "a category never vanishes"
    assert half == whole.where(lambda example: example.group in groups)
    assert len({whole.sampled(0.5, seed=seed) for seed in range(20)}) > 1
    assert whole.sampled(1.0, seed=3) == whole
    rest = whole.sampled(0.5, seed=1, rest=True)
    assert rest == whole.where(lambda example: example.group not in groups)


def test_plain_text_is_cut_into_windows(tokenizer):
    text = "how to use it ? " * 5
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == 25
    batches = tokenize_text(text, tokenizer, n_tokens=8, batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1]
    rows = torch.cat([batch.tokens for batch in batches])
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert rows[:, 1:].flatten().tolist() == tokens[:21], "no token left between"
    is_target = torch.cat([batch.is_target for batch in batches])
    assert is_target[:, 1:].all() and not is_target[:, 0].any()


PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "<assistant>{% if date %}{{ date }}{% endif %}"
)
SWITCHED = PLAIN + "{% if enable_thinking is false %}<think></think>{% endif %}"
SHORT = Chat(system="be short")


@pytest.mark.parametrize(
    ("template", "chat", "text"),
    [
        (PLAIN, "raw", "say it\n"),
        (PLAIN, "chat", "<user>say it<assistant>"),
        (PLAIN, SHORT, "<system>be short<user>say it<assistant>"),
        (PLAIN, Chat(options={"date": "May"}), "<user>say it<assistant>May"),
        (SWITCHED, "chat", "<user>say it<assistant><think></think>"),
        (SWITCHED, Chat(options={"enable_thinking": True}), "<user>say it<assistant>"),
        (PLAIN + "<think>\n", "chat", "<user>say it<assistant><think>\n\n</think>\n\n"),
    ],
)
def test_a_request_is_written_as_its_template_says(template, chat, text):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = template
    texts = []
    tokenizer.encode = lambda written, **_: texts.append(written) or []
    prompt_ids("say it", tokenizer, chat)
    assert texts == [text]


ONES = torch.ones(2, 4, dtype=torch.long)
ENDS = torch.tensor([[False, False, True, False]] * 2)
ONE = PromptSet.of([("use", "yes")])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda _: PromptSet.of([3]), "an item is int"),
        (lambda _: ONE.with_completions(["x", "y"]), "longer"),
        (lambda _: MANY[:1].splits(origin="few.csv"), "few.csv: 1 request cannot fill"),
        (lambda _: Batch(ONES, ENDS[:, :3]), "torch.bool (2, 3)"),
        (lambda _: Batch(ONES, ENDS.long()), "torch.int64"),
        (lambda _: Batch(ONES, ~ENDS), "position 0"),
        (lambda _: Batch(ONES, ENDS & torch.tensor([[True], [False]])), "a target in each row"),
        (lambda tokenizer: tokenize(ONE, tokenizer, max_tokens=4), "max_tokens=4"),
        (lambda tokenizer: tokenize([*ONE, ("use", "")], tokenizer), "example 1"),
        (lambda tokenizer: tokenize(ONE, tokenizer, prefill="yes"), "example 0"),
        (lambda tokenizer: tokenize(ONE, tokenizer, template="chatml"), "template='chatml'"),
        (lambda tokenizer: tokenize_text("how to use it ?", tokenizer), "no window of 256"),
        (lambda _: refuse_no_batches("f", []), "f: no batches"),
        (lambda _: refuse_no_batches("f", ONE), "PromptSet"),
    ],
)
def test_what_cannot_be_asked_or_scored_is_refused(tokenizer, call, word):
    with pytest.raises(ValueError) as error:
        call(tokenizer)
    assert word in str(error.value)


def test_a_model_without_a_template_is_asked_raw(tokenizer):
    bare = new_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match='expected "raw"'):
        tokenize(ONE, bare)
    assert tokenize(ONE, bare, template="raw")


def test_only_tokens_in_which_a_match_begins_are_targets():
    """Pieces of words, as byte-pair tokenizers have them; a name may begin within one."""
    pieces = ["", " Qwe", "n", " by Ali", "baba", ".", "Qwen?"]
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(pieces[token] for token in tokens))
    tokens = torch.tensor([[6, 1, 2, 3, 4, 5], [6, 5, 5, 5, 0, 0], [3, 4, 1, 2, 1, 2]])
    is_target = torch.ones_like(tokens, dtype=torch.bool)
    is_target[:, 0] = False
    (found,) = at_matches([Batch(tokens, is_target)], tokenizer, "Qwen|Alibaba")
    assert found.tokens.tolist() == tokens[[0, 2]].tolist(), (
        "the second has a name in its request only"
    )
    assert found.is_target.int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert at_matches([Batch(tokens, is_target)], tokenizer, "nobody") == []


def test_a_group_of_the_held_out_file_is_scored_nowhere():
    requests = [Example(f"use thing {n}", group=f"thing {n}") for n in range(40)]
    held_out = [replace(example, prompt=f"how to {example.prompt}") for example in requests[::2]]
    sets = PromptSet(tuple(requests)).splits(PromptSet(tuple(held_out)))
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert not groups["heldout"] & (groups["calibration"] | groups["choice"])
    assert len(groups["calibration"] | groups["choice"]) == 20


@pytest.mark.parametrize("name", ["group", "category", "label"])
def test_the_digest_of_requests_holds_what_splits_and_intervals_depend_on(name):
    first = Example("q", group="g", category="a", label="safe")
    second = replace(first, **{name: "another"})
    assert PromptSet((second,)).digest != PromptSet((first,)).digest
