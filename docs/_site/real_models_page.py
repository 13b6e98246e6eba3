# %% [markdown]
# # The tables and the picture of the page of real models
# `python docs/_site/real_models_page.py` writes what committed rows say into `docs/real_models.md`, between
# `<!-- NAME -->` and `<!-- /NAME -->`, and draws what answers become into `docs/figures/answers.png`. A cell
# whose figure is in no row is a dash, and fills once the row is there.

# %%
from functools import cache
from pathlib import Path

import blind_reading
import pandas
import real_ends
from answer_bars import answer_bars
from support.markdown import between, frame_markdown

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import (
    Picture,
)
from harmcircuits.views.tables import DASH

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "docs" / "real_models.md", ROOT / "docs" / "figures" / "answers.png"

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
SECOND = real_ends.ROWS.with_stem("real_ends_second")
DRAWN = list(SMALL)[:7]
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


# %%
@cache
def rows_of(name: str) -> Rows:
    """Committed rows, of held-out answers under the usual prefill to the latest judge."""
    rows = Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    if name == "qwen15":  # the first step of another day, judged by rules
        return rows.where(dtype="bfloat16")
    kept = [row for row in rows if row.labels.get("split", "heldout") == "heldout"]
    return Rows(row for row in kept if not {"opening", "sources", "tokens"} & set(row.labels))


def row_of(name: str, metric: str, mask: str) -> Measurement | None:
    """The row of a mask, if there is one."""
    rows = rows_of(name).where(metric, mask=mask)
    return rows[0] if rows else None


def table(masks: Masks) -> pandas.DataFrame:
    """A line for each mask: rises of losses in nats per token, and what harmful answers become in %."""
    lines = []
    for title, (name, mask) in masks.items():
        removed = row_of(name, "weights_removed", mask)
        line = {
            "mask": title,
            "weights": f"{removed.mean:,.0f}" if removed and removed.mean else DASH,
        }
        for column, metric in LOSSES.items():
            row = row_of(name, f"{metric}_change", mask)
            line[column] = rise(row, with_interval=column == "harm") if row else DASH
        for column, metric in ANSWERS.items():
            row = row_of(name, metric, mask)
            line[f"{column}, %"] = per_cent(row, with_interval=column == "harmful") if row else DASH
        lines.append(line)
    return pandas.DataFrame(lines)


def attack_table() -> pandas.DataFrame:
    """A line for each attack: harmful answers in %."""
    rows = rows_of("qwen_attacks").where(ANSWERS["harmful"])
    lines = []
    for attack, where in ATTACKS.items():
        line = {"attack": attack}
        for title, mask in ATTACKED.items():
            trained = where["step"] and mask != "none"
            of_mask = f"{mask}, then free" if trained else mask
            line[title] = per_cent(rows.one(mask=of_mask, **where))
        lines.append(line)
    return pandas.DataFrame(lines)


def rise(row: Measurement, *, with_interval: bool) -> str:
    """Of a loss; without a sign where it rounds to zero."""
    mean, low, high = (round(value, 2) + 0.0 for value in (row.mean, row.low, row.high))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" if with_interval and high else f"{mean:.2f}"


def per_cent(row: Measurement, *, with_interval: bool = True) -> str:
    """Of answers, without the sign of per cent."""
    mean, low, high = (f"{100 * value:.0f}" for value in (row.mean, row.low, row.high))
    return f"{mean} [{low}, {high}]" if with_interval else mean


def searches() -> pandas.DataFrame:
    """What is refused under the mask of every search that prefers refusals."""
    rows = {title: ROOT / "analyses" / "rows" / f"{name}.jsonl" for title, name in SEARCHES.items()}
    return real_ends.table_of_searches({title: Rows.read(file) for title, file in rows.items()})


TABLES = {
    "Qwen 0.5B, today": lambda: real_ends.table(Rows.read(real_ends.ROWS)),
    "Qwen 0.5B, read blind": lambda: blind_reading.table(Rows.read(real_ends.ROWS)),
    "Qwen 0.5B, read blind again": lambda: blind_reading.table(Rows.read(SECOND)),
    "Qwen 0.5B, searches": searches,
    "Qwen 0.5B, beginnings": lambda: real_ends.table_of_beginnings(Rows.read(real_ends.ROWS)),
    "Qwen 0.5B": lambda: table(SMALL),
    "Qwen 0.5B attacked": attack_table,
    "Qwen 1.5B": lambda: table(LARGE),
}


def with_tables(page: str) -> str:
    """The page with every table in its place."""
    for name, made in TABLES.items():
        page = between(page, name, frame_markdown(made()))
    return page


def drawn() -> Picture:
    """What harmful answers become: a bar for each mask."""
    bars: dict[str, dict[str, float]] = {}
    for title in DRAWN:
        bars[title] = {}
        for kind, metric in ANSWERS.items():
            row = row_of(SMALL[title][0], metric, SMALL[title][1])
            assert row is not None, title
            bars[title][kind] = row.mean
    return answer_bars(bars, "of 37 held-out harmful answers")


# %%
if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    drawn().save(PICTURE)
