"""Figures in the tables of every page are those of committed rows.

Would catch: a figure typed in or out of date, an interval of another row, a new page whose tables no test
reads. A cell must be the mean of a row, with its interval where it has one, at the decimals that it has;
in per cent or not. Any row will do: generated blocks are held to the very one by `test_written_pages`.
"""

import re
from functools import cache

import numpy as np
import pytest
from pages import PAGES, README, ROOT
from write_pages import PAGES as WRITTEN

from harmcircuits.measurements import Rows

# Pages whose tables are written by hand -> the rows that they quote.
QUOTED = {
    "docs/log/real_models.md": (
        "qwen_main",
        "qwen_preferred",
        "qwen_avoided",
        "qwen_attacks",
        "qwen_search",
        "qwen_walks",
        "qwen_loss",
        "qwen_rounds",
        "qwen_protected",
        "qwen_study",
        "qwen_judge",
        "qwen15",
        "real_ends",
        "real_ends_half",
        "real_ends_second",
        "frontier",
        "judges",
        "loss",
        "smollm2_study",
    ),
}
# Of other things than committed rows (faults, times, facts of others), or of a bench that is gone.
WITHOUT_ROWS = (
    "docs/architectures.md",  # held to a run by hooks/test_architectures.py
    "docs/log/search.md",
    "docs/log/trusted.md",
)
# No row has these: see the corrections at the top of the page.
MISSING = {"17.279", "9,463", "2,706"}

NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(
    rf"(?<![\w.])({NUMBER})(?: ?%)?(?: \[({NUMBER})(?: ?%)?, ({NUMBER})(?: ?%)?\])?"
)


def tables(text: str) -> list[list[str]]:
    """The cells of every line of every table, without its head."""
    lines = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        for line in block.splitlines()[2:]:
            lines.append([cell.strip() for cell in line.strip("| \n").split("|")])
    return lines


@cache
def values(names: tuple[str, ...]) -> np.ndarray:
    """Mean and ends of every row, as they are and in per cent; last, numbers of requests."""
    rows = Rows()
    for name in names:
        rows += Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    figures = np.array([[row.mean, row.low, row.high] for row in rows])
    counts = np.array([[row.n, row.n, row.n] for row in rows if row.n])
    return np.concatenate([figures, 100 * figures, counts])


def is_of_a_row(figure: tuple[str, ...], figures: np.ndarray) -> bool:
    """Whether mean, and ends where there are any, round to these."""
    is_same = np.ones(len(figures), dtype=bool)
    for column, text in enumerate(figure):
        if text:
            number = text.replace(",", "")
            decimals = len(number.partition(".")[2])
            is_same &= abs(figures[:, column] - float(number)) <= 0.5 * 10**-decimals + 1e-6
    return bool(is_same.any())


@pytest.mark.parametrize("page", QUOTED)
def test_every_figure_of_a_table_is_of_a_committed_row(page):
    figures = values(QUOTED[page])
    strange, n_figures = [], 0
    for name, *cells in tables((ROOT / page).read_text(encoding="utf-8")):
        for figure in FIGURE.findall(" | ".join(cells).replace("*", "")):
            n_figures += 1
            if figure[0] not in MISSING and not is_of_a_row(figure, figures):
                strange.append(f"{name}: {figure}")
    assert n_figures > 900
    assert not strange


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_the_tables_of_every_page_are_read_by_a_test(path):
    n_figures = 0
    for _, *cells in tables(path.read_text(encoding="utf-8")):
        n_figures += sum(bool(FIGURE.fullmatch(cell.strip("*"))) for cell in cells)
    name = path.relative_to(ROOT).as_posix()
    is_read = name in QUOTED or name in WRITTEN or name in WITHOUT_ROWS
    assert is_read or n_figures < 5, f"{n_figures} figures that no test reads"


def test_a_figure_that_no_row_has_is_seen():
    figures = values(("F1",))
    mean, low, high = figures[0]
    assert is_of_a_row((f"{mean:.3f}", f"{low:.3f}", f"{high:.3f}"), figures)
    assert not is_of_a_row((f"{mean:.3f}", f"{low:.3f}", f"{high + 0.2:.3f}"), figures)
    assert not is_of_a_row(("1234.567", "", ""), figures)
