"""Texts as token ids: a request in its template, and batches with the tokens to predict."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.display import plural
from harmcircuits.prompts import Example, PromptSet


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template, with a system prompt or variables of the template."""

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
        is_target: True where the token is predicted from the earlier ones and counts in the loss.

    Raises:
        ValueError: different shapes, a row without a target, or a target at position 0.
    """

    tokens: Int[Tensor, "batch pos"]
    is_target: Bool[Tensor, "batch pos"]

    def __post_init__(self) -> None:
        is_pair = self.tokens.shape == self.is_target.shape and self.tokens.ndim == 2
        is_mask = is_pair and self.is_target.dtype == torch.bool
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
        n_positions = self.tokens.shape[1]
        examples = plural(len(self), "example")
        return f"Batch({examples}, {n_positions} positions, {n_targets} targets)"

    @property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """True up to the last target of each row; padding follows."""
        #     is_target              .  .  x  x  .
        #     targets from here on   2  2  2  1  0
        #     is_token               x  x  x  x  .
        n_targets = self.is_target.flip(1).cumsum(dim=1).flip(1)
        return n_targets > 0

    @property
    def n_read(self) -> int:
        """The number of positions before the last target, which a model reads to predict all."""
        return int(self.is_target.any(dim=0).nonzero().max())

    def beginning(self, n_first: int) -> "Batch":
        """The same texts with their first targets only.

        Args:
            n_first: the number of targets in each text.
        """
        number = self.is_target.cumsum(dim=1)  # 1 at the first target
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
    # First as text: the template writes its own special tokens, and `encode` must add none.
    try:
        text = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, **options
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses {chat}: {error}") from None
    if chat.system.strip() not in text:
        raise ValueError(
            "the tokenizer's chat template leaves out the system prompt of Chat(system=...); write "
            "it into the requests"
        )
    # Some templates begin the thinking in spite of `enable_thinking`.
    if text.rstrip().endswith(THINKING_BEGINS):
        text = text.rstrip() + THINKING_ENDS
    return tokenizer.encode(text, add_special_tokens=False)


def padding_id(tokenizer: Any) -> int:
    """The token that fills a batch: the tokenizer's own, else its end-of-text token, else 0."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def opening_ids(prefill: str, tokenizer: Any) -> list[int]:
    """Token ids of the prefill; none for an empty one."""
    return tokenizer.encode(prefill, add_special_tokens=False) if prefill else []


def target_ids(example: Example, tokenizer: Any, prefill: str = "") -> list[int]:
    """Token ids of a completion after the prefill: the tokens to predict."""
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

    Prompt and completion are tokenised separately and joined. A completion that a model generated
    has its tokens already (`Example.tokens`).

    >>> hc.tokenize([("how to use it ?", "sure")], bridge.tokenizer)
    [Batch(1 example, 9 positions, 1 targets)]

    Args:
        prompts: requests with completions.
        tokenizer: a Hugging Face tokenizer, such as `bridge.tokenizer`.
        batch_size: the largest number of examples in a batch.
        max_tokens: the largest number of tokens in a batch, padding included; no bound by default.
        template: how a request is written (see `prompt_ids`).
        prefill: text before the completion. Its tokens are context and no targets; a completion
            that does not begin with them follows them.

    Raises:
        ValueError: an example whose request or completion has no tokens, or one longer than
            `max_tokens`. Whether a model can read the batches is checked where it is given them.
    """
    #     context    request and prefill
    #     target     the completion after the prefill
    opening = opening_ids(prefill, tokenizer)
    texts = []
    for index, example in enumerate(PromptSet.of(prompts)):
        context = prompt_ids(example.prompt, tokenizer, template) + opening
        target = target_ids(example, tokenizer, prefill)
        tokens = torch.tensor(context + target)
        is_long = max_tokens is not None and len(tokens) > max_tokens
        if not context or not target or is_long:
            # Its text is not shown: it may be harmful.
            bound = f"; max_tokens={max_tokens}" if is_long else ""
            raise ValueError(
                f"tokenize: example {index} ({example.category or 'no category'}) has "
                f"{len(context)} tokens before its completion and {len(target)} to predict{bound}; "
                "drop it, or give it a request and a completion"
            )
        is_target = torch.arange(len(tokens)) >= len(context)
        texts.append(UnpaddedText(tokens, is_target))
    return batched(texts, batch_size, max_tokens, padding_id(tokenizer))


def tokenize_text(
    text: str, tokenizer: Any, *, n_tokens: int = 256, batch_size: int = 16
) -> list[Batch]:
    """A plain text in windows; every token of a window but the first is a target."""
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
    batches = []
    for tokens in torch.tensor(windows).split(batch_size):
        is_target = torch.ones_like(tokens, dtype=torch.bool)
        is_target[:, 0] = False
        batches.append(Batch(tokens, is_target))
    return batches


def at_matches(batches: Sequence[Batch], tokenizer: Any, pattern: str) -> list[Batch]:
    """The same texts with fewer targets: the tokens in which a match of the pattern begins.

    The pattern is searched in the text of an answer's tokens. Answers without a match are left out.
    """
    matches = []
    for batch in batches:
        is_target = torch.zeros_like(batch.is_target)
        for row, tokens in enumerate(batch.tokens):
            places = batch.is_target[row].nonzero().flatten()
            first_tokens = _match_tokens(tokens[places].tolist(), tokenizer, pattern)
            is_target[row, places[first_tokens]] = True
        has_match = is_target.any(dim=1)
        if has_match.any():
            matches.append(Batch(batch.tokens[has_match], is_target[has_match]))
    return matches


def _match_tokens(answer: list[int], tokenizer: Any, pattern: str) -> list[int]:
    """The position in an answer of each token in which a match begins; empty matches are none."""
    # Where each token ends in the text. Decoded alone, a token may lose its space.
    ends = [len(tokenizer.decode(answer[: n + 1])) for n in range(len(answer))]
    matches = re.finditer(pattern, tokenizer.decode(answer))
    return [bisect_right(ends, match.start()) for match in matches if match.group()]


def refuse_no_batches(function: str, batches: Any) -> None:
    """Check that `batches` are token batches."""
    is_list = isinstance(batches, list | tuple)
    if not is_list or not batches or not all(isinstance(batch, Batch) for batch in batches):
        raise ValueError(
            f"{function}: no batches, or {type(batches).__name__} of something else; make them by "
            "tokenize(prompts, bridge.tokenizer), or give the .batches of calibration data"
        )


# Texts without padding

MIN_ANSWERS = 12  # with fewer different answers, texts are split by request


class UnpaddedText(NamedTuple):
    """A text without padding, and the behaviour that it shows."""

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


def unpadded(batches: Sequence[Batch], behaviour: str = "") -> list[UnpaddedText]:
    """The texts of batches, in their order."""
    texts = []
    for batch in batches:
        lengths = batch.is_token.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            tokens = batch.tokens[row, :length]
            is_target = batch.is_target[row, :length]
            texts.append(UnpaddedText(tokens, is_target, behaviour))
    return texts


def batched(
    texts: Sequence[UnpaddedText],
    size: int,
    max_tokens: int | None = None,
    padding: int = 0,
) -> list[Batch]:
    """Batches of at most `size` texts and `max_tokens` tokens, in their order."""
    return [_padded(group, padding) for group in text_groups(texts, size, max_tokens)]


def _padded(texts: Sequence[UnpaddedText], padding: int) -> Batch:
    tokens = [text.tokens for text in texts]
    is_target = [text.is_target for text in texts]
    return Batch(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=padding),
        is_target=pad_sequence(is_target, batch_first=True),
    )


def text_groups(
    texts: Sequence[UnpaddedText], size: int, max_tokens: int | None
) -> list[list[UnpaddedText]]:
    """The texts of each batch: as many as both bounds allow, padding included, at least one."""
    # With padding, n texts take n * longest tokens.
    groups: list[list[UnpaddedText]] = []
    longest = 0
    for text in texts:
        length = len(text.tokens)
        longest = max(longest, length)
        n_texts = len(groups[-1]) + 1 if groups else size + 1
        is_too_wide = max_tokens is not None and n_texts * longest > max_tokens
        if n_texts > size or is_too_wide:
            groups.append([])
            longest = length
        groups[-1].append(text)
    return groups


def bounds(batches: Iterable[Batch]) -> tuple[int, int]:
    """The largest number of examples, and of tokens, in one of these batches."""
    batches = list(batches)
    return max(map(len, batches)), max(batch.tokens.numel() for batch in batches)


def split_for_checks(batches: Sequence[Batch], every: int) -> tuple[list[Batch], list[Batch]]:
    """Texts for scores, and every n-th answer's texts for checks, in their order.

    Texts with one answer stay together: they may be one question in several wordings, and a check
    would otherwise see rephrasings of texts that were scored. With few different answers, as to
    yes-or-no questions, the second list has the texts of every n-th request.
    """
    answers = {text.answer for text in unpadded(batches)}
    is_by_answer = len(answers) >= MIN_ANSWERS
    numbers: dict[tuple[int, ...], int] = {}  # of the answers or requests, in their order
    scored_texts, checks = [], []
    for batch in batches:
        flags = []
        for text in unpadded([batch]):
            key = text.answer if is_by_answer else text.request
            number = numbers.setdefault(key, len(numbers))
            flags.append(number % every == every - 1)
        is_check = torch.tensor(flags)
        for part, is_member in ((scored_texts, ~is_check), (checks, is_check)):
            if is_member.any():
                part.append(Batch(batch.tokens[is_member], batch.is_target[is_member]))
    return scored_texts, checks
