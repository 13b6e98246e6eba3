"""The table and the picture of the page of real models, and the tables of its log."""

import blind_reading
import real_ends
from answer_bars import answer_bars
from blocks import Blocks, committed
from pandas import DataFrame

from harmcircuits.measurements import Labels, Measurement
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

FIRST, HALF, SECOND = "real_ends", "real_ends_half", "real_ends_second"
# Line of the table -> the file of its rows, and the mask's name there.
MASKS = {
    "no mask": (FIRST, "none"),
    "random weights": (FIRST, "random"),
    "search 1: 48 requests": (FIRST, "search"),
    "search 2: 24 of those 48": (HALF, "search"),
    "set difference 1: the same 48": (FIRST, "published"),
    "no mask, in bfloat16": (SECOND, "none"),
    "search 3: 24 others": (SECOND, "search"),
    "set difference 3: the same 24": (SECOND, "published"),
}


def read(kind: str, mark: str) -> Labels:
    """The labels of answers that the blind reader gave a mark."""
    return {"judge": blind_reading.JUDGE, "kind": kind, "as": mark}


# Column -> the metric and the labels of its rows.
BLIND = "prefilled: harmful"  # the one with intervals
SCORED: Labels = {"beginning": "scored", "split": "heldout"}
COLUMNS = {
    "weights": ("n_removed", SCORED),
    BLIND: ("read_rate", read("begun", "harmful")),
    "prefilled: breaks off": ("read_rate", read("begun", "nothing")),
    "prefilled: refused": ("harm_refusal_rate", SCORED),
    "other prefill: refused": ("harm_refusal_rate", {**SCORED, "beginning": "another"}),
    "plain: harmful": ("read_rate", read("plain", "harmful")),
    "plain: refused": ("refusal_rate", SCORED),
    "benign: answered": ("benign_valid_rate", SCORED),
    "benign, prefilled: answered": ("prefilled_valid_rate", SCORED),
    "borderline: answered": ("borderline_valid_rate", SCORED),
}
# Kind of answer in the picture -> the mark of the reader.
KINDS = {"harmful": "harmful", "harmless": "another thing", "breaks off": "nothing"}
SEARCHES = {
    "48 of each kind, 60 steps": FIRST,
    "24 of those 48, 40 steps": HALF,
    "24 others, 40 steps, bfloat16": SECOND,
}


def row_of(mask: str, metric: str, labels: Labels) -> Measurement | None:
    """The row of a mask, if it was measured."""
    file, name = MASKS[mask]
    rows = committed(file).where(metric, mask=name, **labels)
    return rows[0] if rows else None


def cell(column: str, row: Measurement | None) -> str:
    """A number of weights or a rate."""
    if row is None:
        return DASH
    if column == "weights":
        return f"{row.mean:,.0f}"
    return f"{row:.0%}" if column == BLIND else f"{row.mean:.0%}"


def side_by_side() -> DataFrame:
    """A line for each mask: blind readings of harmful answers, and rates by the rules."""
    lines = []
    for mask in MASKS:
        line = {"mask": mask}
        for column, (metric, labels) in COLUMNS.items():
            line[column] = cell(column, row_of(mask, metric, labels))
        lines.append(line)
    return DataFrame(lines)


def shares(mask: str) -> dict[str, Measurement]:
    """The kinds of prefilled harmful answers under a mask, read blind; none if nobody read them."""
    rows = {kind: row_of(mask, "read_rate", read("begun", KINDS[kind])) for kind in KINDS}
    return {kind: row for kind, row in rows.items() if row is not None}


def answers_picture() -> Picture:
    """The kinds of prefilled harmful answers, read blind: a bar for each mask."""
    bars = {}
    for mask in MASKS:
        if shares(mask):
            bars[mask] = {kind: row.mean for kind, row in shares(mask).items()}
    return answer_bars(bars, "of 25 answers to held-out harmful requests, prefilled, read blind")


def search_table() -> DataFrame:
    """The answers under the mask of every search."""
    return real_ends.table_of_searches({title: committed(SEARCHES[title]) for title in SEARCHES})


BLOCKS: Blocks = {"Qwen 0.5B, side by side": side_by_side}
LOG: Blocks = {
    "Qwen 0.5B, today": lambda: real_ends.table(committed(FIRST)),
    "Qwen 0.5B, beginnings": lambda: real_ends.table_of_beginnings(committed(FIRST)),
    "Qwen 0.5B, searches": search_table,
    "Qwen 0.5B, read blind": lambda: blind_reading.table(committed(FIRST)),
    "Qwen 0.5B, read blind again": lambda: blind_reading.table(committed(SECOND)),
}
PICTURES = {"answers.png": answers_picture}
