"""Requests with their answers, as sets that are split by request."""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from harmcircuits.display import plural
from harmcircuits.prompt_files import request_table, rows_of

SPLITS = ("calibration", "choice", "heldout")
# The share of a file in each split. The second line is for files whose held-out requests come from
# another file.
SHARES = {"calibration": 0.6, "choice": 0.15, "heldout": 0.25}
SHARES_WITHOUT_HELDOUT = {"calibration": 0.8, "choice": 0.2}
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
        group: the item that several examples are about; intervals treat the examples of a group as
            one independent unit. May be empty.
        label: the side of a contrast that the request is on, such as "safe" or "unsafe"; may be
            empty.
        tokens: the token ids that the model generated, without the end-of-text token; empty for a
            completion that came as text. A tokenizer may give other ids for the same text.
    """

    prompt: str
    completion: str = ""
    category: str = ""
    group: str = ""
    label: str = ""
    tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def cluster(self) -> str:
        """The unit of intervals, samples and splits: the group, or the request without a group."""
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
        shape: how the file was read, in one line; empty for examples that come from no file.
        n_left_out: the number of rows of the file that repeat another row and are left out.
    """

    examples: tuple[Example, ...]
    shape: str = field(default="", compare=False)
    n_left_out: int = field(default=0, compare=False)

    @classmethod
    def of(cls, items: "PromptSet | Iterable[Example | str | tuple[str, str]]") -> "PromptSet":
        """A set of examples, requests, or pairs of request and completion.

        >>> PromptSet.of(["who?", ("where?", "here")])
        PromptSet(2 examples, 1 completion)

        Args:
            items: the items of the set; a `PromptSet` comes back as it is.

        Raises:
            ValueError: an item of another type.
        """
        if isinstance(items, PromptSet):
            return items
        if isinstance(items, str):
            items = [items]
        return cls(tuple(_example(item) for item in items))

    @classmethod
    def read(
        cls,
        source: "str | Path | PromptSet | Iterable[Any]",
        columns: Mapping[str, str] | None = None,
    ) -> "PromptSet":
        """The requests of a file, a dataset, a table or a list.

        Files of AdvBench, HarmBench, JailbreakBench, StrongREJECT, XSTest and Alpaca, chat messages
        and files with a `prompt` column are recognised; `shape` names the format. A row that
        repeats an earlier row is left out.

        Args:
            source: a .jsonl, .json, .csv, .tsv, .txt (a request a line) or .parquet file, a Hugging
                Face dataset ("NAME", "NAME:SPLIT" or "NAME:CONFIG:SPLIT"; hub id or folder), rows
                (a list of dicts, a loaded dataset, a DataFrame), or the items of `PromptSet.of`.
            columns: the column of each field, such as {"prompt": "goal"}; our fields are prompt,
                completion, category, group and label.

        Raises:
            ValueError: a missing or malformed file, columns that are not recognised, or a dataset
                that cannot be opened.
        """
        rows = rows_of(source)
        if rows is None:
            return cls.of(cast("Iterable[Any]", source))  # a path has rows
        origin = str(source) if isinstance(source, str | Path) else "the given rows"
        table = request_table(rows, origin, columns or {})
        examples = tuple(Example(**texts, tokens=()) for texts in table.texts)
        return cls(examples, table.shape, table.n_left_out)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, where: slice) -> "PromptSet":
        return PromptSet(self.examples[where])

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
            completions: one completion for each request, as text or as the model generated it.

        Raises:
            ValueError: fewer or more completions than requests.
        """
        examples = []
        for example, completion in zip(self.examples, completions, strict=True):
            text, tokens = (completion, ()) if isinstance(completion, str) else completion
            examples.append(replace(example, completion=text, tokens=tokens))
        return PromptSet(tuple(examples))

    def sampled(self, share: float, *, seed: int, rest: bool = False) -> "PromptSet":
        """A random share of the groups of every category, each with all its examples, in order.

        At least one group of each category stays. The same seed draws the same groups from every
        set with the same groups.

        Args:
            share: of the groups, in (0, 1].
            seed: of the draw, without replacement.
            rest: whether to return the other groups instead: with a share of 0.5, the other half.
        """
        clusters: dict[str, set[str]] = {}
        for example in self.examples:
            clusters.setdefault(example.category, set()).add(example.cluster)

        # One generator for each category, and sorted names: the draw depends on nothing else.
        sample = set()
        for category, names in clusters.items():
            size = max(1, round(share * len(names)))
            generator = random.Random(f"{seed} {category}")
            for name in generator.sample(sorted(names), size):
                sample.add((category, name))
        return self.where(lambda example: ((example.category, example.cluster) in sample) != rest)

    def with_merged_clusters(self) -> "PromptSet":
        """The same examples; requests with the same words (see `plain_text`) share a group.

        Two groups with such a request in common become one group. It keeps the name of the group
        that comes first.
        """
        keys = [(example.cluster, plain_text(example.prompt)) for example in self]
        examples = []
        for example, cluster in zip(self, joined_clusters(keys), strict=True):
            if cluster != example.cluster:
                example = replace(example, group=cluster)
            examples.append(example)
        return replace(self, examples=tuple(examples))

    def splits(
        self,
        heldout: "PromptSet | None" = None,
        *,
        limits: Mapping[str, int] = NO_LIMITS,
        origin: str = "",
        placement: Mapping[str, str] = MappingProxyType({}),
    ) -> "dict[str, PromptSet]":
        """The requests by split, drawn by the hash of their group.

        A request therefore keeps its split when a file grows. Requests with the same words (see
        `plain_text`) are in one split, as one group.

        Args:
            heldout: the held-out requests. The set itself then has no held-out split, and its
                requests that repeat a held-out request, or share its group, are left out.
            limits: the largest number of groups by split; 0 for all. The groups with the lowest
                hashes stay.
            origin: the name of these requests in error messages.
            placement: the split of groups that are not drawn.

        Raises:
            ValueError: a split without requests.
        """
        first = heldout or ()
        examples = PromptSet((*first, *self)).with_merged_clusters()
        heldout_examples = examples[: len(first)]
        clusters = {example.cluster for example in heldout_examples}
        requests = examples[len(first) :].where(lambda example: example.cluster not in clusters)

        shares = SHARES if heldout is None else SHARES_WITHOUT_HELDOUT
        members: dict[str, list[Example]] = {split: [] for split in shares}
        for example in requests:
            split = placement.get(example.cluster) or _split_by_hash(example, shares)
            members.setdefault(split, []).append(example)
        sets = {split: PromptSet(tuple(examples)) for split, examples in members.items()}
        if heldout is not None:
            sets["heldout"] = heldout_examples

        for split, prompts in sets.items():
            if not len(prompts):
                raise ValueError(
                    f"{origin or 'splits'}: {plural(len(requests), 'request')} cannot fill the "
                    f"{split} split; give more"
                )
            sets[split] = _lowest_hashes(prompts, limits[split])
        return sets

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all texts of the examples, in order."""
        texts = []
        for example in self.examples:
            text = [example.prompt, example.completion]
            fields = [example.category, example.group, example.label]
            texts.append(text + fields if any(fields) else text)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _example(item: Any) -> Example:
    if isinstance(item, Example):
        return item
    if isinstance(item, str):
        return Example(item)
    if isinstance(item, tuple) and len(item) == 2:
        return Example(*item)
    raise ValueError(
        f"PromptSet: an item is {type(item).__name__}; expected a request (str), "
        "a pair of request and completion, or an Example"
    )


def plain_text(text: str) -> str:
    """The words of a text in small letters, with single spaces and without punctuation."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text.strip()


def plain_texts(sets: Iterable[PromptSet]) -> set[str]:
    """The plain text of every request of these sets."""
    return {plain_text(example.prompt) for example in chain.from_iterable(sets)}


def joined_clusters(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """The cluster of each item; items with a key in common share the first one's cluster.

    The first key of an item is the name of its cluster.
    """
    # A name and a text may read alike, so each key goes with its position in the item.
    owners: dict[tuple[int, str], int] = {}
    parents = list(range(len(keys)))

    def first(number: int) -> int:
        """The first item of the cluster so far."""
        while parents[number] != number:
            number = parents[number]
        return number

    for number, item in enumerate(keys):
        for key in enumerate(item):
            owner = owners.setdefault(key, number)
            start, end = sorted((first(owner), first(number)))
            parents[end] = start
    return [keys[first(number)][0] for number in range(len(keys))]


def _hash(example: Example) -> float:
    """A number in [0, 1) that depends on the group only."""
    digest = hashlib.sha256(example.cluster.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits, exact in a float


def _split_by_hash(example: Example, shares: Mapping[str, float]) -> str:
    """The split of a group: its hash in [0, 1), cut at the sums of the shares."""
    #     0              0.6            0.75          1
    #     | calibration  |    choice     |   heldout  |
    end = 0.0
    for split, share in shares.items():
        end += share
        if _hash(example) < end:
            return split
    return list(shares)[-1]  # sums of floats may end below 1


def _lowest_hashes(prompts: PromptSet, limit: int) -> PromptSet:
    """The examples of at most `limit` groups, which have the lowest hashes."""
    hashes = sorted({_hash(example) for example in prompts})
    if limit < 1 or len(hashes) <= limit:
        return prompts
    return prompts.where(lambda example: _hash(example) < hashes[limit])
