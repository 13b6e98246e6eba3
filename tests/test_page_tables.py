"""Figures in the tables of every page are those of committed rows.

Would catch: a figure typed in or out of date, an interval of another row, a new page whose tables no test
reads. A cell must be the mean of a row, with its interval where it has one, at the decimals that it has;
in per cent or not. Which row is not looked at: tables that are written from rows are held to the very
ones beside their analyses.
"""

import re
from functools import cache

import numpy as np
import pytest
from pages import DOCS, LOG, PAGES, README, ROOT

from harmcircuits.measurements import Rows

# Pages whose tables are written by hand -> the rows that they quote.
QUOTED = {
    "log/real_models.md": (
        *(
            "qwen_main",
            "qwen_preferred",
            "qwen_avoided",
            "qwen_attacks",
            "qwen_search",
            "qwen_walks",
        ),
        *("qwen_loss", "qwen_rounds", "qwen_protected", "qwen_study", "qwen_judge", "qwen15"),
        *("frontier", "judges", "loss", "smollm2_study"),
    ),
}
# Held to the rows, or to a run, where they are made.
MADE = {
    "README.md": "test_readme.py",
    "architectures.md": "hooks/test_architectures.py",
    "claims.md": "analyses/test_six_findings.py",
    "few_weights.md": "analyses/test_few_weights.py",
    "log/compiled.md": "analyses/test_compiled_page.py",
    "compiled.md": "analyses/test_compiled_page.py",
    "log/stability.md": "analyses/test_pages.py",
    "log/toy_models.md": "analyses/test_six_findings.py",
    "planted.md": "analyses/test_pages.py",
    "real_models.md": "test_real_models_page.py",
    "removed_or_hidden.md": "analyses/test_removed_or_hidden.py",
    "results.md": "test_study_table.py",
    "search_bench.md": "analyses/test_ends.py",
}
# Of other things than committed rows: faults, times, facts of others; and tables of analyses that are gone.
WITHOUT_ROWS = (
    *("compare_tools.md", "log/trusted.md", "performance.md", "trusted.md"),
    "log/search.md",
)
# No row has these: see the corrections at the top of the page.
MISSING = {"17.279", "9,463", "2,706"}

NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(
    rf"(?<![\w.])({NUMBER})(?: ?%)?(?: \[({NUMBER})(?: ?%)?, ({NUMBER})(?: ?%)?\])?"
)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table's lines, without its head."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        lines = [
            [cell.strip() for cell in line.strip("| \n").split("|")] for line in block.splitlines()
        ]
        found.append(lines[2:])
    return found


@cache
def values(names: tuple[str, ...]) -> np.ndarray:
    """Mean and ends of every row, as they are and in per cent; last, numbers of requests."""
    rows = [
        row for name in names for row in Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    ]
    figures = np.array([[row.mean, row.low, row.high] for row in rows])
    counts = np.array([[row.n, row.n, row.n] for row in rows if row.n])
    return np.concatenate([figures, 100 * figures, counts])


def is_of_a_row(figure: tuple[str, ...], known: np.ndarray) -> bool:
    """Whether mean, and ends where there are any, round to these."""
    is_same = np.ones(len(known), dtype=bool)
    for column, text in enumerate(figure):
        if text:
            number = text.replace(",", "")
            decimals = len(number.partition(".")[2])
            is_same &= abs(known[:, column] - float(number)) <= 0.5 * 10**-decimals + 1e-6
    return bool(is_same.any())


@pytest.mark.parametrize("page", QUOTED)
def test_every_figure_of_a_table_is_of_a_committed_row(page):
    known, strange, n_figures = values(QUOTED[page]), [], 0
    for table in tables((DOCS / page).read_text(encoding="utf-8")):
        for name, *cells in table:
            for figure in FIGURE.findall(" | ".join(cells).replace("*", "")):
                n_figures += 1
                if figure[0] not in MISSING and not is_of_a_row(figure, known):
                    strange.append(f"{name}: {figure}")
    assert n_figures > 900
    assert not strange


def test_the_tables_of_every_page_are_read_by_a_test():
    for path in (README, *PAGES):
        name = path.name if path == README else path.relative_to(DOCS).as_posix()
        cells = [
            cell for table in tables(path.read_text("utf-8")) for line in table for cell in line[1:]
        ]
        n_figures = sum(bool(FIGURE.fullmatch(cell.strip("*"))) for cell in cells)
        is_read = name in QUOTED or name in MADE or name in WITHOUT_ROWS
        assert is_read or n_figures < 5, f"{name}: {n_figures} figures that no test reads"
    for test in MADE.values():
        assert (ROOT / "tests" / test).is_file(), test
    assert all(page in LOG for page in map(DOCS.joinpath, QUOTED))


def test_a_figure_that_no_row_has_is_seen():
    known = values(("F1",))
    (mean, low, high), *_ = known
    assert is_of_a_row((f"{mean:.3f}", f"{low:.3f}", f"{high:.3f}"), known)
    assert not is_of_a_row((f"{mean:.3f}", f"{low:.3f}", f"{high + 0.2:.3f}"), known)
    assert not is_of_a_row(("1234.567", "", ""), known)
