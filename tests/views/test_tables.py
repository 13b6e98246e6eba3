"""Rows as tables of a terminal and cells of a page.

Would catch: a scale that is lost, a figure that was not measured shown as one, an interval of
another figure, a column that no line has, a figure that a narrow terminal cuts, markup in a cell.
"""

from io import StringIO

import pandas
import pytest
from rich.console import Console
from rich.table import Table

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.tables import DASH, figure_text, frame_table, interval_text, line_table

ROWS = Rows(
    [
        Measurement("harm_valid_rate", {}, 0.768, 0.634, 0.88),
        Measurement("harm_nll", {}, 1.2345, 1.0, 1.5),
        Measurement.exact("weights_removed", {}, 42_000),
    ]
)


def shown(table: Table, width: int = 80) -> str:
    terminal = StringIO()
    Console(width=width, file=terminal).print(table)
    return terminal.getvalue()


@pytest.mark.parametrize(
    ("metric", "is_rate", "alone", "with_interval"),
    [
        ("harm_valid_rate", True, "76.8", "76.8\n63.4 – 88.0"),
        ("harm_nll", False, "1.234", "1.234\n1.000 – 1.500"),
        ("weights_removed", False, "42000.000", "42000.000"),
        ("benign_nll", False, DASH, DASH),
    ],
)
def test_rates_are_in_per_cent_and_losses_to_three_places(metric, is_rate, alone, with_interval):
    assert figure_text(ROWS, metric, is_rate=is_rate) == alone
    assert interval_text(ROWS, metric, is_rate=is_rate) == with_interval


def test_a_terminal_s_table_has_a_line_a_mask_and_the_columns_that_a_line_has():
    lines = {"unpruned": ROWS[:1], "circuit": ROWS}
    titles = {"harm_valid_rate": "harm", "benign_valid_rate": "benign"}
    table = line_table("Rates, %", lines, titles, is_rate=True, bold="circuit")
    title, head, _, *body = shown(table).splitlines()
    assert (title.strip(), head.split()) == ("Rates, %", ["mask", "weights", "harm"])
    cells = [line.split() for line in body]
    assert cells == [["unpruned", DASH, "76.8"], ["circuit", "42,000", "76.8"]]
    assert [row.style for row in table.rows] == [None, "bold"]


def test_cells_are_plain_text():
    frame = pandas.DataFrame({"[red]a": ["[b]x"]})
    assert {"[red]a", "[b]x"} <= set(shown(frame_table(frame)).split())
