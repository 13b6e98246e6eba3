"""The shared weights and the damage of one model's circuits, as lines of a table."""

from collections.abc import Sequence
from itertools import combinations

from support.dissociation import dissociations

from harmcircuits.measurements import Rows
from harmcircuits.studies.summary import Roles

LIFTS = {"overlap_lift": "lift", "overlap_lift_marginal": "lift over rows and columns"}


def shared_lines(rows: Rows, tasks: Sequence[str], protected: Sequence[str]) -> dict[str, str]:
    """One model's text in each line of the table, by the line's title."""
    terms = Roles.standard()
    return {
        **_overlap_lines(rows, tasks, terms),
        **_ablation_lines(rows, protected, terms),
        **_place_lines(rows, terms),
    }


def _overlap_lines(rows: Rows, tasks: Sequence[str], terms: Roles) -> dict[str, str]:
    """What the target's circuit shares with others, and with a second circuit of the target."""
    target = terms.target.name
    twin = terms.contrast.name
    one_shot = rows.where(selection="one shot")
    lines = {}
    for metric, null in LIFTS.items():
        lifts = one_shot.where(metric)
        for lift in lifts.where(first=target):
            second = lift.labels["second"]
            if second != target:
                lines[f"{target} and {second}, {null}"] = f"{lift:.1f}"
        for lift in _mean_of(lifts, list(combinations(tasks, 2))):
            lines[f"{', '.join(tasks)} among themselves, {null}"] = f"{lift:.1f}"

    for row in rows.where("content_lift"):
        lines[f"topics: {row.labels['relation']}, lift"] = f"{row:.1f}"
    for second, title in ((twin, twin), (target, "itself, found again")):
        for row in rows.where("overlap_jaccard", first=target, second=second, selection="search"):
            lines[f"{target} and {title}, Jaccard"] = f"{row:.2f}"
    return lines


def _ablation_lines(rows: Rows, protected: Sequence[str], terms: Roles) -> dict[str, str]:
    """The rates without the target's circuit, and the behaviours that it dissociates from."""
    target = terms.target.name
    metrics = {behaviour.name: behaviour.metric for behaviour in terms.behaviours}
    lines = {}
    for protection in protected:
        pruned = rows.where(mask=target, protected=protection)
        for metric, title in terms.rates.items():
            for row in pruned.where(metric):
                lines[f"sparing {protection}: {title}"] = f"{row.mean:.0%}"
        tests = dissociations(rows, protection, metrics)
        for (first, second), test in tests.items():
            if first == target:
                lines[f"sparing {protection}: dissociates from {second}"] = test.outcome
    return lines


def _place_lines(rows: Rows, terms: Roles) -> dict[str, str]:
    """The share of the circuit in few neurons."""
    target = terms.target.name
    lines = {}
    for row in rows.where("top_share", mask=target, by="neuron"):
        title = "by chance" if row.labels["chance"] == "yes" else f"of {target}"
        lines[f"MLP weights in a twentieth of the neurons, {title}"] = f"{row.mean:.0%}"
    return lines


def _mean_of(lifts: Rows, pairs: Sequence[tuple[str, str]]) -> Rows:
    """One row: the mean over pairs with the widest ends; none where no pair was compared."""
    pair_lifts = Rows()
    for row in lifts:
        if (row.labels["first"], row.labels["second"]) in pairs:
            pair_lifts += [row.labelled(first="", second="")]
    return pair_lifts.pool("seed")
