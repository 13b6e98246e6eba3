"""What a search reads: texts of every role with their losses, and checks that no step has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.batches import Batch, UnpaddedText, batched, split_for_checks, unpadded
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import naming_data, refuse_batches, refuse_not_finite
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.measurements import Measurement, Z

TEXTS = 16  # of the target in a step, and of what stands beside it; half as many of what is kept

CAP = 0.7  # nats a token: beyond it a text gives another answer, and more would only break it
ENOUGH = 0.3  # nats a token of what is preferred
MOST_AVOIDED = 0.3  # nats a token that the loss of what is avoided may rise and earn
FIRST_MULTIPLIER, GROWTH, NEAR = 2.0, 1.15, 0.7  # of a budget: what is unseen loses more
LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.3, 20.0
MEMORY = 0.8  # of the rises that multipliers look at

CHECKED_EVERY = 3  # of so many answers one checks, and the others are priced

Role = Literal["target", "preferred", "avoided", "protected"]
SIGNS = {"target": -1.0, "preferred": 1.0, "avoided": -1.0}  # of the loss, in the benefit
Protect = Mapping[str, Sequence[Batch]] | Sequence[Sequence[Batch]]
Budget = float | Mapping[str, float]


@dataclass
class Texts:
    """Texts of one kind: what they are for, the loss of each before, and how they are drawn."""

    name: str
    role: Role
    batches: Sequence[Batch]
    objective: Objective
    weight: float
    budget: float
    examples: "Sequence[UnpaddedText]"
    before: Float[Tensor, " n"]
    multiplier: float = FIRST_MULTIPLIER
    rise: float = 0.0  # of late
    left: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        bridge: Bridge,
        name: str,
        role: Role,
        batches: Sequence[Batch],
        objective: Objective = completion_loss,
        *,
        weight: float = 1.0,
        budget: float = 0.0,
    ) -> "Texts":
        with torch.no_grad(), naming_data(name):
            losses = [objective(bridge, batch).float().cpu() for batch in batches]
            before = torch.cat(losses)
            refuse_not_finite(batches, before, objective)
        return cls(name, role, batches, objective, weight, budget, unpadded(batches), before)

    def add(self, bridge: Bridge, batches: Sequence[Batch]) -> None:
        """Further texts, and their losses on the model as it is."""
        more = Texts.of(bridge, self.name, self.role, batches, self.objective)
        self.batches = [*self.batches, *batches]
        self.examples = [*self.examples, *more.examples]
        self.before = torch.cat([self.before, more.before])
        self.left = []  # so that a round of all begins

    @property
    def n_drawn(self) -> int:
        """How many are drawn for a step: no more than the caller scores at once."""
        n = min(TEXTS, max(map(len, self.batches)))
        return ceil(n / 2) if self.role == "protected" else n

    def draw(self, generator: torch.Generator) -> list[int]:
        """The numbers of the next texts; each comes once before one comes again."""
        drawn: list[int] = []
        while len(drawn) < self.n_drawn:
            if not self.left:
                self.left = torch.randperm(len(self.examples), generator=generator).tolist()
            drawn.append(self.left.pop())
        return drawn

    def part_of_loss(self, now: Float[Tensor, " n"], rise: Float[Tensor, " n"]) -> Tensor:
        """What some of a step's texts add to the loss that the gates descend."""
        if self.role == "target":
            parts = -self.weight * rise.clamp(max=CAP)
        elif self.role == "preferred":
            parts = now.clamp(min=ENOUGH)
        elif self.role == "avoided":
            parts = -rise.clamp(max=MOST_AVOIDED)
        else:
            # No gain where it falls: answers that become surer leave other good ones less likely.
            parts = self.multiplier * rise.clamp(min=0)
        return parts.sum() / self.n_drawn

    def weigh(self, rise: float) -> None:
        """Remember a rise, and let the multiplier follow how near it is to the budget."""
        self.rise = MEMORY * self.rise + (1 - MEMORY) * rise
        is_near = self.rise > NEAR * self.budget
        self.make_dearer(GROWTH if is_near else 1 / GROWTH)

    def make_dearer(self, factor: float) -> None:
        """Multiply the multiplier, within its bounds."""
        multiplier = self.multiplier * factor
        self.multiplier = min(MOST_MULTIPLIER, max(LEAST_MULTIPLIER, multiplier))


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
    with naming_data("protected, from the shortest answer on"):
        return completion_nll(bridge, checked, mask=mask)


def _with_normal_interval(name: str, values: Float[Tensor, " n"]) -> Measurement:
    """The mean rise of a behaviour's loss, with its standard error on either side times 1.96."""
    mean = values.mean().item()
    n = len(values)
    half = Z * values.std().item() / n**0.5 if n > 1 else 0.0
    return Measurement("protected_rise", {"protected": name}, mean, mean - half, mean + half, n)


# Sharing out


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
