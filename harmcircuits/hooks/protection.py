"""What a search must spare: a price is put on some of its answers, and the others check masks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed, nearest
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import NotFiniteError, refuse_batches
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.measurements import Label, Measurement, Z
from harmcircuits.prompts import Batch

CHECKED_EVERY = 3  # of so many requests one checks, and the others are priced

Protect = Mapping[str, Sequence[Batch]] | Sequence[Sequence[Batch]]
Budget = float | Mapping[str, float]


@dataclass(frozen=True)
class Protection:
    """Behaviours to spare, and how far the loss of each may rise."""

    priced: Mapping[str, Sequence[Batch]]
    checked: Sequence[Batch]
    behaviour: Int[Tensor, " n"]
    unpruned: Float[Tensor, " n"]
    budgets: Mapping[str, float]

    @classmethod
    def of(cls, bridge: Bridge, protect: Protect, budget: Budget) -> "Protection":
        """The answers shared out among pricing and checking, and their losses now."""
        by_name = named(protect)
        budgets = _budgets(budget, by_name)

        priced = {}
        examples: list[_Example] = []
        for number, (name, batches) in enumerate(by_name.items()):
            refuse_batches(f"find_circuit: protected {name}", bridge, batches)
            most, third = split_by_request(batches, CHECKED_EVERY)
            priced[name] = most
            examples += _examples(third or most, number)

        examples = _by_length(examples)
        checked = _batched(examples, _largest_batch(by_name.values()))
        behaviour = torch.tensor([example.behaviour for example in examples], dtype=torch.int64)
        names = [list(priced)[number] for number in behaviour.tolist()]
        unpruned = _losses(bridge, checked, names)
        return cls(priced, checked, behaviour, unpruned, budgets)

    def rises(self, bridge: Bridge, mask: WeightMask) -> list[Measurement]:
        """By how much each behaviour's loss on the checked answers is higher under a mask."""
        if not self.checked:
            return []
        names = [list(self.priced)[number] for number in self.behaviour.tolist()]
        change = _losses(bridge, self.checked, names, mask) - self.unpruned
        rows = []
        for number, name in enumerate(self.priced):
            of_behaviour = change[self.behaviour == number]
            where = {"protected": name}
            rows.append(_with_normal_interval("protected_rise", where, of_behaviour))
        return rows

    def allows(self, rises: Sequence[Measurement]) -> bool:
        """Whether no behaviour's loss rises by more than its budget."""
        return not self.broken(rises)

    def broken(self, rises: Sequence[Measurement]) -> list[str]:
        """The behaviours whose loss rises by more than their budget."""
        names = []
        for row in rises:
            name = str(row.labels["protected"])
            if not row.mean <= self.budgets[name]:
                names.append(name)
        return names


def _losses(
    bridge: Bridge,
    checked: Sequence[Batch],
    names: Sequence[str],
    mask: WeightMask | None = None,
) -> Float[Tensor, " n"]:
    """The loss of every checked example; an error says to which behaviour it belongs."""
    if not checked:
        return torch.empty(0)
    try:
        return completion_nll(bridge, checked, mask=mask)
    except NotFiniteError as error:
        if error.index is None:
            raise
        text = f"{names[error.index]}, checked from the shortest answer on: {error}"
        raise NotFiniteError(text, error.index) from None


class _Example(NamedTuple):
    """An answer without padding, and the number of the behaviour that it shows."""

    tokens: Int[Tensor, " pos"]
    is_target: Bool[Tensor, " pos"]
    behaviour: int = 0

    @property
    def request(self) -> tuple[int, ...]:
        """The tokens before the first target."""
        start = int(self.is_target.int().argmax())
        return tuple(self.tokens[:start].tolist())


def priced_batches(protect: Protect) -> list[list[Batch]]:
    """Of each behaviour to spare, the batches that a price is put on."""
    priced = []
    for batches in named(protect).values():
        most, _ = split_by_request(batches, CHECKED_EVERY)
        priced.append(most)
    return priced


def checked_batches(protect: Protect) -> list[Batch]:
    """The batches on which masks are checked, of all behaviours to spare together."""
    by_name = named(protect)
    examples: list[_Example] = []
    for number, batches in enumerate(by_name.values()):
        most, third = split_by_request(batches, CHECKED_EVERY)
        examples += _examples(third or most, number)
    return _batched(_by_length(examples), _largest_batch(by_name.values()))


def split_by_request(batches: Sequence[Batch], every: int) -> tuple[list[Batch], list[Batch]]:
    """The examples of most requests, and those of every so many-th, in their order."""
    numbers: dict[tuple[int, ...], int] = {}  # of each request, as they come
    most, rest = [], []
    for batch in batches:
        is_rest = []
        for example in _examples([batch]):
            number = numbers.setdefault(example.request, len(numbers))
            is_rest.append(number % every == every - 1)
        _add_rows(most, batch, [row for row, belongs in enumerate(is_rest) if not belongs])
        _add_rows(rest, batch, [row for row, belongs in enumerate(is_rest) if belongs])
    return most, rest


def _add_rows(batches: list[Batch], batch: Batch, rows: list[int]) -> None:
    if rows:
        part = Batch(batch.tokens[rows], batch.is_target[rows])
        batches.append(part)


def _examples(batches: Sequence[Batch], behaviour: int = 0) -> list[_Example]:
    examples = []
    for batch in batches:
        lengths = batch.is_token.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            tokens = batch.tokens[row, :length]
            is_target = batch.is_target[row, :length]
            examples.append(_Example(tokens, is_target, behaviour))
    return examples


def _largest_batch(protected: Iterable[Sequence[Batch]]) -> int:
    sizes = map(len, chain.from_iterable(protected))
    return max(sizes, default=1)


def _by_length(examples: list[_Example]) -> list[_Example]:
    """Of like length together, since the shorter ones of a batch are padded."""
    return sorted(examples, key=lambda example: len(example.tokens))


def _batched(examples: Sequence[_Example], size: int) -> list[Batch]:
    """Some examples at a time, padded to one length; what stands there reaches no target."""
    batches = []
    for start in range(0, len(examples), size):
        group = examples[start : start + size]
        tokens = [example.tokens for example in group]
        is_target = [example.is_target for example in group]
        batch = Batch(
            pad_sequence(tokens, batch_first=True),
            pad_sequence(is_target, batch_first=True),
        )
        batches.append(batch)
    return batches


def named(protect: Protect) -> dict[str, Sequence[Batch]]:
    """The batches of each behaviour to spare by name; those given in order are called 1, 2, ..."""
    if isinstance(protect, Mapping):
        by_name = dict(protect)
    else:
        numbers = map(str, range(1, len(protect) + 1))
        by_name = dict(zip(numbers, protect, strict=True))
    for name, batches in by_name.items():
        if not batches:
            raise ValueError(
                f"find_circuit: no batches of what is protected ({name}); leave it out"
            )
    return by_name


def _budgets(budget: Budget, protected: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    if not isinstance(budget, Mapping):
        budget = dict.fromkeys(protected, budget)
    for name, value in budget.items():
        if name not in protected:
            raise ValueError(
                f"find_circuit: a budget for {name!r}, which is not protected; "
                f"{nearest(name, protected)}"
            )
        if not value >= 0:
            raise ValueError(
                f"find_circuit: budget={value} for {name!r}; expected 0 or more nats per token"
            )
    missing = [name for name in protected if name not in budget]
    if missing:
        raise ValueError(f"find_circuit: no budget for {listed(missing)}; give one for each")
    return dict(budget)


def _with_normal_interval(
    metric: str, labels: Mapping[str, Label], values: Float[Tensor, " n"]
) -> Measurement:
    """The mean of some values, with its standard error on either side times 1.96."""
    mean = values.mean().item()
    n = len(values)
    half = Z * values.std().item() / n**0.5 if n > 1 else 0.0
    return Measurement(metric, labels, mean, mean - half, mean + half, n)
