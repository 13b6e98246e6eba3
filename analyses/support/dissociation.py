"""Double dissociation as a stated test over the rows of a cross-ablation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from support.curves import KEPT_RATE, rate_difference

from harmcircuits.measurements import Labels, Measurement, Rows

Outcome = Literal["clean double", "graded double", "single", "none"]
# What a constant answer reaches: half of the yes-or-no questions. Other abilities cannot be guessed.
CHANCE = {"recognition_accuracy": 0.5}


@dataclass(frozen=True)
class RivalEffect:
    """An ability under the circuit of another, which is its rival here.

    Gap and cost are differences of the ability's rates, with Newcombe's intervals:

        unpruned    under its own circuit    under the rival's
          98 %              4 %                    95 %
           |                 '------- gap: 91 -------|
           '------------- cost: 3 -------------------'
    """

    gap: Measurement
    cost: Measurement
    is_above_chance: bool

    @property
    def is_apart(self) -> bool:
        """Whether the ability loses more to its own circuit, and is no mere guess under the rival's."""
        return self.is_above_chance and self.gap.low > 0

    @property
    def is_kept(self) -> bool:
        """Whether the rival's circuit costs it no more than is kept, and it is no mere guess."""
        return self.is_above_chance and self.cost.mean <= KEPT_RATE


@dataclass(frozen=True)
class Dissociation:
    """Two abilities, each under its own circuit and under the circuit of the other."""

    first: RivalEffect
    second: RivalEffect

    @property
    def outcome(self) -> Outcome:
        """The outcome of the test."""
        n_apart = self.first.is_apart + self.second.is_apart
        if n_apart == 0:
            return "none"
        if n_apart == 1:
            return "single"
        return "clean double" if self.first.is_kept and self.second.is_kept else "graded double"

    def rows(self, labels: Labels) -> Rows:
        """The two gaps and costs, as metrics of these names."""
        differences = {
            "first_gap": self.first.gap,
            "second_gap": self.second.gap,
            "first_cost": self.first.cost,
            "second_cost": self.second.cost,
        }
        rows = []
        for name, difference in differences.items():
            rows.append(replace(difference, metric=name, labels=labels))
        return Rows(rows)


def dissociations(
    rows: Rows, protected: str, metrics: Mapping[str, str]
) -> dict[tuple[str, str], Dissociation]:
    """(first, second) -> the test, for all pairs of behaviours whose circuits the rows name."""
    unpruned = rows.where(mask="none")
    pruned = rows.where(protected=protected)
    # A behaviour that the model does not show has no circuit.
    names = [name for name, metric in metrics.items() if pruned.where(metric, mask=name)]

    def rival_effect(name: str, rival: str) -> RivalEffect:
        metric = metrics[name]
        whole = unpruned.where(metric)[0]
        under_own = pruned.where(metric, mask=name)[0]
        under_rival = pruned.where(metric, mask=rival)[0]
        labels = under_rival.labels
        gap = rate_difference(f"{metric}_gap", labels, under_rival, under_own)
        cost = rate_difference(f"{metric}_cost", labels, whole, under_rival)
        return RivalEffect(gap, cost, under_rival.low > CHANCE.get(metric, -1))

    tests = {}
    for first, second in combinations(names, 2):
        effects = rival_effect(first, second), rival_effect(second, first)
        tests[first, second] = Dissociation(*effects)
    return tests


def dissociations_from(
    target: str, rows: Rows, metrics: Mapping[str, str]
) -> Iterator[tuple[Labels, Dissociation]]:
    """The test of one behaviour against every other, in every model, seed and protection."""
    pruned = Rows(row for row in rows if "protected" in row.labels)
    for ladder, model, seed, protected in pruned.by("ladder", "model", "seed", "protected"):
        case = {"ladder": ladder, "model": model, "seed": seed}
        tests = dissociations(rows.where(**case), protected, metrics)
        for (first, second), test in tests.items():
            if first == target:
                yield {**case, "protected": protected, "second": second}, test
