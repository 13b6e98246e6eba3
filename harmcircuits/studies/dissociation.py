"""Double dissociation as a stated test over the rows of a cross-ablation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harmcircuits.hooks.losses import difference
from harmcircuits.measurements import Measurement, select
from harmcircuits.views.tables import METRICS

SPARED = 0.10  # the other ability counts as spared when it loses at most this rate, by the end of its interval

Verdict = Literal["clean double", "graded double", "single", "none"]


@dataclass(frozen=True)
class Dissociation:
    """Two abilities, each with its circuit removed and with the other's.

    `first_gap`: rate of the first ability under the *second's* circuit minus under its own; `second_gap` likewise. Both
    compare one ability under two masks, so the abilities' different difficulty does not matter. `first_cost`: what the
    first ability loses under the second's circuit (unpruned minus masked); `second_cost` likewise.
    """

    first_gap: Measurement
    second_gap: Measurement
    first_cost: Measurement
    second_cost: Measurement

    @property
    def verdict(self) -> Verdict:
        """The test's outcome.

        `"graded double"`: both gaps are above zero by their 95 % intervals (both must be, so testing two needs no
        correction). `"clean double"`: besides, both costs are at most 10 points by the end of their intervals. `"single"`:
        one gap is above zero. `"none"`: neither.
        """
        above = (self.first_gap.low > 0) + (self.second_gap.low > 0)
        if above < 2:
            return "single" if above else "none"
        return "clean double" if max(self.first_cost.high, self.second_cost.high) <= SPARED else "graded double"


def dissociation(first: Sequence[Measurement], second: Sequence[Measurement]) -> Dissociation:
    """The test for two abilities from three rates of each: unpruned, under its own circuit, under the other's circuit.

    Intervals are Newcombe's from those of the rates (see `difference`). Raises ValueError for other than three rates, or
    rates of different metrics.
    """
    for rates in (first, second):
        if len(rates) != 3 or len({row.metric for row in rates}) != 1:
            raise ValueError(
                f"dissociation: {[row.metric for row in rates]}; expected three rates of one metric: unpruned, under "
                "its own circuit, under the other's"
            )
    (a_none, a_own, a_other), (b_none, b_own, b_other) = first, second
    return Dissociation(
        difference(f"{a_none.metric}_gap", a_other.labels, a_other, a_own),
        difference(f"{b_none.metric}_gap", b_other.labels, b_other, b_own),
        difference(f"{a_none.metric}_cost", a_other.labels, a_none, a_other),
        difference(f"{b_none.metric}_cost", b_other.labels, b_none, b_other),
    )


def dissociations(rows: Sequence[Measurement], protected: str) -> dict[tuple[str, str], Dissociation]:
    """(first, second) -> the test, for all pairs of the main behaviours whose circuits one model's rows name.

    `rows`: held-out rates of one model, unpruned (`mask` "none") and under circuits, `mask` naming the behaviour and
    `protected` what the circuit could not take.
    """
    whole, pruned = select(rows, mask="none"), select(rows, protected=protected)
    shown = [name for name, metric in METRICS.items() if select(pruned, metric, mask=name)]

    def rates(name: str, other: str) -> list[Measurement]:
        found = [select(whole, METRICS[name]), *(select(pruned, METRICS[name], mask=mask) for mask in (name, other))]
        return [one[0] for one in found]

    pairs = [(first, second) for i, first in enumerate(shown) for second in shown[i + 1 :]]
    return {pair: dissociation(rates(*pair), rates(*pair[::-1])) for pair in pairs}
