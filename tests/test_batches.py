"""Token batches against hand-computed token ids.

Would catch: a target mask shifted by one or reaching into the prompt, the prefill or the padding;
thinking scored as the answer.
"""

from types import SimpleNamespace

import pytest
import torch
from support.organisms.train import new_tokenizer

from harmcircuits.batches import (
    Batch,
    Chat,
    at_matches,
    prompt_ids,
    tokenize,
    tokenize_text,
)
from harmcircuits.prompts import Example, PromptSet


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    """ids("<bos> yes") -> the ids of these words, looked up one by one in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return lambda text: [vocabulary[word] for word in text.split()]


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


def asked_with(template: str, tokenizer) -> list[int]:
    tokenizer.chat_template = template
    return prompt_ids("say it", tokenizer, SHORT)


ONES = torch.ones(2, 4, dtype=torch.long)
ENDS = torch.tensor([[False, False, True, False]] * 2)
ONE = PromptSet.of([("use", "yes")])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda _: Batch(ONES, ENDS[:, :3]), "torch.bool (2, 3)"),
        (lambda _: Batch(ONES, ENDS.long()), "torch.int64"),
        (lambda _: Batch(ONES, ~ENDS), "position 0"),
        (lambda _: Batch(ONES, ENDS & torch.tensor([[True], [False]])), "a target in each row"),
        (lambda tokenizer: tokenize(ONE, tokenizer, max_tokens=4), "max_tokens=4"),
        (lambda tokenizer: tokenize([*ONE, ("use", "")], tokenizer), "example 1"),
        (lambda tokenizer: tokenize(ONE, tokenizer, prefill="yes"), "example 0"),
        (lambda tokenizer: tokenize(ONE, tokenizer, template="chatml"), "template='chatml'"),
        (lambda tokenizer: tokenize_text("how to use it ?", tokenizer), "no window of 256"),
        (lambda tokenizer: asked_with(PLAIN.replace("message", "m"), tokenizer), "leaves out the"),
        (
            lambda tokenizer: asked_with("{{ raise_exception('no system') }}", tokenizer),
            "no system",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(tokenizer, call, word):
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


def test_a_token_that_loses_its_space_alone_is_matched_as_in_the_answer():
    """As SentencePiece has it: the first token of a text has no space."""
    pieces = ["", " am", " Mistral", ",", " by", " Paris", "."]

    def decode(tokens):
        return "".join(pieces[token] for token in tokens).removeprefix(" ")

    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6]])
    is_target = tokens > 0
    tokenizer = SimpleNamespace(decode=decode)
    for pattern, places in ((r"\bMistral\b", [2]), (" Paris", [5]), (r"\.|\d*", [6]), ("^am", [1])):
        (batch,) = at_matches([Batch(tokens, is_target)], tokenizer, pattern)
        assert batch.is_target[0].nonzero().flatten().tolist() == places
    assert at_matches([Batch(tokens, is_target)], tokenizer, "$") == []
