"""Rows as tables: for a terminal, as cells of a page, and as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harmcircuits.measurements import Rows

if TYPE_CHECKING:
    import pandas

DASH = "–"  # not measured
NAME_WIDTH = 30  # letters in which a table says whose figures they are
GAP = 2  # letters between columns: the padding, and a line that is blank
PADDING = (0, 1, 0, 0)


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
    # In the order of the titles, not in that in which rows were measured.
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


class TextTable(Table):
    """A terminal's table that cuts nothing: what is too wide goes on in a table below."""

    def __init__(self, title: str, columns: Sequence[str], n_names: int = 1) -> None:
        super().__init__(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=PADDING,
        )
        self.n_names = n_names
        for number, name in enumerate(columns):
            self.add_column(name, justify="left" if number < n_names else "right")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Table | Text | str]:
        """The title, and each part under it."""
        if self.title:
            yield Text(str(self.title), style="table.title")
        for number, columns in enumerate(self._parts(options.max_width)):
            if number:
                yield ""
            yield self._part(columns)
        yield ""

    def _parts(self, width: int) -> list[list[int]]:
        """The columns of each part, by number: as many as fit beside the names."""
        numbers = list(range(len(self.columns)))
        names, figures = numbers[: self.n_names], numbers[self.n_names :]
        parts = [list(names)]
        for number in figures:
            if len(parts[-1]) > len(names) and self._width([*parts[-1], number]) > width:
                parts.append(list(names))
            parts[-1].append(number)
        return parts

    def _width(self, numbers: Sequence[int]) -> int:
        """Of these columns with the gaps between them."""
        widths = [self._column_width(number) for number in numbers]
        return sum(widths) + GAP * (len(numbers) - 1)

    def _column_width(self, number: int) -> int:
        """Whole figures, and the longest word of a title; a name up to `NAME_WIDTH`."""
        column = self.columns[number]
        longest_word = max(cell_len(word) for word in str(column.header).split() or [""])
        widest = max((cell_len(str(cell)) for cell in column.cells), default=0)
        if number < self.n_names:
            widest = min(widest, NAME_WIDTH)
        return max(longest_word, widest)

    def _part(self, numbers: Sequence[int]) -> Table:
        """These columns as a table of their own."""
        part = Table(box=self.box, show_edge=False, pad_edge=False, padding=PADDING)
        for number in numbers:
            column = self.columns[number]
            width = self._column_width(number)
            part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
        cells = [list(self.columns[number].cells) for number in numbers]
        for row, line in zip(self.rows, zip(*cells, strict=True), strict=True):
            part.add_row(*line, style=row.style, end_section=row.end_section)
        return part


def text_table(title: str, columns: Sequence[str], *, n_names: int = 1) -> TextTable:
    """An empty table for a terminal, with names to the left and figures to the right."""
    return TextTable(title, columns, n_names)


def frame_table(data: "pandas.DataFrame", *, n_names: int = 1) -> TextTable:
    """A DataFrame for a terminal; its index is left out."""
    grid = text_table("", [escape(str(name)) for name in data.columns], n_names=n_names)
    for line in data.itertuples(index=False):
        grid.add_row(*(escape(str(value)) for value in line))
    return grid


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *body]
    rows = []
    for cells in lines:
        escaped = [str(cell).replace("|", "\\|") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} |")
    return "\n".join(rows)


def frame_markdown(data: "pandas.DataFrame") -> str:
    """A DataFrame as a Markdown table; its index is left out."""
    return markdown_table(list(data.columns), data.astype(str).to_numpy().tolist())
