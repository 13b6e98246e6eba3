"""Double dissociation as a stated test over the rows of a cross-ablation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from support.curves import KEPT_RATE

from harmcircuits.measurements import Labels, Measurement, Rows

Outcome = Literal["clean double", "graded double", "single", "none"]


@dataclass(frozen=True)
class Dissociation:
    """Two abilities, each under its own circuit and under the circuit of the other.

    Gaps and costs are differences of one ability's rates, with Newcombe's intervals:

        unpruned    under its own circuit    under the other's
          98 %              4 %                    95 %
           |                 '------- gap: 91 -------|
           '------------- cost: 3 -------------------'
    """

    first_gap: Measurement
    second_gap: Measurement
    first_cost: Measurement
    second_cost: Measurement

    @property
    def outcome(self) -> Outcome:
        """The outcome of the test."""
        n_above = (self.first_gap.low > 0) + (self.second_gap.low > 0)
        if n_above == 0:
            return "none"
        if n_above == 1:
            return "single"
        largest_cost = max(self.first_cost.mean, self.second_cost.mean)
        return "clean double" if largest_cost <= KEPT_RATE else "graded double"

    def rows(self, labels: Labels) -> Rows:
        """The two gaps and costs, as metrics of these names."""
        rows = []
        for name, difference in vars(self).items():
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

    def gap_and_cost(name: str, rival: str) -> tuple[Measurement, Measurement]:
        metric = metrics[name]
        whole = unpruned.where(metric)[0]
        under_own = pruned.where(metric, mask=name)[0]
        under_rival = pruned.where(metric, mask=rival)[0]
        labels = under_rival.labels
        gap = Measurement.difference(f"{metric}_gap", labels, under_rival, under_own)
        cost = Measurement.difference(f"{metric}_cost", labels, whole, under_rival)
        return gap, cost

    tests = {}
    for first, second in combinations(names, 2):
        first_gap, first_cost = gap_and_cost(first, second)
        second_gap, second_cost = gap_and_cost(second, first)
        tests[first, second] = Dissociation(first_gap, second_gap, first_cost, second_cost)
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
