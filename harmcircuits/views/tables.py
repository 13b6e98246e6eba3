"""Rows as tables of a terminal, and as cells of a page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from harmcircuits.measurements import Rows

if TYPE_CHECKING:
    import pandas

DASH = "–"  # not measured


def figure_text(rows: Rows, metric: str, *, is_rate: bool) -> str:
    """A figure alone: a rate in per cent, a loss to three places, a dash where it is missing."""
    of_metric = rows.where(metric)
    if not of_metric:
        return DASH
    return _number_text(of_metric[0].mean, is_rate)


def interval_text(rows: Rows, metric: str, *, is_rate: bool) -> str:
    """`figure_text` with the interval's ends after a line break, where it has one."""
    text = figure_text(rows, metric, is_rate=is_rate)
    of_metric = rows.where(metric)
    if not of_metric or of_metric[0].is_exact:
        return text
    low = _number_text(of_metric[0].low, is_rate)
    high = _number_text(of_metric[0].high, is_rate)
    return f"{text}\n{low} – {high}"


def _number_text(value: float, is_rate: bool) -> str:
    return f"{100 * value:.1f}" if is_rate else f"{value:.3f}"


def size_text(rows: Rows) -> str:
    """How many weights a mask removes."""
    removed = rows.where("weights_removed")
    return f"{removed[0].mean:,.0f}" if removed else DASH


def columns_of(
    lines: Mapping[str, Rows],
    titles: Mapping[str, str],
) -> dict[str, str]:
    """The titles of those metrics that any line has."""
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
    """A terminal's table of figures: a line a mask, a column a metric."""
    columns = columns_of(lines, titles)
    grid = text_table(title, ["mask", "weights", *columns.values()])
    for name, rows in lines.items():
        cells = [figure_text(rows, metric, is_rate=is_rate) for metric in columns]
        style = "bold" if name == bold else None
        grid.add_row(name, size_text(rows), *cells, style=style)
    return grid


def text_table(title: str, columns: Sequence[str], *, n_names: int = 1) -> Table:
    """An empty table for a terminal, with names to the left and figures to the right."""
    # What is too wide for the terminal goes on in the next line; nothing is cut.
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(columns):
        grid.add_column(name, justify="left" if number < n_names else "right", overflow="fold")
    return grid


def frame_table(data: "pandas.DataFrame", *, n_names: int = 1) -> Table:
    """A DataFrame for a terminal; its index is left out."""
    grid = text_table("", [escape(str(name)) for name in data.columns], n_names=n_names)
    for line in data.itertuples(index=False):
        grid.add_row(*(escape(str(value)) for value in line))
    return grid
