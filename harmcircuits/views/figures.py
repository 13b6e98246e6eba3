"""Figures, drawn once by matplotlib from rows: for a notebook, for a page, and as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from math import ceil, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib import rc_context
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

# In the order in which lines come; after the last colour the first comes again. The first lines
# are the ones to look at.
PALETTE = [RED, AMBER, GREY, BLUE, GREEN, SLATE, SKY, VIOLET, SAND]
MASK_COLOURS = [SLATE, RED, AMBER, VIOLET, SKY, GREEN, BLUE, GREY]
REDS = LinearSegmentedColormap.from_list("reds", [WHITE, RED])
BLUE_TO_RED = LinearSegmentedColormap.from_list("blue to red", [BLUE, WHITE, RED])

WIDTH = 11.5  # inches: as wide as a page
LETTER = 0.62  # of a text's size, the width of a letter
LEAST_TEXT, MOST_TEXT = 5.0, 9.0  # points, of the text in a cell
FILE_DPI = 200
LEGEND_WIDTH = 150  # letters
LIFT_RANGE = 4.0  # of log2: from a sixteenth of chance to sixteen times chance
WORST_KEPT = "worst kept ability"
N_SOLID = 2  # of the lines of a share figure
N_UNITS = 12  # heads and neurons of a component map

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.bottom": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.hspace": 0.05,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.wspace": 0.03,
    "figure.dpi": 100,
    "figure.facecolor": "none",  # a page has its own
    # What it measures texts by; a page writes them in narrower letters.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.75,  # 13 pixels of a page
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "harmcircuits",  # names in the file are not drawn anew
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "xtick.color": INK,
    "xtick.major.size": 0,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure that notebooks show, that saves itself, and that a page takes as SVG."""

    figure: Figure

    def save(self, path: str | Path) -> None:
        """Write it on white as the ending says: .svg, .png or .pdf."""
        kind = Path(path).suffix.removeprefix(".")
        if kind == "svg":
            write_text(path, self.svg())
            return
        with replacing(path) as unfinished, rc_context(STYLE):
            self.figure.savefig(unfinished, format=kind, dpi=FILE_DPI, facecolor=WHITE)

    def svg(self, background: str = WHITE) -> str:
        """As an SVG element; on "none" it takes the background of its page."""
        content = StringIO()
        # Nothing that differs from run to run.
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context(STYLE):
            self.figure.savefig(content, format="svg", facecolor=background, metadata=unsaid)
        declared = content.getvalue()
        return declared[declared.index("<svg") :]

    def _repr_svg_(self) -> str:
        return self.svg()


@rc_context(STYLE)
def share_figure(
    lines: Mapping[str, Mapping[float, Rows]],
    panels: Mapping[str, str],
    *,
    kept: Sequence[str],
) -> Picture:
    """Figures against the share of weights removed, in per cent, with 95 % intervals."""
    metrics = {title: [metric] for metric, title in panels.items()}
    metrics[WORST_KEPT] = list(kept)
    colours = coloured(lines, PALETTE)
    figure, axes = subplots(len(metrics), height=3.9)
    for panel, (title, of_panel) in zip(axes, metrics.items(), strict=True):
        panel.set(title=title, xlabel="weights removed, %", xscale="log")
        for number, (line, points) in enumerate(lines.items()):
            lowest = {}
            for share, rows in points.items():
                measured = Rows(row for row in rows if row.metric in of_panel)
                if measured:
                    lowest[100 * share] = measured.smallest()
            style = "-" if number < N_SOLID else ":"
            draw_curve(panel, lowest, color=colours[line], label=line, linestyle=style)

        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        if title == WORST_KEPT or of_panel[0].endswith("_rate"):
            panel.set_ylim(-0.03, 1.05)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    return with_legend(figure)


@rc_context(STYLE)
def comparison_figure(lines: Mapping[str, Rows], columns: Mapping[str, str]) -> Picture:
    """Rates of several masks as bars with 95 % intervals."""
    bars = {}
    for line, rows in lines.items():
        measured = [metric for metric in columns if rows.where(metric)]
        bars[line] = {columns[metric]: rows.where(metric)[0] for metric in measured}
    figure, (panel,) = subplots(1, height=3.75)
    draw_bars(panel, list(columns.values()), bars, coloured(lines, MASK_COLOURS))
    panel.set_ylim(0, 1.06)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.grid(visible=False, axis="x")
    return with_legend(figure)


@rc_context(STYLE)
def location_figure(rows: Rows) -> Picture:
    """Share of each block matrix that a mask takes (%), by layer and kind."""
    removed, of = _of_matrices(rows)
    percent = 100 * removed / of
    figure, (panel,) = subplots(1, height=1.2 + _height(removed))
    scale = Normalize(0, percent.max(axis=None))
    draw_cells(panel, percent, removed.map(whole_number), REDS, scale)
    draw_scale(figure, [panel], REDS, scale, "% of matrix")
    return Picture(figure)


@rc_context(STYLE)
def component_map(rows: Rows) -> Picture:
    """Where a mask's weights sit, against chance: matrices, and the units that lose most."""
    removed, of = _of_matrices(rows)
    evenly = removed.sum(axis=None) / of.sum(axis=None)
    figure, (cells, bars) = subplots(2, height=max(4.4, 1.8 + _height(removed)))
    scale = Normalize(-LIFT_RANGE, LIFT_RANGE)
    lift = _log_lift(removed, of * evenly)
    draw_cells(cells, lift, removed.map(whole_number), BLUE_TO_RED, scale)
    cells.set_title("weights removed")

    units = sorted(rows.where("weights_removed", by="unit"), key=lambda row: -row.mean)[:N_UNITS]
    names = ["layer {layer} {kind} {unit} {index}".format(**row.labels) for row in units]
    n_removed = np.array([row.mean for row in units])
    by_chance = np.array([float(row.labels["of"]) for row in units]) * evenly
    colours = BLUE_TO_RED(scale(_log_lift(n_removed, by_chance)))
    drawn = bars.barh(
        range(len(units)),
        n_removed,
        color=colours,
        edgecolor=GREY,
        linewidth=0.5,
    )
    bars.bar_label(drawn, fmt="{:,.0f}", padding=3)
    bars.set_title("heads and neurons that lose most")
    bars.set_xticks([])
    bars.grid(visible=False)
    bars.set_yticks(range(len(units)), labels=names)
    bars.invert_yaxis()

    powers = [-4, -2, 0, 2, 4]
    bar = draw_scale(figure, [cells, bars], BLUE_TO_RED, scale, "times chance")
    bar.set_ticks(powers, labels=["1/16", "1/4", "1", "4", "16"])
    return Picture(figure)


def _of_matrices(rows: Rows) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Removed weights and all weights, by layer and kind."""
    table = rows.where("weights_removed", by="matrix").frame()
    table = table.astype({"layer": int, "of": int})
    table["place"] = "layer " + table["layer"].astype(str)
    places = table.sort_values("layer")["place"].unique()
    present = set(table["kind"])
    kinds = [kind for kind in MATRIX_KINDS if kind in present]
    grids = []
    for values in ("mean", "of"):
        grid = table.pivot_table(index="place", columns="kind", values=values, aggfunc="last")
        grids.append(grid.reindex(index=places, columns=kinds))
    removed, of = grids
    return removed, of


def _log_lift(removed: Any, chance: Any) -> Any:
    """log2 of removed over chance, within what the colours show; none removed is the lowest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(removed / chance).clip(-LIFT_RANGE, LIFT_RANGE)


def _height(grid: pandas.DataFrame) -> float:
    """Inches of the lines of a heatmap: of many they are lower, as long as they can be read."""
    return len(grid) * max(0.19, min(0.5, 6 / len(grid)))


# What figures are made of, here and where analyses draw their own.


def subplots(
    n_columns: int,
    n_lines: int = 1,
    *,
    height: float,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """An empty figure, as wide as a page, and its panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(n_lines, n_columns, squeeze=False, **options)
    return figure, list(axes.flat)


def coloured(names: Iterable[str], colours: Sequence[str]) -> dict[str, str]:
    """The colour of each name."""
    return dict(zip(names, cycle(colours), strict=False))


def draw_curve(
    axes: Axes,
    points: Mapping[Any, Measurement],
    **style: Any,
) -> None:
    """Means at their places on the x axis, with 95 % intervals; nothing where there are none."""
    if points:
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
    """Bars with 95 % intervals, at each place one for every line that was measured there."""
    measured = [line for line in lines if lines[line]]
    width = 0.78 / max(1, len(measured))
    interval = {"elinewidth": 1, "capsize": 2, "ecolor": BAR_INTERVAL}
    for number, line in enumerate(measured):
        left = width * (number - (len(measured) - 1) / 2)
        rows = lines[line]
        axes.bar(
            [places.index(place) + left for place in rows],
            [row.mean for row in rows.values()],
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
    """A heatmap with a text in each cell; grey where there is no value."""
    axes.set_facecolor(NO_DATA)
    axes.grid(visible=False)
    values = np.ma.masked_invalid(grid.to_numpy(dtype=float))
    axes.pcolormesh(values, cmap=colours, norm=scale, edgecolors=GRID, linewidth=0.8)
    name_columns(axes, list(grid.columns))
    axes.set_yticks(0.5 + np.arange(len(grid)), labels=list(grid.index))
    axes.set_ylim(len(grid), 0)  # the first line on top

    room = 72 * _inches(axes) / max(1, len(grid.columns))
    longest = max(1, texts.map(len).max(axis=None))
    size = min(MOST_TEXT, room / (LETTER * longest))
    if size < LEAST_TEXT:
        return
    place = {"ha": "center", "va": "center", "size": size}
    for (line, column), value in np.ma.ndenumerate(values):
        colour = _ink(colours(scale(value)))
        axes.text(column + 0.5, line + 0.5, texts.iat[line, column], color=colour, **place)


def draw_scale(
    figure: Figure,
    axes: Sequence[Axes],
    colours: Colormap,
    scale: Normalize,
    title: str = "",
) -> Any:
    """The colours of these panels and their values, to the right."""
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, aspect=25, pad=0.015)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(title)
    return bar


def name_columns(axes: Axes, names: Sequence[Any], *, first: float = 0.5) -> None:
    """Write names below a panel: slanted, and not all, where there are many."""
    texts = [str(name) for name in names]
    room = _inches(axes) / max(1, len(texts))
    height = STYLE["font.size"] / 72
    longest = max((len(text) for text in texts), default=0)
    every, slant = 1, {}
    if room < LETTER * height * (longest + 1):
        every = ceil(1.4 * height / room)
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    places = first + np.arange(len(texts))
    axes.set_xticks(places[::every], labels=texts[::every], **slant)


def with_legend(figure: Figure) -> Picture:
    """The figure with one legend below all panels, in which every name stands once."""
    handles = {}
    for axes in figure.axes:
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    if handles:
        letters = sum(len(name) + 7 for name in handles)  # with its mark
        n_lines = ceil(letters / LEGEND_WIDTH)
        columns = ceil(len(handles) / n_lines)
        marks, names = list(handles.values()), list(handles)
        figure.legend(marks, names, loc="outside lower center", ncols=columns)
    return Picture(figure)


def interval_reach(rows: Iterable[Measurement]) -> list[list[float]]:
    """How far intervals reach below and above their means."""
    measured = list(rows)
    below = [row.mean - row.low for row in measured]
    above = [row.high - row.mean for row in measured]
    return [below, above]


def whole_number(value: float) -> str:
    return "" if isnan(value) else f"{value:.0f}"


def _inches(axes: Axes) -> float:
    """About how wide a panel will be: the names beside it are not laid out yet."""
    return 1.1 * axes.bbox.width / STYLE["figure.dpi"]


def _ink(colour: Any) -> str:
    """Dark or white, whichever is read better on a colour."""
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else WHITE
