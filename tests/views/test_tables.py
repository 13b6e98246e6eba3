"""Rows as tables of a terminal and cells of a page.

Would catch: a scale that is lost, a figure that was not measured shown as one, an interval of
another figure, a column that no line has.
"""

from io import StringIO

import pytest
from rich.console import Console

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.tables import (
    DASH,
    columns_of,
    figure_text,
    interval_text,
    line_table,
    size_text,
)

ROWS = Rows(
    [
        Measurement("harm_valid_rate", {}, 0.768, 0.634, 0.88),
        Measurement("harm_nll", {}, 1.2345, 1.0, 1.5),
        Measurement.exact("weights_removed", {}, 42_000),
    ]
)


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


def test_a_mask_s_size_is_a_count():
    assert size_text(ROWS) == "42,000"
    assert size_text(ROWS[:2]) == DASH


def test_columns_are_those_that_a_line_has():
    titles = {"harm_nll": "harm NLL", "benign_nll": "benign NLL", "harm_valid_rate": "harm"}
    lines = {"unpruned": ROWS[:1], "circuit": ROWS[1:]}
    assert columns_of(lines, titles) == {"harm_nll": "harm NLL", "harm_valid_rate": "harm"}
    assert columns_of({}, titles) == {}


def test_a_terminal_s_table_has_a_line_a_mask():
    lines = {"unpruned": ROWS[:1], "circuit": ROWS}
    titles = {"harm_valid_rate": "harm", "benign_valid_rate": "benign"}
    table = line_table("Rates, %", lines, titles, is_rate=True, bold="circuit")
    terminal = StringIO()
    Console(width=80, file=terminal).print(table)
    title, head, _, *body, _ = terminal.getvalue().splitlines()
    assert title.strip() == "Rates, %"
    assert head.split() == ["mask", "weights", "harm"]
    cells = [line.split() for line in body]
    assert cells == [["unpruned", DASH, "76.8"], ["circuit", "42,000", "76.8"]]
    assert [row.style for row in table.rows] == [None, "bold"]
