"""Text in, token batches out."""

import hashlib
import json
import random
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.display import plural
from harmcircuits.prompt_files import given_rows, read_requests, requests_of


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template, with more than the request."""

    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


Template = Literal["chat", "raw"] | Chat

SPLITS = ("calibration", "choice", "heldout")
# The share of a file that goes to each split; the second where held-out requests come from a file
# of their own.
SHARES = {"calibration": 0.6, "choice": 0.15, "heldout": 0.25}
SHARES_WITHOUT_HELDOUT = {"calibration": 0.8, "choice": 0.2}
THINKING_BEGINS = "<think>"
THINKING_ENDS = "\n\n</think>\n\n"
NO_LIMITS: Mapping[str, int] = MappingProxyType(dict.fromkeys(SPLITS, 0))


@dataclass(frozen=True)
class Example:
    """One request and its completion.

    >>> hc.Example("how to use it ?", "sure", category="tools").cluster
    'how to use it ?'

    Attributes:
        prompt: the request.
        completion: the answer to be explained; empty where there is none.
        category: the type of harm, or the task; may be empty.
        group: what several examples have in common, such as the item that they are about, so that
            intervals can treat them as one independent unit; may be empty.
        label: the side of a contrast it is on, such as "safe" or "unsafe"; may be empty.
        tokens: the completion as the model generated it, in token ids, without the end-of-text
            token; empty for a completion that was given as text. Text that is tokenised again may
            have other tokens than those that were generated.
    """

    prompt: str
    completion: str = ""
    category: str = ""
    group: str = ""
    label: str = ""
    tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def cluster(self) -> str:
        """What counts once in intervals, samples and splits: the group, or else the request."""
        return self.group or self.prompt


class Answer(NamedTuple):
    """A completion as a model generated it."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class PromptSet:
    """An ordered, immutable set of examples.

    >>> hc.PromptSet.of(["how to use it ?", ("how to clean it ?", "sure")])
    PromptSet(2 examples, 1 completion)

    Attributes:
        examples: in their order.
        shape: how the file was read that they are from, in a line; empty where they are given.
        n_left_out: how many rows of the file repeat another and are not among them.
    """

    examples: tuple[Example, ...]
    shape: str = field(default="", compare=False)
    n_left_out: int = field(default=0, compare=False)

    @classmethod
    def of(cls, given: "PromptSet | Iterable[Example | str | tuple[str, str]]") -> "PromptSet":
        """A set of examples, requests, or pairs of request and completion.

        >>> PromptSet.of(["who?", ("where?", "here")])
        PromptSet(2 examples, 1 completion)

        Args:
            given: what to put into the set; a `PromptSet` comes back as it is.

        Raises:
            ValueError: an item of another type.
        """
        if isinstance(given, PromptSet):
            return given
        examples = []
        for item in [given] if isinstance(given, str) else given:
            if isinstance(item, Example):
                examples.append(item)
            elif isinstance(item, str):
                examples.append(Example(item))
            elif isinstance(item, tuple) and len(item) == 2:
                examples.append(Example(*item))
            else:
                raise ValueError(
                    f"PromptSet: an item is {type(item).__name__}; expected a request (str), "
                    "a pair of request and completion, or an Example"
                )
        return cls(tuple(examples))

    @classmethod
    def read(
        cls,
        source: "str | Path | PromptSet | Iterable[Any]",
        columns: Mapping[str, str] | None = None,
    ) -> "PromptSet":
        """Requests of a file or dataset, or those given.

        Files of AdvBench, HarmBench, JailbreakBench, StrongREJECT, XSTest and Alpaca, chat messages
        and files with a `prompt` column are recognised; `shape` says as what. A row that repeats
        an earlier one is left out.

        Args:
            source: a .jsonl, .json, .csv, .tsv, .txt (a request a line) or .parquet file, a Hugging
                Face dataset ("NAME", "NAME:SPLIT" or "NAME:CONFIG:SPLIT"; hub id or folder), rows
                (a list of dicts, a loaded dataset, a DataFrame), or what `PromptSet.of` takes.
            columns: which column holds what, such as {"prompt": "goal"}; our names are prompt,
                completion, category, group and label.

        Raises:
            ValueError: a missing or malformed file, columns that are not recognised, or a dataset
                that cannot be opened (see `read_requests`).
        """
        rows = given_rows(source)
        if isinstance(source, str | Path):
            requests = read_requests(source, columns)
        elif rows is not None:
            requests = requests_of(rows, "the given rows", columns)
        else:
            return cls.of(source)
        examples = [Example(**texts, tokens=()) for texts in requests.texts]
        return cls(tuple(examples), requests.shape, requests.n_left_out)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, where: slice) -> "PromptSet":
        return PromptSet(tuple(self.examples[where]))

    def __repr__(self) -> str:
        parts = [plural(len(self), "example")]
        n_completions = sum(bool(example.completion) for example in self)
        if n_completions:
            parts.append(plural(n_completions, "completion"))
        return f"PromptSet({', '.join(parts)})"

    def where(self, keep: Callable[[Example], bool]) -> "PromptSet":
        """The examples for which `keep(example)` is true, in order."""
        return PromptSet(tuple(example for example in self.examples if keep(example)))

    def with_completions(self, completions: "Sequence[str | Answer]") -> "PromptSet":
        """The same requests with these completions.

        Args:
            completions: the completion of each request, as text or as it was generated.

        Raises:
            ValueError: not exactly one for each request.
        """
        examples = []
        for example, completion in zip(self.examples, completions, strict=True):
            text, tokens = (completion, ()) if isinstance(completion, str) else completion
            examples.append(replace(example, completion=text, tokens=tokens))
        return PromptSet(tuple(examples))

    def sampled(self, share: float, *, seed: int, rest: bool = False) -> "PromptSet":
        """A random share of the groups of every category, each with all its examples, in order.

        At least one group of each category stays. The same seed draws the same groups from every
        set that asks about the same ones.

        Args:
            share: of the groups, in (0, 1].
            seed: draws them, without replacement.
            rest: the groups that were not drawn: with a share of 0.5, the other half.
        """
        groups: dict[str, set[str]] = {}
        for example in self.examples:
            groups.setdefault(example.category, set()).add(example.cluster)

        # A generator for each category, and names in order: the draw depends on nothing else.
        drawn = set()
        for category, names in groups.items():
            n_drawn = max(1, round(share * len(names)))
            generator = random.Random(f"{seed} {category}")
            drawn |= {(category, name) for name in generator.sample(sorted(names), n_drawn)}
        return self.where(lambda example: ((example.category, example.cluster) in drawn) != rest)

    def joined(self) -> "PromptSet":
        """The same examples; those that ask the same (see `plain_text`) share a group.

        So do all of two groups that have such a request in common. A group keeps the name that it
        has where it is met first.
        """
        keys = [(example.cluster, plain_text(example.prompt)) for example in self]
        examples = []
        for example, cluster in zip(self, joined_clusters(keys), strict=True):
            is_moved = cluster != example.cluster
            examples.append(replace(example, group=cluster) if is_moved else example)
        return replace(self, examples=tuple(examples))

    def splits(
        self,
        heldout: "PromptSet | None" = None,
        *,
        limits: Mapping[str, int] = NO_LIMITS,
        origin: str = "",
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> "dict[str, PromptSet]":
        """The requests by split, drawn by the hash of their group.

        A request therefore stays where it is when others are added. What asks the same as another
        (see `plain_text`) is in one split with it, as one group.

        Args:
            heldout: requests that are held out as they are. Then none of these are, and those that
                ask the same as one of them, or are of one group with it, are left out.
            limits: the largest number of groups by split; 0 for all. Those with the lowest hashes
                stay.
            origin: what error messages call these requests.
            known: the split of groups that is decided already.

        Raises:
            ValueError: a split without requests.
        """
        apart = tuple(heldout or ())
        together = PromptSet((*apart, *self.examples)).joined()
        measured = {example.cluster for example in together[: len(apart)]}
        requests = together[len(apart) :].where(lambda example: example.cluster not in measured)

        shares = SHARES if heldout is None else SHARES_WITHOUT_HELDOUT
        members: dict[str, list[Example]] = {split: [] for split in shares}
        for example in requests:
            split = known.get(example.cluster) or _drawn_split(example, shares)
            members.setdefault(split, []).append(example)
        sets = {split: PromptSet(tuple(examples)) for split, examples in members.items()}
        if heldout is not None:
            sets["heldout"] = together[: len(apart)]

        for split, examples in sets.items():
            if not len(examples):
                raise ValueError(
                    f"{origin}: {plural(len(requests), 'request')} cannot fill the {split} split; "
                    "give more"
                )
        return {split: _limited(examples, limits[split]) for split, examples in sets.items()}

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all texts of the examples, in order."""
        texts = []
        for example in self.examples:
            about = (example.category, example.group, example.label)
            texts.append((example.prompt, example.completion, *(about if any(about) else ())))
        text = json.dumps(texts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def plain_text(text: str) -> str:
    """A text as it is compared: without capitals, punctuation and spaces other than single ones."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text.strip()


def joined_clusters(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """The cluster of each item: those that have a key in common are in one, by its first name."""
    # A name and a text may read alike, so each key goes with its place.
    numbers: dict[tuple[int, str], int] = {}
    links = [(0, 0)]
    for item in keys:
        name, *others = [numbers.setdefault(key, len(numbers)) for key in enumerate(item)]
        links += [(name, other) for other in others]

    size = len(numbers) + 1
    graph = coo_array((np.ones(len(links)), tuple(zip(*links, strict=True))), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    names: dict[int, str] = {}
    for item in keys:
        names.setdefault(component[numbers[0, item[0]]], item[0])
    return [names[component[numbers[0, item[0]]]] for item in keys]


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


def _hash(example: Example) -> float:
    """A number in [0, 1) that depends on the group only."""
    digest = hashlib.sha256(example.cluster.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits, which a float holds exactly


def _drawn_split(example: Example, shares: Mapping[str, float]) -> str:
    """The split that a group falls into: its place in [0, 1), cut at the sums of the shares."""
    #     0              0.6            0.75          1
    #     | calibration  |    choice     |   heldout  |
    place, end = _hash(example), 0.0
    for split, share in shares.items():
        end += share
        if place < end:
            return split
    return list(shares)[-1]  # sums of floats may end below 1


def _limited(prompts: PromptSet, limit: int) -> PromptSet:
    """The examples of at most `limit` groups: those with the lowest hashes."""
    hashes = sorted({_hash(example) for example in prompts})
    if limit < 1 or len(hashes) <= limit:
        return prompts
    end = hashes[limit]
    return prompts.where(lambda example: _hash(example) < end)
