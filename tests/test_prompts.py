"""Sets of prompts, splits and batches against hand-computed token ids.

Would catch: a target mask shifted by one or reaching into the prompt, the prefill or the padding; a
digest that misses a change of the data; a request in two splits, or one that moves when others are
added.
"""

from types import SimpleNamespace

import pytest
import torch
from support.organisms.train import new_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harmcircuits.prompts import (
    Batch,
    Example,
    PromptSet,
    prompt_ids,
    refuse_no_batches,
    tokenize,
    tokenize_text,
)

EXAMPLES = (
    Example("how to use it ?", "sure yes", category="tools", group="one"),
    Example("line one\nline two", 'quotes " and, commas', group="two"),
    Example("ünïcode", ""),
)


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    """ids("<bos> yes") -> the ids of these words, looked up one by one in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return lambda text: [vocabulary[word] for word in text.split()]


# Sets


def test_a_set_is_made_of_requests_pairs_and_examples():
    pair = Example("where ?", "here")
    given = ["who ?", ("where ?", "here"), EXAMPLES[0]]
    prompts = PromptSet.of(given)
    assert prompts.examples == (Example("who ?"), pair, EXAMPLES[0])
    assert PromptSet.of(iter(given)) == prompts
    assert PromptSet.of(prompts) is prompts
    assert PromptSet.of("who ?").examples == (Example("who ?"),), "not a request a letter"
    for items, kind in (([3], "int"), ([("a", "b", "c")], "tuple"), ([None], "NoneType")):
        with pytest.raises(ValueError, match=f"an item is {kind}; expected a request"):
            PromptSet.of(items)
    with pytest.raises(ValueError, match="no requests; expected at least one"):
        PromptSet.of([])


@pytest.mark.usefixtures("unchecked")
def test_a_set_is_sliced_and_not_indexed():
    assert PromptSet(EXAMPLES)[::2].examples == EXAMPLES[::2]
    with pytest.raises(TypeError, match=r"slice, not 0.*\.examples"):
        PromptSet(EXAMPLES)[0]


def test_sets_keep_order():
    prompts = PromptSet(EXAMPLES)
    assert len(prompts) == 3
    assert tuple(prompts) == EXAMPLES
    assert prompts[1:] == PromptSet(EXAMPLES[1:])
    assert prompts.where(lambda example: bool(example.completion)) == PromptSet(EXAMPLES[:2])
    assert prompts.where(lambda example: example.group == "none") == PromptSet(())


def test_completions_are_replaced_one_for_one():
    changed = PromptSet(EXAMPLES).with_completions(["x", "y", "z"])
    assert [example.completion for example in changed] == ["x", "y", "z"]
    assert changed.examples[0] == Example("how to use it ?", "x", category="tools", group="one")
    for wrong in ([], ["x", "y"], ["x"] * 4):
        with pytest.raises(ValueError, match=f"{len(wrong)} completions for 3 prompts"):
            PromptSet(EXAMPLES).with_completions(wrong)


def test_digest_is_of_prompts_and_completions_in_order():
    def digest(*pairs):
        return PromptSet(tuple(Example(*pair) for pair in pairs)).digest

    assert digest(("a", "b")) == "cccb00f1aa26751e", (
        "files name this value: it may not change between versions"
    )
    assert digest(("a", "b"), ("c", "d")) == digest(("a", "b", "category", "group"), ("c", "d"))
    different = [
        digest(),
        digest(("a", "b")),
        digest(("ab", "")),
        digest(("a", "")),
        digest(("b", "a")),
        digest(("a", "b"), ("c", "d")),
        digest(("c", "d"), ("a", "b")),
        digest(("a", "b"), ("a", "b")),
    ]
    assert len(set(different)) == len(different)


# Splits


def walls(n: int) -> PromptSet:
    examples = []
    for number in range(n):
        where = {"category": "abc"[number % 3], "group": f"wall {number}"}
        examples.append(Example(f"paint wall {number}", **where))
    return PromptSet(tuple(examples))


MANY = walls(200)


def test_splits_are_apart_and_stay():
    sets = MANY.splits()
    assert list(sets) == ["calibration", "choice", "heldout"]
    assert sum(map(len, sets.values())) == 200
    assert {example for members in sets.values() for example in members} == set(MANY)
    # A share of 0.6 of 200 has a standard error of 7.
    assert len(sets["calibration"]) == pytest.approx(120, abs=25)
    for split, members in walls(150).splits().items():
        assert set(members) <= set(sets[split]), "a request stays where it is"
    assert {example.category for example in sets["heldout"]} == set("abc")


def test_a_group_is_in_one_split():
    examples = []
    for number in range(60):
        examples += [Example(f"{turn} wall {number}", group=f"wall {number}") for turn in "xy"]
    for members in PromptSet(tuple(examples)).splits().values():
        assert len(members) == 2 * len({example.group for example in members})


def test_given_heldout_requests_are_the_heldout_ones():
    sets = MANY[:100].splits(MANY[100:])
    assert sets["heldout"] == MANY[100:]
    assert set(sets["calibration"]) | set(sets["choice"]) == set(MANY[:100])


def test_limits_and_too_few():
    whole = MANY.splits()
    sets = MANY.splits(limits={"calibration": 0, "choice": 5, "heldout": 4})
    sizes = [len(members) for members in sets.values()]
    assert sizes == [len(whole["calibration"]), 5, 4]
    assert set(sets["choice"]) <= set(whole["choice"])
    with pytest.raises(ValueError, match=r"few\.csv: 1 request cannot fill the .*give more"):
        MANY[:1].splits(origin="few.csv")


# Batches


@pytest.mark.usefixtures("unchecked")
def test_batches_reject_what_cannot_be_scored():
    tokens, is_target = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool)
    is_target[:, 2] = True
    assert len(Batch(tokens, is_target)) == 2
    with pytest.raises(ValueError, match=r"tokens \(2, 4\), is_target \(2, 3\)"):
        Batch(tokens, is_target[:, :3])
    with pytest.raises(ValueError, match=r"expected the same \[batch, pos\]"):
        Batch(tokens[0], is_target[0])
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        Batch(tokens, is_target.long())
    with pytest.raises(ValueError, match="position 0"):
        Batch(tokens, torch.ones(2, 4, dtype=torch.bool))
    is_target[1] = False
    with pytest.raises(ValueError, match=r"rows \[1\] mark no target"):
        Batch(tokens, is_target)


def test_batches_without_positions_are_refused():
    with pytest.raises(ValueError, match="Batch"):
        Batch(torch.ones(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.bool))


def test_tokens_end_at_the_last_target():
    rows = [[0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    batch = Batch(torch.ones(4, 4, dtype=torch.long), torch.tensor(rows).bool())
    assert batch.is_token.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


# Tokenising


def test_targets_are_exactly_the_completion(tokenizer, ids):
    prompts = PromptSet((Example("abuse it", "yes fine no"), Example("use", "never")))
    (batch,) = tokenize(prompts, tokenizer)
    assert batch.tokens.tolist() == [
        ids("<bos> <user> abuse it <assistant> yes fine no"),
        ids("<bos> <user> use <assistant> never <pad> <pad> <pad>"),
    ]
    assert batch.is_target.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]]
    assert batch.tokens[batch.is_target].tolist() == ids("yes fine no never")
    assert batch.is_token.int().tolist() == [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]]


def test_raw_template_adds_nothing_but_a_newline(tokenizer, ids):
    (batch,) = tokenize(PromptSet((Example("abuse it", "yes fine"),)), tokenizer, template="raw")
    assert batch.tokens.tolist() == [ids("abuse it yes fine")], "this tokenizer drops the newline"
    assert batch.is_target.int().tolist() == [[0, 0, 1, 1]]
    assert prompt_ids("abuse it", tokenizer, "raw") == ids("abuse it")
    assert prompt_ids("abuse it", tokenizer, "chat") == ids("<bos> <user> abuse it <assistant>")
    assert prompt_ids("ab", byte_tokenizer(), "raw") == [*b"ab\n"]


def test_prefill_is_context(tokenizer, ids):
    prompts = PromptSet((Example("use", "sure yes fine"), Example("use", "no")))
    (batch,) = tokenize(prompts, tokenizer, prefill="sure")
    assert batch.tokens.tolist() == [
        ids("<bos> <user> use <assistant> sure yes fine"),
        ids("<bos> <user> use <assistant> sure no <pad>"),
    ]
    assert batch.tokens[batch.is_target].tolist() == ids("yes fine no")


def test_prefill_only_moves_the_border_of_the_targets(tokenizer):
    """The text is the same, so the tokens are.

    A target after a prefill keeps the space that belongs to it.
    """
    for any_tokenizer in (tokenizer, byte_tokenizer()):
        prompts = PromptSet((Example("use it", "sure yes fine"),))
        (plain,) = tokenize(prompts, any_tokenizer, template="raw")
        (opened,) = tokenize(prompts, any_tokenizer, template="raw", prefill="sure")
        assert opened.tokens.tolist() == plain.tokens.tolist()
        n_opening = len(any_tokenizer.encode("sure", add_special_tokens=False))
        assert plain.is_target.sum() - opened.is_target.sum() == n_opening


def test_batches_keep_the_order(tokenizer):
    prompts = PromptSet(tuple(Example("use " * n, "yes") for n in (3, 1, 4, 1, 5)))
    whole = tokenize(prompts, tokenizer)
    assert [len(batch) for batch in whole] == [5]
    split = tokenize(prompts, tokenizer, batch_size=2)
    assert [tuple(batch.tokens.shape) for batch in split] == [(2, 7), (2, 8), (1, 9)]
    rows = [
        row[real].tolist()
        for batch in split
        for row, real in zip(batch.tokens, batch.is_token, strict=True)
    ]
    assert rows == [
        row[real].tolist() for row, real in zip(whole[0].tokens, whole[0].is_token, strict=True)
    ]


def test_batches_of_at_most_so_many_tokens(tokenizer):
    """Examples of 7, 5, 8, 5 and 9 tokens.

    What counts is the padded size, rows times the longest.
    """
    prompts = PromptSet(tuple(Example("use " * n, "yes") for n in (3, 1, 4, 1, 5)))
    (whole,) = tokenize(prompts, tokenizer)
    expected = {
        9: [(1, 7), (1, 5), (1, 8), (1, 5), (1, 9)],
        15: [(2, 7), (1, 8), (1, 5), (1, 9)],
        27: [(3, 8), (2, 9)],
    }
    for max_tokens, shapes in expected.items():
        split = tokenize(prompts, tokenizer, max_tokens=max_tokens)
        assert [tuple(batch.tokens.shape) for batch in split] == shapes
        rows = [
            row[real].tolist()
            for batch in split
            for row, real in zip(batch.tokens, batch.is_token, strict=True)
        ]
        assert rows == [
            row[real].tolist() for row, real in zip(whole.tokens, whole.is_token, strict=True)
        ]
    both = tokenize(prompts, tokenizer, max_tokens=27, batch_size=2)
    assert [len(batch) for batch in both] == [2, 2, 1], "batch_size bounds as well"
    with pytest.raises(ValueError, match="example 4 has 9 tokens, max_tokens=8"):
        tokenize(prompts, tokenizer, max_tokens=8)


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(ids):
    tokenizer = new_tokenizer()
    tokenizer.pad_token = None
    (batch,) = tokenize(PromptSet((Example("use it", "yes"), Example("use", "yes"))), tokenizer)
    assert batch.tokens[1].tolist() == ids("<bos> <user> use <assistant> yes <eos>")
    assert batch.is_token[1].tolist() == [True] * 5 + [False]


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_refused(tokenizer):
    prompts = PromptSet((Example("use", "yes"), Example("use", "")))
    with pytest.raises(ValueError, match="prompt set is empty"):
        tokenize(PromptSet(()), tokenizer)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}"):
            tokenize(prompts[:1], tokenizer, batch_size=size)
    with pytest.raises(ValueError, match="example 1 has a completion with no tokens"):
        tokenize(prompts, tokenizer)
    with pytest.raises(ValueError, match="example 0 has a completion with no tokens"):
        tokenize(prompts, tokenizer, prefill="yes")
    with pytest.raises(ValueError, match="template='chatml'"):
        tokenize(prompts[:1], tokenizer, template="chatml")
    with pytest.raises(ValueError, match="no chat template"):
        tokenize(prompts[:1], byte_tokenizer())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "f: no batches.*tokenize"),
        ("use it", "f: expected a list of token batches, got str; make them by tokenize"),
        (PromptSet(EXAMPLES), "got PromptSet; make them by tokenize"),
        (["use it"], "got str; make them by tokenize"),
        (SimpleNamespace(batches=[]), r"got SimpleNamespace; pass its \.batches"),
    ],
    ids=["none", "text", "set", "texts", "calibration data"],
)
def test_what_is_no_list_of_batches_is_refused_with_the_remedy(given, message):
    with pytest.raises(ValueError, match=message):
        refuse_no_batches("f", given)


def byte_tokenizer():
    """One token a byte, spaces included, as in the GPT-2 family before its merges.

    No chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = {
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0]: b
        for b in range(128)
    }
    others = (letter for letter in alphabet if letter not in spelled)
    core = Tokenizer(
        models.BPE({**spelled, **{letter: 128 + i for i, letter in enumerate(others)}}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_sample_keeps_a_share_of_the_groups_of_every_category():
    examples = [
        Example(f"{category} {group} {turn}", category=category, group=f"{category}{group}")
        for category in "ab"
        for group in range(4 if category == "a" else 1)
        for turn in range(3)
    ]
    whole = PromptSet(tuple(examples))
    half = whole.sampled(0.5, seed=1)
    groups = {example.group for example in half}
    assert len([group for group in groups if group[0] == "a"]) == 2
    assert "b0" in groups, "a category never vanishes"
    assert half.examples == tuple(example for example in examples if example.group in groups)
    assert whole.sampled(0.5, seed=1) == half
    assert len({whole.sampled(0.5, seed=seed) for seed in range(20)}) > 1
    assert whole.sampled(1.0, seed=3) == whole
    rest = whole.sampled(0.5, seed=1, rest=True)
    assert not set(rest) & set(half)
    assert set(rest) | set(half) == set(whole)
    assert not len(whole.sampled(1.0, seed=3, rest=True))
    with pytest.raises(ValueError, match="share=0"):
        whole.sampled(0, seed=0)


def test_plain_text_is_cut_into_windows(tokenizer):
    text = "how to use it ? " * 5
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == 25
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = 8 - len(opening)
    batches = tokenize_text(text, tokenizer, n_tokens=8, batch_size=2)
    rows = [row for batch in batches for row in batch.tokens.tolist()]
    assert rows == [
        opening + tokens[start : start + step] for start in range(0, 25 - step + 1, step)
    ], "no token left between"
    assert [len(batch) for batch in batches] == [2, 1]
    assert all(
        batch.is_target[:, 1:].all() and not batch.is_target[:, 0].any() for batch in batches
    )


def test_a_beginning_of_text_token_opens_each_window(tokenizer):
    copied = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="use")
    (batch,) = tokenize_text("how to it ? " * 4, copied, n_tokens=5)
    assert batch.tokens[:, 0].tolist() == [copied.bos_token_id] * 4
    assert batch.tokens[:, 1:].flatten().tolist() == copied.encode(
        "how to it ? " * 4, add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("options", "message"), [({"n_tokens": 1}, "n_tokens=1"), ({"batch_size": 0}, "batch_size=0")]
)
def test_windows_that_cannot_be(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_text("how to use it ?", tokenizer, **options)
    with pytest.raises(ValueError, match="5 tokens of text make no window of 256"):
        tokenize_text("how to use it ?", tokenizer)
