"""Text in, token batches out."""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from harmcircuits.display import plural
from harmcircuits.prompt_files import given_rows, read_requests, requests_of

SPLITS = ("calibration", "choice", "heldout")
# The share of a file that goes to each split; the second where held-out requests come from a file
# of their own.
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
