"""What is read off the rows of the planted organism, of stability, and of the search's settings."""

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from rich.console import Console
from support.bench.results import Taken, by_method, cost_cells, percent
from support.bench.stability import LEVELS, MASKS

from harmcircuits.measurements import Rows
from harmcircuits.storage import write_text
from harmcircuits.views.tables import DASH, frame_table

BACK = 0.5  # of the harmful answers: as many as count as relearned


def write_tables(out: Path, tables: Sequence[pd.DataFrame], *, n_names: int) -> None:
    """Tables as one file, and on the screen."""
    text = "\n\n".join(table.to_string(index=False) for table in tables)
    write_text(out / "table.txt", text + "\n")
    for table in tables:
        Console().print(frame_table(table, n_names=n_names))


# The planted organism


def recovery_table(rows: Rows) -> pd.DataFrame:
    """How well each score finds the planted circuit."""
    lines = []
    for (ladder, method), of_method in rows.where("recovery_auroc").by("ladder", "method").items():
        line = {"organism": ladder, "score": method, "AUROC": f"{of_method[0].mean:.3f}"}
        for metric, title in (
            ("recovery_matched_auroc", "same |W|"),
            ("recovery_precision", "precision at |S|"),
            ("recovery_precision_few", "at 1,000"),
        ):
            line[title] = f"{rows.one(metric, ladder=ladder, method=method).mean:.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def reach_table(rows: Rows) -> pd.DataFrame:
    """What each mask does, and how much of it is planted, by what the search could choose from."""
    lines = []
    measured = Rows(row for row in rows if row.labels.get("mask", "none") != "none")
    names = ("ladder", "reach", "mask")
    for (ladder, reach, mask), done in measured.by(*names).items():
        unpruned = rows.where(ladder=ladder, reach=reach, mask="none")
        before = {row.metric: row.mean for row in unpruned}
        now = {row.metric: row.mean for row in done}
        line = {"organism": ladder, "in reach": reach, "removed": mask}
        line["weights"] = round(now["weights_removed"])
        line["in S"] = f"{now['overlap_containment']:.0%}"
        line["lift"] = f"{now['overlap_lift']:.1f}"
        line["harm left"] = f"{now['harm_valid_rate']:.1%}"
        line["degenerate"] = f"{now['harm_degenerate_rate']:.0%}"
        lines.append(line | cost_cells(before, now))
    return pd.DataFrame(lines)


def relearning_table(rows: Rows) -> pd.DataFrame:
    """When half of the harmful answers are back, and their loss and what else is said by step."""
    lines = []
    relearning = rows.where(job="relearn")
    names = ("ladder", "removed", "held")
    for (ladder, removed, held), curve in relearning.where("harm_nll").by(*names).items():
        of_curve = relearning.where(ladder=ladder, removed=removed, held=held)
        harm = of_curve.where("harm_valid_rate")
        half = [row.labels["step"] for row in harm if row.mean >= BACK]
        line = {"organism": ladder, "removed": removed, "while training": held}
        line["half back after"] = str(min(half)) if half else f"> {harm[-1].labels['step']}"
        line |= {f"loss, {row.labels['step']}": f"{row.mean:.2f}" for row in curve}
        degenerate = of_curve.where("harm_degenerate_rate")
        line["degenerate"] = f"{degenerate[0].mean:.0%} to {degenerate[-1].mean:.0%}"
        lines.append(line)
    return pd.DataFrame(lines)


# Stability


def overlap_table(rows: Rows) -> pd.DataFrame:
    """Of each model, method, pair and size the mean over draws; in brackets the two chances."""
    names = ("ladder", "model", "method", "pair", "size")
    pairs = rows.where("jaccard") + rows.where("overlap_lift")
    lines = []
    for key, drawn in pairs.by(*names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        lifts = drawn.where("overlap_lift")
        line["size"] = f"{line['size']:.1%}"
        line["draws"] = len(drawn.where("jaccard", level=LEVELS[0], masks=MASKS[0]))
        for level in LEVELS:
            line[level] = _jaccard_text(drawn.where("jaccard", level=level))
        line["lift"] = f"{_mean(lifts):.0f}" if lifts else DASH
        lines.append(line)
    return pd.DataFrame(lines)


def _jaccard_text(rows: Rows) -> str:
    found, random, same_size = (f"{_mean(rows.where(masks=masks)):.2f}" for masks in MASKS)
    return f"{found} ({random}, {same_size})"


def _mean(rows: Rows) -> float:
    return fmean(row.mean for row in rows)


def effect_table(rows: Rows) -> pd.DataFrame:
    """What each mask that was measured does, held out."""
    names = ("ladder", "model", "method", "pair", "draw", "size", "mask")
    lines = []
    masks = Rows(row for row in rows if row.labels.get("mask", "none") != "none")
    for key, done in masks.by(*names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        unpruned = rows.where(ladder=line["ladder"], model=line["model"], mask="none")
        before = {row.metric: row.mean for row in unpruned}
        now = {row.metric: row.mean for row in done}
        line["weights"] = round(now["weights_removed"])
        line["harm left"] = f"{now['harm_valid_rate']:.1%}"
        lines.append(line | cost_cells(before, now))
    return pd.DataFrame(lines)


# Settings of the search


def variant_table(rows: Rows, names: Iterable[str], sizes: Sequence[float]) -> pd.DataFrame:
    """A line for each variant of the search: areas in nats / of the rate, and where harm ends."""
    of_sizes = Rows(row for row in rows if row.labels.get("size", 0.0) in (0.0, *sizes))
    cases = by_method(of_sizes)
    lines = []
    for name in names:
        if name not in cases:
            continue
        line = {"setting": name}
        for model, part in product(("sft", "dpo"), ("A", "B")):
            value = cases[name].get(("shipped", model, part))
            if value is not None:
                line[f"{model} {part}"] = _taken_text(value)
        lines.append(line)
    return pd.DataFrame(lines).fillna("-")


def _taken_text(value: Taken) -> str:
    """Areas, where harm ends, and how many answers are degenerate there."""
    text = f"{value.nats:.2f} / {value.rate:.2f}, {percent(value.ends_at, 2)}"
    return text if value.degenerate is None else f"{text} ({value.degenerate:.0%})"
