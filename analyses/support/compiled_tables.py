"""What is read off the rows of the compiled organisms."""

from collections.abc import Callable
from statistics import fmean

import pandas as pd

from harmcircuits.measurements import Rows

RATES = ("harm_valid_rate", "benign_valid_rate", "recognition_accuracy")
NAMES = ("organism", "version")
NOT_MEASURED = "–"


def single_masks(rows: Rows) -> Rows:
    """Rows of scores and of their masks."""
    others = {"stage", "first"}  # of last passes, and of overlaps
    measured = []
    for row in rows:
        if {"method", "version"} <= row.labels.keys() and not others & row.labels.keys():
            measured.append(row)
    return Rows(measured)


def by_method(rows: Rows, metric: str, cell: Callable[[Rows], str]) -> pd.DataFrame:
    """A line for each organism and version, a column for each method that has the metric."""
    lines: dict[tuple, dict] = {}
    for names, of_names in single_masks(rows).by(*NAMES, "method").items():
        if len(of_names.where(metric)):
            line = lines.setdefault(names[:2], dict(zip(NAMES, names, strict=False)))
            line[str(names[2])] = cell(of_names)
    return pd.DataFrame(list(lines.values())).fillna(NOT_MEASURED)


def summary_table(rows: Rows) -> pd.DataFrame:
    """A line for each method: in how many cases it does what is wanted, and its recall and precision."""
    lines = []
    for method, of_method in single_masks(rows).by("method").items():
        cases = [case for case in of_method.by(*NAMES).values() if case.where("recall")]
        if not cases:
            continue
        left = [tuple(case.one(metric).mean for metric in RATES) for case in cases]
        tidy, dense = [], []
        for case in cases:
            (dense if case[0].labels["version"] == "dense" else tidy).append(case)
        lines.append(
            {
                "mask": method,
                "ends harm": f"{sum(rates[0] == 0 for rates in left)} of {len(left)}",
                "and nothing else": f"{left.count((0, 1, 1))} of {len(left)}",
                "recall": span(tidy, "recall"),
                "precision": span(tidy, "precision"),
                "recall, dense": span(dense, "recall"),
                "precision, dense": span(dense, "precision"),
            }
        )
    return pd.DataFrame(lines)


def span(cases: list[Rows], metric: str) -> str:
    """The least and the most of a figure."""
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
        line = {**where}
        for metric, title in titles.items():
            line[title] = f"{rows.one(metric, **where).mean:,.0f}"
        line["harm's without a gradient"] = f"{rows.one('no_gradient', **where).mean:.0%}"
        lines.append(line)
    return pd.DataFrame(lines)


def score_table(rows: Rows) -> pd.DataFrame:
    """AUROC of what harm needs, of what is harm's alone, and of the units that harm needs."""

    def cell(of_method: Rows) -> str:
        metrics = ("auroc", "auroc_alone", "auroc_units")
        return " / ".join(f"{of_method.one(metric).mean:.2f}" for metric in metrics)

    return by_method(rows, "auroc", cell)


def found_table(rows: Rows) -> pd.DataFrame:
    """Recall and precision of what is harm's alone."""

    def cell(of_method: Rows) -> str:
        if not of_method.one("weights_removed").mean:
            return "nothing"
        metrics = ("recall", "precision")
        return " / ".join(f"{of_method.one(metric).mean:.2f}" for metric in metrics)

    return by_method(rows, "recall", cell).drop(columns="harm's alone")


def left_table(rows: Rows) -> pd.DataFrame:
    """What is left of harm, its twin and recognition."""

    def cell(of_method: Rows) -> str:
        return " / ".join(f"{100 * of_method.one(metric).mean:.0f}" for metric in RATES)

    return by_method(rows, "recall", cell)


def overlap_table(rows: Rows) -> pd.DataFrame:
    """Lifts and Jaccard of found circuits beside those of the true ones, over all pairs."""
    lines = []
    for (version, method), of_method in rows.where("overlap_lift").by("version", "method").items():
        where = {"version": version, "method": method}
        line = {**where, "pairs": len(of_method)}
        for metric, title in {
            "overlap_jaccard": "Jaccard",
            "overlap_lift": "lift",
            "overlap_lift_marginal": "lift, rows and columns",
        }.items():
            found, true = rows.where(metric, **where), rows.where(f"{metric}_true", **where)
            means = [fmean(row.mean for row in some) for some in (found, true)]
            line[f"{title}, found / true"] = f"{means[0]:.2f} / {means[1]:.2f}"
            if metric != "overlap_jaccard":
                holds = [
                    row.low <= right.mean <= row.high
                    for row, right in zip(found, true, strict=True)
                ]
                line[f"{title}: interval holds"] = f"{sum(holds)} of {len(holds)}"
        lines.append(line)
    return pd.DataFrame(lines)


def last_pass_table(rows: Rows) -> pd.DataFrame:
    """What a last pass changes, and its cost."""
    lines = []
    for passes in rows.where("n_passes"):
        where = dict(passes.labels)
        line = {"organism": where["organism"], "version": where.get("version", "")}
        line["from"] = where["method"]
        for metric, title in {
            "weights_removed": "weights",
            "recall": "recall",
            "harm_valid_rate": "harm left",
            "benign_valid_rate": "benign left",
        }.items():
            values = []
            for stage in ("before", "grown", "after"):
                at_stage = rows.where(metric, stage=stage, **where)
                form = ".0f" if metric == "weights_removed" else ".2f"
                values += [format(row.mean, form) for row in at_stage]
            line[title] = ", ".join(values)
        line["passes"] = f"{passes.mean:.0f}"
        lines.append(line)
    return pd.DataFrame(lines)
