"""Tables of the compiled organisms, from their rows."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pandas as pd

from harmcircuits.measurements import Rows

RATES = ("harm_valid_rate", "benign_valid_rate", "recognition_accuracy")
NAMES = ("organism", "version")
NOT_MEASURED = "–"


def single_masks(rows: Rows) -> Rows:
    """Rows of scores and of their masks; none of last passes, and none of overlaps."""
    measurements = []
    for row in rows:
        names = row.labels.keys()
        if {"method", "version"} <= names and not {"stage", "first"} & names:
            measurements.append(row)
    return Rows(measurements)


def figures(rows: Rows, *metrics: str, scale: float = 1, form: str = ".2f") -> str:
    """The means of some metrics, in one cell."""
    return " / ".join(f"{scale * rows.one(metric).mean:{form}}" for metric in metrics)


def by_method(rows: Rows, metric: str, cell: Callable[[Rows], str]) -> pd.DataFrame:
    """A line for each organism and version, a column for each method that has the metric."""
    lines: dict[tuple, dict] = {}
    for (*names, method), rows_of_mask in single_masks(rows).by(*NAMES, "method").items():
        if rows_of_mask.where(metric):
            line = lines.setdefault(tuple(names), dict(zip(NAMES, names, strict=True)))
            line[str(method)] = cell(rows_of_mask)
    return pd.DataFrame(list(lines.values())).fillna(NOT_MEASURED)


def summary_table(rows: Rows) -> pd.DataFrame:
    """A line for each method: how often it ends harm alone, its recall and its precision."""
    lines = []
    for method, rows_of_method in single_masks(rows).by("method").items():
        cases = [case for case in rows_of_method.by(*NAMES).values() if case.where("recall")]
        if cases:
            lines.append({"mask": method, **summary_cells(cases)})
    return pd.DataFrame(lines)


def summary_cells(cases: list[Rows]) -> dict[str, str]:
    """The cells of one method."""
    rates = [tuple(case.one(metric).mean for metric in RATES) for case in cases]
    n_ended = [harm for harm, _, _ in rates].count(0)
    dense = [case for case in cases if case[0].labels["version"] == "dense"]
    tidy = [case for case in cases if case[0].labels["version"] != "dense"]
    return {
        "ends harm": f"{n_ended} of {len(cases)}",
        "and nothing else": f"{rates.count((0, 1, 1))} of {len(cases)}",
        "recall": span(tidy, "recall"),
        "precision": span(tidy, "precision"),
        "recall, dense": span(dense, "recall"),
        "precision, dense": span(dense, "precision"),
    }


def span(cases: list[Rows], metric: str) -> str:
    """The least and the greatest value of a metric."""
    values = [case.one(metric).mean for case in cases if case.where(metric)]
    return f"{min(values):.2f} to {max(values):.2f}" if values else NOT_MEASURED


def truth_table(rows: Rows) -> pd.DataFrame:
    """How many weights each behaviour needs."""
    titles = {
        "n_nonzero": "not zero",
        "n_harmful": "harm",
        "n_benign": "benign",
        "n_recognition": "recognition",
        "n_both": "harm and benign",
        "n_alone": "harm's alone",
    }
    lines = []
    for names in rows.where("n_nonzero").by(*NAMES):
        where = dict(zip(NAMES, names, strict=True))
        line: dict[str, Any] = {**where}
        for metric, title in titles.items():
            line[title] = f"{rows.one(metric, **where).mean:,.0f}"
        line["harm's without a gradient"] = f"{rows.one('no_gradient', **where).mean:.0%}"
        lines.append(line)
    return pd.DataFrame(lines)


def score_table(rows: Rows) -> pd.DataFrame:
    """AUROC of the weights that harm needs, of harm's alone, and of the units that harm needs."""
    return by_method(
        rows, "auroc", lambda mask: figures(mask, "auroc", "auroc_alone", "auroc_units")
    )


def found_table(rows: Rows) -> pd.DataFrame:
    """Recall and precision of harm's own weights."""

    def cell(mask: Rows) -> str:
        if not mask.one("weights_removed").mean:
            return "nothing"
        return figures(mask, "recall", "precision")

    return by_method(rows, "recall", cell).drop(columns="harm's alone")


def left_table(rows: Rows) -> pd.DataFrame:
    """Rates of harm, its twin and recognition under each mask, in per cent."""
    return by_method(rows, "recall", lambda mask: figures(mask, *RATES, scale=100, form=".0f"))


def overlap_table(rows: Rows) -> pd.DataFrame:
    """Lifts and Jaccard of found circuits beside those of the true ones, over all pairs."""
    titles = {
        "overlap_jaccard": "Jaccard",
        "overlap_lift": "lift",
        "overlap_lift_marginal": "lift, rows and columns",
    }
    lines = []
    for (version, method), lifts in rows.where("overlap_lift").by("version", "method").items():
        where = {"version": version, "method": method}
        line = {**where, "pairs": len(lifts)}
        for metric, title in titles.items():
            estimates = rows.where(metric, **where)
            truths = rows.where(f"{metric}_true", **where)
            line[f"{title}, found / true"] = f"{mean_of(estimates):.2f} / {mean_of(truths):.2f}"
            if metric != "overlap_jaccard":
                line[f"{title}: interval holds"] = coverage(estimates, truths)
        lines.append(line)
    return pd.DataFrame(lines)


def mean_of(rows: Rows) -> float:
    """The mean over pairs."""
    return fmean(row.mean for row in rows)


def coverage(estimates: Rows, truths: Rows) -> str:
    """How many intervals hold the true value."""
    n_holding = 0
    for estimate, truth in zip(estimates, truths, strict=True):
        n_holding += estimate.low <= truth.mean <= estimate.high
    return f"{n_holding} of {len(estimates)}"
