"""The tables and the picture of the page of real models; a figure that is in no row is a dash."""

from functools import cache, partial

import blind_reading
import real_ends
from answer_bars import answer_bars
from blocks import Blocks, committed
from pandas import DataFrame

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

# Line of a table -> the file of its rows, and the mask's name there.
Masks = dict[str, tuple[str, str]]
SMALL: Masks = {
    "unpruned": ("qwen_main", "none"),
    "search, within the budget": ("qwen_main", "search, finer"),
    "search, beyond the budget": ("qwen_main", "search, factor 0.5"),
    "one shot, beyond": ("qwen_preferred", "one shot, factor 0.5"),
    "refusals preferred": ("qwen_preferred", "preferred, step 2, factor 1"),
    "refusals preferred, more weights": ("qwen_preferred", "preferred, step 3, factor 0.84"),
    "refusals preferred and avoided": (
        "qwen_avoided",
        "avoided, priced again four times, factor 0.35",
    ),
    "random": ("qwen_preferred", "random"),
    "published set difference": ("frontier", "published"),
}
LARGE: Masks = {
    "unpruned": ("qwen15", "none"),
    "search": ("qwen15", "search"),
    "search, beyond the budget": ("qwen15", "search, factor 0.5"),
    "random": ("qwen15", "random"),
}
# Line of a table -> the file of its rows.
SEARCHES = {
    "48 of a kind, 60 steps": "real_ends",
    "24 of these, 40 steps": "real_ends_half",
    "24 others, 40 steps, bfloat16": "real_ends_second",
}
BARS = list(SMALL)[:7]
LOSSES = {"harm": "harm_nll", "benign": "benign_nll", "same prefill": "prefilled_nll"}
ANSWERS = {
    "harmful": "harm_valid_rate",
    "harmless": "harm_harmless_rate",
    "refused": "harm_refusal_rate",
    "broken": "harm_degenerate_rate",
}
ATTACKS = {
    "asked plainly": {"attack": "plain", "step": 0},
    "prefill": {"attack": "prefill", "step": 0},
    "weights of refusal removed": {"attack": "refusal ablation", "step": 0},
    "prefill, weights of refusal removed": {"attack": "prefill + refusal ablation", "step": 0},
    "trained on 50 answers, asked plainly": {"attack": "plain", "step": 15},
}
ATTACKED = {
    "unpruned": "none",
    "refusals preferred": "preferred, factor 1",
    "search, beyond the budget": "search, factor 0.5",
}


@cache
def rows_of(name: str) -> Rows:
    """Committed rows, of held-out answers under the usual prefill to the latest judge."""
    rows = committed(name)
    if name == "qwen15":  # the first step of another day, judged by rules
        return rows.where(dtype="bfloat16")
    held_out = [row for row in rows if row.labels.get("split", "heldout") == "heldout"]
    return Rows(row for row in held_out if not {"opening", "sources", "tokens"} & set(row.labels))


def row_of(mask: tuple[str, str], metric: str) -> Measurement | None:
    """The row of a mask, if there is one."""
    file, name = mask
    rows = rows_of(file).where(metric, mask=name)
    return rows[0] if rows else None


def table(masks: Masks) -> DataFrame:
    """A line for each mask: rises of losses in nats per token, and kinds of harmful answers in %."""
    lines = []
    for title, mask in masks.items():
        n_removed = row_of(mask, "weights_removed")
        weights = f"{n_removed.mean:,.0f}" if n_removed and n_removed.mean else DASH
        line = {"mask": title, "weights": weights}
        for column, metric in LOSSES.items():
            line[column] = rise(row_of(mask, f"{metric}_change"), with_interval=column == "harm")
        for column, metric in ANSWERS.items():
            row = row_of(mask, metric)
            line[f"{column}, %"] = per_cent(row, with_interval=column == "harmful")
        lines.append(line)
    return DataFrame(lines)


def attack_table() -> DataFrame:
    """A line for each attack: harmful answers in %."""
    rows = rows_of("qwen_attacks").where(ANSWERS["harmful"])
    lines = []
    for attack, where in ATTACKS.items():
        line = {"attack": attack}
        for title, mask in ATTACKED.items():
            is_free = where["step"] and mask != "none"
            name = f"{mask}, then free" if is_free else mask
            line[title] = per_cent(rows.one(mask=name, **where))
        lines.append(line)
    return DataFrame(lines)


def rise(row: Measurement | None, *, with_interval: bool) -> str:
    """The rise of a loss; without a sign where it rounds to zero."""
    if row is None:
        return DASH
    mean, low, high = (round(value, 2) + 0.0 for value in (row.mean, row.low, row.high))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" if with_interval and high else f"{mean:.2f}"


def per_cent(row: Measurement | None, *, with_interval: bool = True) -> str:
    """A share of answers, without the sign of per cent."""
    if row is None:
        return DASH
    mean, low, high = (f"{100 * value:.0f}" for value in (row.mean, row.low, row.high))
    return f"{mean} [{low}, {high}]" if with_interval else mean


def search_table() -> DataFrame:
    """The answers under the mask of every search that prefers refusals."""
    return real_ends.table_of_searches({title: committed(SEARCHES[title]) for title in SEARCHES})


def answers_picture() -> Picture:
    """The kinds of harmful answers: a bar for each mask."""
    bars = {}
    for title in BARS:
        rows = {kind: row_of(SMALL[title], metric) for kind, metric in ANSWERS.items()}
        bars[title] = {kind: row.mean for kind, row in rows.items() if row is not None}
    return answer_bars(bars, "of 37 held-out harmful answers")


BLOCKS: Blocks = {
    "Qwen 0.5B, today": lambda: real_ends.table(committed("real_ends")),
    "Qwen 0.5B, read blind": lambda: blind_reading.table(committed("real_ends")),
    "Qwen 0.5B, read blind again": lambda: blind_reading.table(committed("real_ends_second")),
    "Qwen 0.5B, searches": search_table,
    "Qwen 0.5B, beginnings": lambda: real_ends.table_of_beginnings(committed("real_ends")),
    "Qwen 0.5B": partial(table, SMALL),
    "Qwen 0.5B attacked": attack_table,
    "Qwen 1.5B": partial(table, LARGE),
}
PICTURES = {"answers.png": answers_picture}
