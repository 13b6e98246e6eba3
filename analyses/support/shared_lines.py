"""What the circuits of one model share and break, as lines of a table."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from support.dissociation import dissociations

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.summary import Roles

LIFTS = {"overlap_lift": "lift", "overlap_lift_marginal": "lift over rows and columns"}


def shared_lines(rows: Rows, tasks: Sequence[str], protected: Sequence[str]) -> dict[str, str]:
    """What one model has in each line of the table, by the line's title."""
    terms = Roles.standard()
    return {
        **_overlap_lines(rows, tasks, terms),
        **_ablation_lines(rows, protected, terms),
        **_place_lines(rows, terms),
    }


def _overlap_lines(rows: Rows, tasks: Sequence[str], terms: Roles) -> dict[str, str]:
    """What the target's circuit shares with others, and with itself found again."""
    target, twin = terms.target.name, terms.contrast.name
    one_shot = rows.where(selection="one shot")
    lines = {}
    for metric, null in LIFTS.items():
        for lift in one_shot.where(metric, first=target):
            if lift.labels["second"] != target:
                lines[f"{target} and {lift.labels['second']}, {null}"] = f"{lift:.1f}"
        for lift in _mean_of(one_shot.where(metric), list(combinations(tasks, 2))):
            lines[f"{', '.join(tasks)} among themselves, {null}"] = f"{lift:.1f}"
    for row in rows.where("content_lift"):
        lines[f"topics: {row.labels['relation']}, lift"] = f"{row:.1f}"
    for second, title in ((twin, twin), (target, "itself, found again")):
        for row in rows.where("overlap_jaccard", first=target, second=second, selection="search"):
            lines[f"{target} and {title}, Jaccard"] = f"{row:.2f}"
    return lines


def _ablation_lines(rows: Rows, protected: Sequence[str], terms: Roles) -> dict[str, str]:
    """What is left without the target's circuit, and from what the target dissociates."""
    target = terms.target.name
    lines = {}
    for spared in protected:
        without = rows.where(mask=target, protected=spared)
        for metric, title in terms.rates.items():
            for row in without.where(metric):
                lines[f"sparing {spared}: {title}"] = f"{row.mean:.0%}"
        for second, outcome in _outcomes(rows, spared, terms):
            lines[f"sparing {spared}: dissociates from {second}"] = outcome
    return lines


def _place_lines(rows: Rows, terms: Roles) -> dict[str, str]:
    """How much of the circuit lies in few neurons."""
    target = terms.target.name
    lines = {}
    for row in rows.where("top_share", mask=target, by="neuron"):
        title = "by chance" if row.labels["chance"] == "yes" else f"of {target}"
        lines[f"MLP weights in a twentieth of the neurons, {title}"] = f"{row.mean:.0%}"
    return lines


def _mean_of(lifts: Rows, pairs: Sequence[tuple[str, str]]) -> Rows:
    """One row: the mean over pairs with the widest ends; none where no pair was compared."""
    of_pairs: list[Measurement] = []
    for row in lifts:
        if (row.labels["first"], row.labels["second"]) in pairs:
            of_pairs.append(row.labelled(first="", second=""))
    return Rows(of_pairs).pool("seed")


def _outcomes(rows: Rows, protected: str, terms: Roles) -> Iterator[tuple[str, str]]:
    """Every other behaviour, and how the target dissociates from it."""
    metrics = {behaviour.name: behaviour.metric for behaviour in terms.behaviours}
    tests = dissociations(rows, protected, metrics)
    for (first, second), test in tests.items():
        if first == terms.target.name:
            yield second, test.outcome
