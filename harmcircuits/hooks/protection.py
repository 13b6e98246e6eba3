"""What a search must spare: a price is put on some of its answers, and the others check masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import of_data, refuse_batches
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.measurements import Measurement, Z
from harmcircuits.prompts import Batch

CHECKED_EVERY = 3  # of so many answers one checks, and the others are priced
LEAST_ANSWERS = 12  # different ones, for texts to be shared out by them

Protect = Mapping[str, Sequence[Batch]] | Sequence[Sequence[Batch]]
Budget = float | Mapping[str, float]


@dataclass(frozen=True)
class Protection:
    """Behaviours to spare, and how far the loss of each may rise."""

    priced: Mapping[str, Sequence[Batch]]
    checked: Sequence[Batch]
    behaviours: Sequence[str]  # which each checked example shows
    unpruned: Float[Tensor, " n"]
    budgets: Mapping[str, float]

    @classmethod
    def of(cls, bridge: Bridge, protect: Protect, budget: Budget) -> "Protection":
        """The answers shared out among pricing and checking, and their losses now."""
        by_name = _named(protect)
        budgets = _budgets(budget, by_name)

        priced = {}
        examples: list[UnpaddedText] = []
        batch_size = 1
        for name, batches in by_name.items():
            refuse_batches(f"find_circuit: protected {name}", bridge, batches)
            priced[name], third = split_for_checks(batches, CHECKED_EVERY)
            examples += unpadded(third or priced[name], name)
            batch_size = max(batch_size, *map(len, batches))

        # Of like length together, since the shorter ones of a batch are padded.
        examples.sort(key=lambda example: len(example.tokens))
        checked = batched(examples, batch_size)
        names = [example.behaviour for example in examples]
        return cls(priced, checked, names, _losses(bridge, checked), budgets)

    def rises(self, bridge: Bridge, mask: WeightMask) -> list[Measurement]:
        """By how much each behaviour's loss on the checked answers is higher under a mask."""
        if not self.checked:
            return []
        change = _losses(bridge, self.checked, mask) - self.unpruned
        rows = []
        for name in self.priced:
            is_of_behaviour = torch.tensor([other == name for other in self.behaviours])
            rows.append(_with_normal_interval(name, change[is_of_behaviour]))
        return rows

    def allows(self, rises: Sequence[Measurement]) -> bool:
        """Whether no behaviour's loss rises by more than its budget."""
        return all(row.mean <= self.budgets[str(row.labels["protected"])] for row in rises)


def _losses(
    bridge: Bridge,
    checked: Sequence[Batch],
    mask: WeightMask | None = None,
) -> Float[Tensor, " n"]:
    """The loss of every checked example."""
    if not checked:
        return torch.empty(0)
    with of_data("protected, from the shortest answer on"):
        return completion_nll(bridge, checked, mask=mask)


def _with_normal_interval(name: str, values: Float[Tensor, " n"]) -> Measurement:
    """The mean rise of a behaviour's loss, with its standard error on either side times 1.96."""
    mean = values.mean().item()
    n = len(values)
    half = Z * values.std().item() / n**0.5 if n > 1 else 0.0
    return Measurement("protected_rise", {"protected": name}, mean, mean - half, mean + half, n)


# Sharing out


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


# What a caller gives


def _named(protect: Protect) -> dict[str, Sequence[Batch]]:
    """The batches of each behaviour to spare by name; those given in order are called 1, 2, ..."""
    if isinstance(protect, Mapping):
        return dict(protect)
    return {str(number): batches for number, batches in enumerate(protect, start=1)}


def _budgets(budget: Budget, protected: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    if not isinstance(budget, Mapping):
        budget = dict.fromkeys(protected, budget)
    if budget.keys() != protected.keys() or not all(value >= 0 for value in budget.values()):
        raise ValueError(
            f"find_circuit: budget={dict(budget)}; expected 0 or more nats per token for each of "
            f"{listed(protected)}"
        )
    return dict(budget)
