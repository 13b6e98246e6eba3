"""Double dissociation as a stated test over the rows of a cross-ablation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Literal, get_args

from support.curves import KEPT_RATE, rate_difference

from harmcircuits.measurements import Labels, Measurement, Rows

Outcome = Literal["clean double", "graded double", "single", "none"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Dissociation:
    """Two abilities, each with its circuit removed and with the other's."""

    first_gap: Measurement
    second_gap: Measurement
    first_cost: Measurement
    second_cost: Measurement

    @property
    def outcome(self) -> Outcome:
        """What the test says."""
        n_above = (self.first_gap.low > 0) + (self.second_gap.low > 0)
        if n_above == 0:
            return "none"
        if n_above == 1:
            return "single"
        largest_cost = max(self.first_cost.mean, self.second_cost.mean)
        return "clean double" if largest_cost <= KEPT_RATE else "graded double"

    def rows(self, labels: Labels) -> Rows:
        """The two gaps and costs, as metrics of these names."""
        rows = Rows()
        for part in fields(self):
            difference = getattr(self, part.name)
            rows += [replace(difference, metric=part.name, labels=labels)]
        return rows


def dissociation(first: Sequence[Measurement], second: Sequence[Measurement]) -> Dissociation:
    """The test for two abilities; intervals are Newcombe's (see `Measurement.difference`)."""
    for rates in (first, second):
        if len(rates) != 3 or len({row.metric for row in rates}) != 1:
            raise ValueError(
                f"dissociation: {[row.metric for row in rates]}; "
                "expected three rates of one metric: "
                "unpruned, under its own circuit, under the other's"
            )
    first_gap, first_cost = _gap_and_cost(first)
    second_gap, second_cost = _gap_and_cost(second)
    return Dissociation(first_gap, second_gap, first_cost, second_cost)


def _gap_and_cost(rates: Sequence[Measurement]) -> tuple[Measurement, Measurement]:
    # Rates of one ability, and the two differences taken of them:
    #
    #     unpruned    under its own circuit    under the other's
    #       98 %              4 %                    95 %
    #        |                 '------- gap: 91 -------|
    #        '------------- cost: 3 -------------------'
    unpruned, own, other = rates
    name, labels = unpruned.metric, other.labels
    gap = rate_difference(f"{name}_gap", labels, other, own)
    cost = rate_difference(f"{name}_cost", labels, unpruned, other)
    return gap, cost


def dissociations(
    rows: Rows,
    protected: str,
    metrics: Mapping[str, str],
) -> dict[tuple[str, str], Dissociation]:
    """(first, second) -> the test, for all pairs of behaviours whose circuits the rows name."""
    unpruned = rows.where(mask="none")
    pruned = rows.where(protected=protected)
    # A behaviour that the model does not show has no circuit.
    shown = []
    for name, metric in metrics.items():
        if pruned.where(metric, mask=name):
            shown.append(name)

    def rates(name: str, other: str) -> list[Measurement]:
        metric = metrics[name]
        before = unpruned.where(metric)[0]
        under_own = pruned.where(metric, mask=name)[0]
        under_other = pruned.where(metric, mask=other)[0]
        return [before, under_own, under_other]

    tests = {}
    for first, second in combinations(shown, 2):
        tests[first, second] = dissociation(rates(first, second), rates(second, first))
    return tests


def dissociations_from(
    first: str,
    rows: Rows,
    metrics: Mapping[str, str],
) -> Iterator[tuple[Labels, Dissociation]]:
    """The test of one behaviour against every other, in every model, seed and protection."""
    pruned = Rows(row for row in rows if "protected" in row.labels)
    for ladder, model, seed, protected in pruned.by("ladder", "model", "seed", "protected"):
        case = {"ladder": ladder, "model": model, "seed": seed}
        tests = dissociations(rows.where(**case), protected, metrics)
        for (other, second), test in tests.items():
            if other == first:
                yield {**case, "protected": protected, "second": second}, test
