"""Rows as tables for a terminal, and as cells of a page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from harmcircuits.measurements import Rows

if TYPE_CHECKING:
    import pandas

DASH = "–"  # for a figure without a row


def figure_text(rows: Rows, metric: str, *, is_rate: bool) -> str:
    """A figure alone: a rate in per cent, a loss with three decimals, a dash without a row."""
    text = interval_text(rows, metric, is_rate=is_rate)
    return text.partition("\n")[0]


def interval_text(rows: Rows, metric: str, *, is_rate: bool) -> str:
    """A figure as `figure_text`, and the ends of its interval after a line break."""
    rows = rows.where(metric)
    if not rows:
        return DASH
    row = rows[0]
    mean = _number_text(row.mean, is_rate)
    low = _number_text(row.low, is_rate)
    high = _number_text(row.high, is_rate)
    return mean if row.is_exact else f"{mean}\n{low} – {high}"


def _number_text(value: float, is_rate: bool) -> str:
    return f"{100 * value:.1f}" if is_rate else f"{value:.3f}"


def size_text(rows: Rows) -> str:
    """The number of weights that a mask removes."""
    removed = rows.where("weights_removed")
    return f"{removed[0].mean:,.0f}" if removed else DASH


def columns_of(
    lines: Mapping[str, Rows],
    titles: Mapping[str, str],
) -> dict[str, str]:
    """The titles of the metrics for which any line has a row."""
    present = set()
    for rows in lines.values():
        present.update(rows.metrics)
    return {metric: title for metric, title in titles.items() if metric in present}


def line_table(
    title: str,
    lines: Mapping[str, Rows],
    titles: Mapping[str, str],
    *,
    is_rate: bool,
    bold: str = "",
) -> Table:
    """A terminal's table of figures: a row for each mask, a column for each metric."""
    columns = columns_of(lines, titles)
    grid = text_table(title, ["mask", "weights", *columns.values()])
    for name, rows in lines.items():
        cells = [figure_text(rows, metric, is_rate=is_rate) for metric in columns]
        style = "bold" if name == bold else None
        grid.add_row(name, size_text(rows), *cells, style=style)
    return grid


def text_table(title: str, columns: Sequence[str], *, n_names: int = 1) -> Table:
    """An empty table for a terminal, with `n_names` columns of names and then figures."""
    # A text that is too wide continues on the next line, so that nothing is cut.
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(columns):
        justify = "left" if number < n_names else "right"
        grid.add_column(name, justify=justify, overflow="fold")
    return grid


def frame_table(data: "pandas.DataFrame", *, n_names: int = 1) -> Table:
    """A DataFrame as a table for a terminal, without its index."""
    columns = [escape(str(name)) for name in data.columns]
    grid = text_table("", columns, n_names=n_names)
    for row in data.itertuples(index=False):
        cells = [escape(str(value)) for value in row]
        grid.add_row(*cells)
    return grid
