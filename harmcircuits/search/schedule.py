"""The schedule of a search: its stages, and what each step may do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RESCORED_AT = (0.0, 0.2, 0.4, 0.6)  # of the descent: weights are scored, candidates chosen anew
GROWTH_UNTIL = 0.3  # of the descent: the mask has its full size from here on
HARD_FROM = 0.5  # of the descent: gates are 0 or 1 in the model from here on
CHECK_INTERVAL = 5  # steps

SHRINKING = 0.2  # of the steps of the descent, for every smaller size
FURTHER = 0.05  # of the steps of the descent, after a mask that breaks a budget

# How far a gate moves in a step at most.
GATE_RATE = 0.3
SHRINKING_RATE = 0.15
LAST_RATE = 0.05


class Size(NamedTuple):
    """A size to search for: the share of all weights, and their number."""

    share: float
    n: int


class Step(NamedTuple):
    """The settings of one step."""

    n: int
    rate: float
    is_hard: bool = True
    is_checked: bool = False


@dataclass(frozen=True)
class Schedule:
    """The stages: each part of the descent to the largest size, then each smaller size."""

    steps: int
    sizes: Sequence[Size]  # the largest first

    @property
    def parts(self) -> list[range]:
        """The steps of the descent from one scoring to the next."""
        starts = [round(share * self.steps) for share in RESCORED_AT]
        ends = [*starts[1:], self.steps]
        parts = map(range, starts, ends)
        return [part for part in parts if part]

    @property
    def n_stages(self) -> int:
        return len(self.parts) + len(self.sizes) - 1

    def n_at(self, step: int) -> int:
        """The number of weights that a step of the descent may remove."""
        growth = min(1.0, (step + 1) / (GROWTH_UNTIL * self.steps))
        return max(1, round(growth * self.sizes[0].n))

    def descent(self, part: range) -> Iterator[Step]:
        """The steps of one part of the descent."""
        for number in part:
            progress = number / self.steps
            rate = GATE_RATE + (LAST_RATE - GATE_RATE) * progress
            is_hard = progress >= HARD_FROM
            is_checked = is_hard and number % CHECK_INTERVAL == 0
            yield Step(self.n_at(number), rate, is_hard, is_checked)

    def shrinking(self, larger: Size, smaller: Size) -> Iterator[Step]:
        """From one size to the next: n falls in the first half, and stays in the second."""
        n_steps = max(1, round(SHRINKING * self.steps))
        for number in range(n_steps):
            progress = min(1.0, 2 * (number + 1) / n_steps)
            n = round(larger.n + (smaller.n - larger.n) * progress)
            rate = SHRINKING_RATE + (LAST_RATE - SHRINKING_RATE) * number / n_steps
            yield Step(n, rate)

    def further(self, n: int) -> list[Step]:
        """The steps between one try to keep all budgets and the next."""
        n_steps = max(1, round(FURTHER * self.steps))
        return n_steps * [Step(n, LAST_RATE)]
