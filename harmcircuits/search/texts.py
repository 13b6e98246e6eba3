"""The texts of a search: groups with one role each, and the retain sets that check its masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.batches import (
    Batch,
    UnpaddedText,
    batched,
    bounds,
    split_for_checks,
    unpadded,
)
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import Bridge, evaluating
from harmcircuits.hooks.checks import naming_data, refuse_batches, refuse_not_finite
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.measurements import Measurement, Z

TEXTS_PER_STEP = 16  # of each group; of a retain set half as many

# Bounds of a text's part in the objective, nats per token.
TARGET_CAP = 0.7  # beyond it the model gives another answer, and more would only break the model
PREFERRED_FLOOR = 0.3
CONTRAST_CAP = 0.3
# With all gates closed a rise is rounding noise, and its sign must not decide what is penalised.
FREE_RISE = 1e-3

FIRST_MULTIPLIER = 2.0
MIN_MULTIPLIER = 0.3
MAX_MULTIPLIER = 20.0
MULTIPLIER_GROWTH = 1.15
BUDGET_SHARE = 0.7  # of a budget: losses rise more on texts that no step reads
RISE_DECAY = 0.8

CHECKED_EVERY = 3  # one answer in three checks masks, and no step reads it

Role = Literal["target", "preferred", "avoided", "protected"]
Protect = Mapping[str, Sequence[Batch]] | Sequence[Sequence[Batch]]
Budget = float | Mapping[str, float]
Losses = Float[Tensor, " n"]  # of each text


@dataclass
class TextGroup:
    """Texts with one role, their losses before the search, their multiplier and a sampler."""

    name: str
    role: Role
    objective: Objective = completion_loss
    weight: float = 1.0
    budget: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    examples: "list[UnpaddedText]" = field(default_factory=list)
    base_loss: Losses = field(default_factory=lambda: torch.empty(0))
    multiplier: float = FIRST_MULTIPLIER
    mean_rise: float = 0.0
    queue: list[int] = field(default_factory=list)

    def extend(self, bridge: Bridge, batches: Sequence[Batch]) -> None:
        """Add texts, with their losses on the model as it is."""
        with torch.no_grad(), evaluating(bridge), naming_data(self.name):
            losses = [self.objective(bridge, batch).float().cpu() for batch in batches]
            self.batches += batches
            self.base_loss = torch.cat([self.base_loss, *losses])
            refuse_not_finite(self.batches, self.base_loss, self.objective)
        self.examples += unpadded(batches)
        self.queue = []  # a new round over all texts begins

    @property
    def n_drawn(self) -> int:
        """The number of texts that a step draws, whatever the size of a batch."""
        n = min(TEXTS_PER_STEP, len(self.examples))
        return ceil(n / 2) if self.role == "protected" else n

    def draw(self, generator: torch.Generator) -> list[int]:
        """The numbers of the next texts; every text comes once before any comes again."""
        numbers: list[int] = []
        while len(numbers) < self.n_drawn:
            if not self.queue:
                order = torch.randperm(len(self.examples), generator=generator)
                self.queue = order.tolist()
            number = self.queue.pop()
            numbers.append(number)
        return numbers

    def loss_term(self, loss: Losses, rise: Losses) -> Tensor:
        """The term of these texts, which a step has drawn, in its objective."""
        if self.role == "target":
            terms = -self.weight * rise.clamp(max=TARGET_CAP)
        elif self.role == "preferred":
            terms = loss.clamp(min=PREFERRED_FLOOR)
        elif self.role == "avoided":
            terms = -rise.clamp(max=CONTRAST_CAP)
        else:
            # A fall earns nothing: it would make other good answers less likely.
            terms = self.multiplier * (rise - FREE_RISE).clamp(min=0)
        return terms.sum() / self.n_drawn

    def update_multiplier(self, rise: float) -> None:
        """Raise the multiplier where the mean rise is near the budget, and lower it elsewhere."""
        self.mean_rise = RISE_DECAY * self.mean_rise + (1 - RISE_DECAY) * rise
        is_near = self.mean_rise > BUDGET_SHARE * self.budget
        self.scale_multiplier(MULTIPLIER_GROWTH if is_near else 1 / MULTIPLIER_GROWTH)

    def scale_multiplier(self, ratio: float) -> None:
        """Multiply the multiplier, within its bounds."""
        product = self.multiplier * ratio
        self.multiplier = min(MAX_MULTIPLIER, max(MIN_MULTIPLIER, product))


@dataclass(frozen=True)
class Protection:
    """Retain sets by name: most answers train the gates, one in three checks masks."""

    training: Mapping[str, Sequence[Batch]]
    checks: Sequence[Batch]
    behaviours: Sequence[str]  # of each example in `checks`
    base_loss: Losses  # of these, before the search
    budgets: Mapping[str, float]  # nats per token

    @classmethod
    def of(cls, bridge: Bridge, protect: Protect, budget: Budget) -> "Protection":
        if not isinstance(protect, Mapping):
            protect = {str(number): batches for number, batches in enumerate(protect, start=1)}
        if not isinstance(budget, Mapping):
            budget = dict.fromkeys(protect, budget)
        _refuse_budgets(budget, protect)

        training = {}
        examples: list[UnpaddedText] = []
        for name, batches in protect.items():
            refuse_batches(f"find_circuit: protected {name}", bridge, batches)
            training[name], third = split_for_checks(batches, CHECKED_EVERY)
            examples += unpadded(third or training[name], name)

        # Sorted by length, since the shorter texts of a batch are padded.
        examples.sort(key=lambda example: len(example.tokens))
        retain_batches = [batch for batches in protect.values() for batch in batches]
        checks = batched(examples, *bounds(retain_batches)) if retain_batches else []
        behaviours = [example.behaviour for example in examples]
        base_loss = _losses(bridge, checks) if checks else torch.empty(0)
        return cls(training, checks, behaviours, base_loss, dict(budget))

    def rises(self, bridge: Bridge, mask: WeightMask) -> list[Measurement]:
        """How far a mask raises the mean loss of every retain set on the answers that check it."""
        if not self.checks:
            return []
        rise = _losses(bridge, self.checks, mask) - self.base_loss
        rows = []
        for name in self.training:
            is_named = torch.tensor([behaviour == name for behaviour in self.behaviours])
            row = _with_normal_interval(name, rise[is_named])
            rows.append(row)
        return rows

    def allows(self, rises: Sequence[Measurement]) -> bool:
        """Whether every loss stays within its budget."""
        for name, row in zip(self.training, rises, strict=True):
            if row.mean > self.budgets[name]:
                return False
        return True


def _losses(bridge: Bridge, checks: Sequence[Batch], mask: WeightMask | None = None) -> Losses:
    with naming_data("protected, from the shortest answer on"):
        return completion_nll(bridge, checks, mask=mask)


def _with_normal_interval(name: str, values: Losses) -> Measurement:
    """The mean rise, 1.96 standard errors on either side."""
    n = len(values)
    mean = values.mean().item()
    half = 0.0
    if n > 1:
        half = Z * values.std().item() / n**0.5
    return Measurement(
        metric="protected_rise",
        labels={"protected": name},
        mean=mean,
        low=mean - half,
        high=mean + half,
        n=n,
    )


def _refuse_budgets(budget: Mapping[str, float], protect: Mapping[str, Sequence[Batch]]) -> None:
    if budget.keys() != protect.keys() or not all(value >= 0 for value in budget.values()):
        raise ValueError(
            f"find_circuit: budget={dict(budget)}; expected 0 or more nats per token for each of "
            f"{listed(protect)}"
        )
