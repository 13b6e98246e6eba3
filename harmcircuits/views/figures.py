"""Figures of rows, drawn by matplotlib: for notebooks, for pages, and as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from math import ceil, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from harmcircuits.circuits.sites import MATRIX_KINDS
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.storage import replacing, write_text

RED = "#b3261e"
BLUE = "#1f5fa8"
GREY = "#8a8f98"
AMBER = "#c77700"
GREEN = "#2e7d5b"
SLATE = "#5c6470"
SKY = "#8fa9c4"
VIOLET = "#8e5aa8"
SAND = "#b08d57"
WHITE = "#ffffff"

INK = "#20242a"
GRID = "#eceef1"
NO_DATA = "#dfe2e6"  # behind the cells of a heatmap
CHANCE_LINE = "#555555"
BAR_INTERVAL = "#444444"

# Lines take the colours in this order and then start again; the first colours stand out most.
PALETTE = [RED, AMBER, GREY, BLUE, GREEN, SLATE, SKY, VIOLET, SAND]
MASK_COLOURS = [SLATE, RED, AMBER, VIOLET, SKY, GREEN, BLUE, GREY]
REDS = LinearSegmentedColormap.from_list("reds", [WHITE, RED])
BLUE_TO_RED = LinearSegmentedColormap.from_list("blue to red", [BLUE, WHITE, RED])

WIDTH = 11.5  # inches: the width of a page
LETTER = 0.62  # width of a letter over the size of its text
MIN_TEXT, MAX_TEXT = 5.0, 9.0  # points: size of the text in a cell
FILE_DPI = 200
LEGEND_WIDTH = 150  # letters
LIFT_RANGE = 4.0  # log2: from a sixteenth of chance to sixteen times chance
WORST_KEPT = "worst kept ability"
N_SOLID = 2  # solid lines of a share figure; further lines are dotted
N_UNITS = 12  # heads and neurons that a component map shows

STYLE = rc_params_from_file(
    Path(__file__).with_suffix(".mplstyle"),
    use_default_template=False,
)


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure that a notebook shows, and that a page includes as SVG."""

    figure: Figure

    def save(self, path: str | Path) -> None:
        """Write the figure on white, in the format of the ending: .svg, .png or .pdf."""
        kind = Path(path).suffix.removeprefix(".")
        if kind == "svg":
            write_text(path, self.svg())
            return
        with replacing(path) as unfinished, rc_context(STYLE):
            self.figure.savefig(unfinished, format=kind, dpi=FILE_DPI, facecolor=WHITE)

    def svg(self, background: str = WHITE) -> str:
        """The figure as an SVG element; the background "none" shows that of its page."""
        content = StringIO()
        # Metadata would differ from run to run.
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context(STYLE):
            self.figure.savefig(content, format="svg", facecolor=background, metadata=no_metadata)
        text = content.getvalue()
        return text[text.index("<svg") :]

    def _repr_svg_(self) -> str:
        return self.svg()


@rc_context(STYLE)
def share_figure(
    lines: Mapping[str, Mapping[float, Rows]],
    panels: Mapping[str, str],
    *,
    abilities: Sequence[str],
) -> Picture:
    """Figures against the share of weights removed, in per cent, with 95 % intervals."""
    metrics = {title: [metric] for metric, title in panels.items()}
    metrics[WORST_KEPT] = list(abilities)
    colours = coloured(lines, PALETTE)
    figure, axes = subplots(len(metrics), height=3.9)
    for panel, title in zip(axes, metrics, strict=True):
        for number, (line, points) in enumerate(lines.items()):
            style = "-" if number < N_SOLID else ":"
            lowest = _lowest(points, metrics[title])
            draw_curve(panel, lowest, color=colours[line], label=line, linestyle=style)

        panel.set(title=title, xlabel="weights removed, %", xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        if title == WORST_KEPT or metrics[title][0].endswith("_rate"):
            panel.set_ylim(-0.03, 1.05)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    return with_legend(figure)


def _lowest(
    points: Mapping[float, Rows],
    metrics: Sequence[str],
) -> dict[float, Measurement]:
    """The lowest figure of these metrics at each share, in per cent."""
    lowest = {}
    for share, rows in points.items():
        figures = Rows(row for row in rows if row.metric in metrics)
        if figures:
            lowest[100 * share] = figures.smallest()
    return lowest


@rc_context(STYLE)
def comparison_figure(
    lines: Mapping[str, Rows],
    columns: Mapping[str, str],
) -> Picture:
    """Rates of several masks as bars with 95 % intervals."""
    bars = {}
    for line, rows in lines.items():
        present = [metric for metric in columns if metric in rows.metrics]
        bars[line] = {columns[metric]: rows.where(metric)[0] for metric in present}
    figure, (panel,) = subplots(1, height=3.75)
    draw_bars(panel, list(columns.values()), bars, coloured(lines, MASK_COLOURS))
    panel.set_ylim(0, 1.06)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.grid(visible=False, axis="x")
    return with_legend(figure)


@rc_context(STYLE)
def location_figure(rows: Rows) -> Picture:
    """The share of each block matrix that a mask removes (%), by layer and kind."""
    removed, weights = _matrix_grids(rows)
    percent = 100 * removed / weights
    figure, (panel,) = subplots(1, height=1.2 + _height(removed))
    scale = Normalize(0, percent.max(axis=None))
    draw_cells(panel, percent, removed.map(whole_number), REDS, scale)
    draw_scale(figure, [panel], REDS, scale, "% of matrix")
    return Picture(figure)


@rc_context(STYLE)
def component_map(rows: Rows) -> Picture:
    """The location of a mask's weights against chance: matrices, and the units that lose most."""
    removed, weights = _matrix_grids(rows)
    share = removed.sum(axis=None) / weights.sum(axis=None)
    height = max(4.4, 1.8 + _height(removed))
    figure, (cells, bars) = subplots(2, height=height)
    scale = Normalize(-LIFT_RANGE, LIFT_RANGE)
    lift = _log_lift(removed, weights * share)
    draw_cells(cells, lift, removed.map(whole_number), BLUE_TO_RED, scale)
    cells.set_title("weights removed")

    units = rows.where("weights_removed", by="unit")
    units = sorted(units, key=lambda row: -row.mean)[:N_UNITS]
    names = ["layer {layer} {kind} {unit} {index}".format(**row.labels) for row in units]
    n_removed = np.array([row.mean for row in units])
    n_weights = np.array([float(row.labels["of"]) for row in units])
    lift = _log_lift(n_removed, n_weights * share)
    colours = BLUE_TO_RED(scale(lift))
    places = range(len(units))
    marks = bars.barh(
        places,
        n_removed,
        color=colours,
        edgecolor=GREY,
        linewidth=0.5,
    )
    bars.bar_label(marks, fmt="{:,.0f}", padding=3)
    bars.set_title("heads and neurons that lose most")
    bars.set_xticks([])
    bars.grid(visible=False)
    bars.set_yticks(places, labels=names)
    bars.invert_yaxis()

    powers = [-4, -2, 0, 2, 4]
    bar = draw_scale(figure, [cells, bars], BLUE_TO_RED, scale, "times chance")
    bar.set_ticks(powers, labels=["1/16", "1/4", "1", "4", "16"])
    return Picture(figure)


def _matrix_grids(rows: Rows) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Removed weights and all weights, by layer and kind."""
    table = rows.where("weights_removed", by="matrix").frame()
    table = table.astype({"layer": int, "of": int})
    table["place"] = "layer " + table["layer"].astype(str)
    places = table.sort_values("layer")["place"].unique()
    present = set(table["kind"])
    kinds = [kind for kind in MATRIX_KINDS if kind in present]

    def grid(values: str) -> pandas.DataFrame:
        cells = table.pivot_table(index="place", columns="kind", values=values, aggfunc="last")
        return cells.reindex(index=places, columns=kinds)

    return grid("mean"), grid("of")


def _log_lift(removed: Any, by_chance: Any) -> Any:
    """log2 of removed over chance, clipped to the range of the colours; zero is the lowest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(removed / by_chance).clip(-LIFT_RANGE, LIFT_RANGE)


def _height(grid: pandas.DataFrame) -> float:
    """The height of a heatmap in inches; many rows are lower, but still legible."""
    return len(grid) * max(0.19, min(0.5, 6 / len(grid)))


# Parts of figures, for this file and for the figures of the analyses


def subplots(
    n_columns: int,
    n_lines: int = 1,
    *,
    height: float,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """An empty figure of a page's width, and its panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(n_lines, n_columns, squeeze=False, **options)
    return figure, list(axes.flat)


def coloured(
    names: Iterable[str],
    colours: Sequence[str],
) -> dict[str, str]:
    """The colour of each name."""
    return dict(zip(names, cycle(colours), strict=False))


def draw_curve(
    axes: Axes,
    points: Mapping[Any, Measurement],
    **style: Any,
) -> None:
    """Draw means at their places on the x axis, with 95 % intervals."""
    if not points:
        return
    means = [row.mean for row in points.values()]
    reach = interval_reach(points.values())
    marks = {"marker": "o", "markersize": 4.5, "linewidth": 2, **style}
    axes.errorbar(list(points), means, yerr=reach, elinewidth=1, capsize=2, **marks)


def draw_bars(
    axes: Axes,
    places: Sequence[Any],
    lines: Mapping[str, Mapping[Any, Measurement]],
    colours: Mapping[str, str],
) -> None:
    """Draw bars with 95 % intervals: at each place one bar for every line with a row there."""
    names = [line for line in lines if lines[line]]
    width = 0.78 / max(1, len(names))
    interval = {"elinewidth": 1, "capsize": 2, "ecolor": BAR_INTERVAL}
    for number, line in enumerate(names):
        offset = width * (number - (len(names) - 1) / 2)
        rows = lines[line]
        x = [places.index(place) + offset for place in rows]
        means = [row.mean for row in rows.values()]
        axes.bar(
            x,
            means,
            width,
            yerr=interval_reach(rows.values()),
            color=colours[line],
            label=line,
            error_kw=interval,
        )
    name_columns(axes, places, first=0.0)


def draw_cells(
    axes: Axes,
    grid: pandas.DataFrame,
    texts: pandas.DataFrame,
    colours: Colormap,
    scale: Normalize,
) -> None:
    """Draw a heatmap with a text in each cell; a cell without a value is grey."""
    axes.set_facecolor(NO_DATA)
    axes.grid(visible=False)
    values = np.ma.masked_invalid(grid.to_numpy(dtype=float))
    axes.pcolormesh(values, cmap=colours, norm=scale, edgecolors=GRID, linewidth=0.8)
    name_columns(axes, list(grid.columns))
    places = 0.5 + np.arange(len(grid))
    axes.set_yticks(places, labels=list(grid.index))
    axes.set_ylim(len(grid), 0)  # the first row on top

    room = 72 * _inches(axes) / max(1, len(grid.columns))
    longest = max(1, texts.map(len).max(axis=None))
    size = min(MAX_TEXT, room / (LETTER * longest))
    if size < MIN_TEXT:
        return
    style = {"ha": "center", "va": "center", "size": size}
    for (row, column), value in np.ma.ndenumerate(values):
        text = texts.iat[row, column]
        colour = _ink(colours(scale(value)))
        axes.text(column + 0.5, row + 0.5, text, color=colour, **style)


def draw_scale(
    figure: Figure,
    axes: Sequence[Axes],
    colours: Colormap,
    scale: Normalize,
    title: str = "",
) -> Any:
    """Draw the scale of the panels' colours to their right."""
    mappable = ScalarMappable(scale, colours)
    bar = figure.colorbar(mappable, ax=axes, aspect=25, pad=0.015)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(title)
    return bar


def name_columns(
    axes: Axes,
    names: Sequence[Any],
    *,
    first: float = 0.5,
) -> None:
    """Write names below a panel; many names are slanted and thinned out."""
    texts = [str(name) for name in names]
    room = _inches(axes) / max(1, len(texts))
    height = STYLE["font.size"] / 72
    longest = max(map(len, texts), default=0)
    step = 1
    slant = {}
    if room < LETTER * height * (longest + 1):
        step = ceil(1.4 * height / room)
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    places = first + np.arange(len(texts))
    axes.set_xticks(places[::step], labels=texts[::step], **slant)


def with_legend(figure: Figure) -> Picture:
    """The figure with one legend below all panels, in which every name occurs once."""
    legend = {}
    for axes in figure.axes:
        marks, names = axes.get_legend_handles_labels()
        legend |= dict(zip(names, marks, strict=True))
    if legend:
        n_letters = sum(len(name) + 7 for name in legend)  # a mark is as wide as 7 letters
        n_rows = ceil(n_letters / LEGEND_WIDTH)
        figure.legend(
            list(legend.values()),
            list(legend),
            loc="outside lower center",
            ncols=ceil(len(legend) / n_rows),
        )
    return Picture(figure)


def interval_reach(rows: Iterable[Measurement]) -> list[list[float]]:
    """The lengths of the intervals below and above their means."""
    reach = [[], []]
    for row in rows:
        reach[0].append(row.mean - row.low)
        reach[1].append(row.high - row.mean)
    return reach


def whole_number(value: float) -> str:
    return "" if isnan(value) else f"{value:.0f}"


def _inches(axes: Axes) -> float:
    """The approximate width of a panel, before the layout of the names beside it."""
    return 1.1 * axes.bbox.width / STYLE["figure.dpi"]


def _ink(colour: Any) -> str:
    """Dark or white: the more legible text on a colour."""
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else WHITE
