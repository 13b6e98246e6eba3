"""Texts become token ids: how a request is written, and batches of what is predicted."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.display import plural
from harmcircuits.prompts import Example, PromptSet


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template, with more than the request."""

    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


Template = Literal["chat", "raw"] | Chat


THINKING_BEGINS = "<think>"


THINKING_ENDS = "\n\n</think>\n\n"


@dataclass(frozen=True, repr=False)
class Batch:
    """Right-padded token ids and the tokens to be predicted.

    >>> harm[0]
    Batch(24 examples, 15 positions, 144 targets)

    Attributes:
        tokens: token ids.
        is_target: True where the token is predicted from those before it and counted in the loss;
            never at position 0, and at least once in every row. A ValueError says otherwise.
    """

    tokens: Int[Tensor, "batch pos"]
    is_target: Bool[Tensor, "batch pos"]

    def __post_init__(self) -> None:
        same_shape = self.tokens.shape == self.is_target.shape
        is_mask = same_shape and self.tokens.ndim == 2 and self.is_target.dtype == torch.bool
        if not is_mask or self.is_target[:, 0].any() or not self.is_target.any(dim=1).all():
            raise ValueError(
                f"Batch: tokens {tuple(self.tokens.shape)}, is_target {self.is_target.dtype} "
                f"{tuple(self.is_target.shape)}; expected the same [batch, pos], the second bool, "
                "with a target in each row and none at position 0, which nothing predicts"
            )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        n_targets = int(self.is_target.sum())
        examples, positions = plural(len(self), "example"), self.tokens.shape[1]
        return f"Batch({examples}, {positions} positions, {n_targets} targets)"

    @property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """True up to the last target of each row: what follows it is padding."""
        #     is_target              .  .  x  x  .
        #     targets from here on   2  2  2  1  0
        #     is_token               x  x  x  x  .
        n_from_here = self.is_target.flip(1).cumsum(dim=1).flip(1)
        return n_from_here > 0

    @property
    def n_read(self) -> int:
        """How many positions a model must read to predict every target.

        Those before the last target: it predicts no other token, and what follows is padding.
        """
        return int(self.is_target.any(dim=0).nonzero().max())

    def beginning(self, n_first: int) -> "Batch":
        """The same texts, of whose targets only the first count.

        Args:
            n_first: how many of each text's targets.
        """
        number = self.is_target.cumsum(dim=1)  # that of the first target is 1
        return Batch(self.tokens, self.is_target & (number <= n_first))


def prompt_ids(prompt: str, tokenizer: Any, template: Template) -> list[int]:
    """Token ids of a request, up to where the answer begins."""
    if template == "raw":
        return tokenizer.encode(prompt + "\n", add_special_tokens=False)
    chat = Chat() if template == "chat" else template
    if not isinstance(chat, Chat) or not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f'template={template!r}; expected "raw", or "chat" or a Chat where the tokenizer has a '
            "chat template"
        )
    turns = [{"role": "system", "content": chat.system}] if chat.system else []
    turns.append({"role": "user", "content": prompt})
    options = {"enable_thinking": False, **chat.options}
    # As text first: the template writes its own special tokens, which must not be doubled.
    text = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False, **options
    )
    # Some templates begin the thinking whatever they are told.
    if text.rstrip().endswith(THINKING_BEGINS):
        text = text.rstrip() + THINKING_ENDS
    return tokenizer.encode(text, add_special_tokens=False)


def padding_id(tokenizer: Any) -> int:
    """The token that fills a batch: the tokenizer's own, else its end-of-text token, else 0."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def opening_ids(prefill: str, tokenizer: Any) -> list[int]:
    """Token ids of what opens an answer; none where nothing does."""
    return tokenizer.encode(prefill, add_special_tokens=False) if prefill else []


def target_ids(example: Example, tokenizer: Any, prefill: str = "") -> list[int]:
    """Token ids of a completion that are predicted: what follows the prefill."""
    opening = opening_ids(prefill, tokenizer)
    target = list(example.tokens)
    if not target:
        target = tokenizer.encode(example.completion, add_special_tokens=False)
    return target[len(opening) :] if target[: len(opening)] == opening else target


def tokenize(
    prompts: "PromptSet | Iterable[Example | tuple[str, str]]",
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    template: Template = "chat",
    prefill: str = "",
) -> list[Batch]:
    """Right-padded batches in the order of `prompts`; the completion's tokens are the targets.

    Prompt and completion are tokenised apart and concatenated; a completion that a model generated
    has its tokens already (`Example.tokens`).

    >>> hc.tokenize([("how to use it ?", "sure")], bridge.tokenizer)
    [Batch(1 example, 9 positions, 1 targets)]

    Args:
        prompts: requests with completions.
        tokenizer: a Hugging Face tokenizer, such as `bridge.tokenizer`.
        batch_size: the largest number of examples in a batch.
        max_tokens: the largest number of tokens in a batch, padding included; no bound by default.
        template: how a request is written (see `prompt_ids`).
        prefill: opens the completion. Its tokens are context, not targets; a completion that does
            not begin with them is taken to follow them.

    Raises:
        ValueError: an example whose request or completion has no tokens, or one longer than
            `max_tokens`. Whether a model can read the batches is looked at where one is given them.
    """
    #     context    request, and the prefill where there is one
    #     target     the rest of the completion
    opening = opening_ids(prefill, tokenizer)
    rows = []
    for index, example in enumerate(PromptSet.of(prompts)):
        context = prompt_ids(example.prompt, tokenizer, template) + opening
        target = target_ids(example, tokenizer, prefill)
        n_tokens = len(context) + len(target)
        is_long = max_tokens is not None and n_tokens > max_tokens
        if not context or not target or is_long:
            # Its text is not shown: it may be harmful.
            bound = f"; max_tokens={max_tokens}" if is_long else ""
            raise ValueError(
                f"tokenize: example {index} ({example.category or 'no category'}) has "
                f"{len(context)} tokens before its completion and {len(target)} to predict{bound}; "
                "drop it, or give it a request and a completion"
            )
        rows.append((context, target))
    groups = _groups(rows, batch_size, max_tokens)
    return [_padded(group, tokenizer) for group in groups if group]


def tokenize_text(
    text: str, tokenizer: Any, *, n_tokens: int = 256, batch_size: int = 16
) -> list[Batch]:
    """A plain text cut into windows, every token but the first of each a target."""
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    tokens = tokenizer.encode(text, add_special_tokens=False)
    step = n_tokens - len(opening)
    starts = range(0, len(tokens) - step + 1, step)
    windows = [opening + tokens[start : start + step] for start in starts]
    if not windows:
        raise ValueError(
            f"tokenize_text: {len(tokens)} tokens of text make no window of {n_tokens}; "
            "give a longer text"
        )
    whole = torch.tensor(windows)
    is_target = torch.ones_like(whole, dtype=torch.bool)
    is_target[:, 0] = False
    pairs = zip(whole.split(batch_size), is_target.split(batch_size), strict=True)
    return [Batch(*pair) for pair in pairs]


def at_matches(batches: Sequence[Batch], tokenizer: Any, pattern: str) -> list[Batch]:
    """The same texts with fewer targets: the tokens in which a match of the pattern begins.

    Matches are looked for in the text of an answer's tokens. Answers without any are left out.
    """
    kept = []
    for batch in batches:
        is_target = torch.zeros_like(batch.is_target)
        for row, tokens in enumerate(batch.tokens):
            places = batch.is_target[row].nonzero().flatten()
            pieces = [tokenizer.decode([token]) for token in tokens[places].tolist()]
            ends = list(accumulate(map(len, pieces)))
            for match in re.finditer(pattern, "".join(pieces)):
                is_target[row, places[bisect_right(ends, match.start())]] = True
        has_one = is_target.any(dim=1)
        if has_one.any():
            kept.append(Batch(batch.tokens[has_one], is_target[has_one]))
    return kept


def refuse_no_batches(function: str, batches: Any) -> None:
    """Check that token batches are given."""
    is_list = isinstance(batches, list | tuple)
    if not is_list or not batches or not all(isinstance(batch, Batch) for batch in batches):
        raise ValueError(
            f"{function}: no batches, or {type(batches).__name__} of something else; make them by "
            "tokenize(prompts, bridge.tokenizer), or give the .batches of calibration data"
        )


Row = tuple[list[int], list[int]]  # context, target


def _groups(rows: list[Row], batch_size: int, max_tokens: int | None) -> list[list[Row]]:
    """The rows of each batch: as many as both bounds allow, padding included."""
    # Padded to the longest row, n rows take n * longest tokens.
    groups: list[list[Row]] = [[]]
    longest = 0
    for row in rows:
        length = len(row[0]) + len(row[1])
        longest = max(longest, length)
        n_rows = len(groups[-1]) + 1
        is_too_wide = max_tokens is not None and n_rows * longest > max_tokens
        if n_rows > batch_size or is_too_wide:
            groups.append([])
            longest = length
        groups[-1].append(row)
    return groups


def _padded(rows: list[Row], tokenizer: Any) -> Batch:
    tokens = []
    is_target = []
    for context, target in rows:
        tokens.append(torch.tensor(context + target))
        is_target.append(torch.tensor([False] * len(context) + [True] * len(target)))
    return Batch(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=padding_id(tokenizer)),
        is_target=pad_sequence(is_target, batch_first=True, padding_value=False),
    )


LEAST_ANSWERS = 12  # different ones, for texts to be shared out by them


class UnpaddedText(NamedTuple):
    """An answer without padding, and the behaviour that it shows."""

    tokens: Int[Tensor, " pos"]
    is_target: Bool[Tensor, " pos"]
    behaviour: str = ""

    @property
    def request(self) -> tuple[int, ...]:
        """The tokens before the first target."""
        start = int(self.is_target.int().argmax())
        return tuple(self.tokens[:start].tolist())

    @property
    def answer(self) -> tuple[int, ...]:
        """The targets."""
        return tuple(self.tokens[self.is_target].tolist())


def split_for_checks(batches: Sequence[Batch], every: int) -> tuple[list[Batch], list[Batch]]:
    """Most texts, and those of every so many-th answer, in their order.

    Texts of one answer stay together: they may be one question in several wordings, and a check on
    what was seen in other words would pass what is new nowhere. Of every so many-th request where
    there are few answers, as to yes-or-no questions.
    """
    answers = {example.answer for example in unpadded(batches)}
    by_answer = len(answers) >= LEAST_ANSWERS
    numbers: dict[tuple[int, ...], int] = {}  # of each answer or request, as they come
    most, rest = [], []
    for batch in batches:
        is_rest = []
        for example in unpadded([batch]):
            key = example.answer if by_answer else example.request
            number = numbers.setdefault(key, len(numbers))
            is_rest.append(number % every == every - 1)
        for part, belongs in ((most, ~torch.tensor(is_rest)), (rest, torch.tensor(is_rest))):
            if belongs.any():
                part.append(Batch(batch.tokens[belongs], batch.is_target[belongs]))
    return most, rest


def unpadded(batches: Sequence[Batch], behaviour: str = "") -> list[UnpaddedText]:
    examples = []
    for batch in batches:
        lengths = batch.is_token.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            tokens = batch.tokens[row, :length]
            is_target = batch.is_target[row, :length]
            examples.append(UnpaddedText(tokens, is_target, behaviour))
    return examples


def batched(examples: Sequence[UnpaddedText], size: int) -> list[Batch]:
    """Some examples at a time, padded to one length; what stands there reaches no target."""
    batches = []
    for start in range(0, len(examples), size):
        group = examples[start : start + size]
        tokens = pad_sequence([example.tokens for example in group], batch_first=True)
        is_target = pad_sequence([example.is_target for example in group], batch_first=True)
        batches.append(Batch(tokens, is_target))
    return batches
