"""Figures that only analyses draw, from the same parts as the figures of the package."""

from collections.abc import Mapping, Sequence
from math import ceil, isnan
from typing import Any

import pandas
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import (
    AMBER,
    BLUE,
    BLUE_TO_RED,
    CHANCE_LINE,
    GREEN,
    GREY,
    RED,
    REDS,
    SAND,
    SLATE,
    STYLE,
    VIOLET,
    Picture,
    coloured,
    draw_bars,
    draw_cells,
    draw_curve,
    draw_scale,
    interval_reach,
    name_columns,
    subplots,
    whole_number,
    with_legend,
)

MODEL_COLOURS = [GREY, AMBER, RED, BLUE, GREEN]
TEXT_COLOURS = [RED, BLUE, GREEN, AMBER]
CURVE_COLOURS = [GREY, RED, BLUE, AMBER, GREEN, SLATE, VIOLET, SAND]
LIFT_TICKS = [0.5, 1, 2, 3, 5, 10, 20, 50]
LINE_SPREAD = 0.16  # between models that share a line of an overlap figure


@rc_context(STYLE)
def cross_ablation_figure(panels: Mapping[str, Rows], rates: Mapping[str, str]) -> Picture:
    """Rates under every removed circuit, in per cent."""
    grids = {}
    for title, rows in panels.items():
        grid = grid_of(rows, y="mask", x="metric").reindex(columns=list(rates))
        grids[title] = 100 * grid.rename(columns=rates)
    masks = _common_lines(list(grids.values()))
    figure, axes = subplots(len(panels), height=1.6 + 0.32 * len(masks), sharey=True)
    for panel, (title, grid) in zip(axes, grids.items(), strict=True):
        cells = grid.reindex(index=masks)
        # As the tables round it: 62.5 is 62.
        draw_cells(panel, cells, cells.map(whole_number), REDS.reversed(), Normalize(0, 100))
        panel.set_title(title)
    axes[0].set_ylabel("removed circuit")
    return Picture(figure)


def protection_panels(rows: Rows, titles: Mapping[str, str]) -> dict[str, Rows]:
    """A panel for each measured value of `protected`: the model unpruned, and under its circuits."""
    panels = {}
    for protected, title in titles.items():
        pruned = rows.where(protected=protected)
        if pruned:
            panels[title] = rows.where(mask="none") + pruned
    return panels


@rc_context(STYLE)
def overlap_figure(panels: Mapping[str, Rows], pairs: Mapping[tuple[str, str], str]) -> Picture:
    """Lift of pairs of circuits with 95 % intervals; one panel a null, one colour a model."""
    models: dict[str, None] = {}
    for rows in panels.values():
        models |= dict.fromkeys(rows.by("model"))
    colours = coloured(models, MODEL_COLOURS)
    figure, axes = subplots(len(panels), height=1.6 + 0.46 * len(pairs), sharey=True)
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        panel.set(title=title, xscale="log")
        panel.axvline(1, color=CHANCE_LINE, linestyle=":")
        for number, model in enumerate(models):
            shift = LINE_SPREAD * (number - (len(models) - 1) / 2)
            points = {}
            for place, (first, second) in enumerate(pairs):
                lifts = rows.where(model=model, first=first, second=second)
                if lifts:
                    points[place + shift] = lifts[0]
            panel.errorbar(
                [row.mean for row in points.values()],
                list(points),
                xerr=interval_reach(points.values()),
                color=colours[model],
                label=model,
                fmt="o",
                elinewidth=1,
                capsize=2,
            )
        panel.xaxis.set_major_locator(FixedLocator(LIFT_TICKS))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
    axes[0].set_yticks(range(len(pairs)), labels=list(pairs.values()))
    axes[0].invert_yaxis()
    return with_legend(figure)


@rc_context(STYLE)
def token_figure(lines: Mapping[str, Rows]) -> Picture:
    """What each position adds to a mask's score, in nats."""
    bars = {}
    offsets: set[int] = set()
    for line, rows in lines.items():
        bars[line] = {int(row.labels["offset"]): row for row in rows}
        offsets |= set(bars[line])
    figure, (panel,) = subplots(1, height=3.4)
    draw_bars(panel, sorted(offsets), bars, coloured(lines, TEXT_COLOURS))
    panel.grid(visible=False, axis="x")
    panel.set(xlabel="token, counted from the first answer token", ylabel="nats")
    return with_legend(figure)


@rc_context(STYLE)
def heatmaps(panels: Mapping[str, Rows], *, x: str, y: str, widest: float | None = None) -> Picture:
    """One heatmap for each panel, two a line; the mean is in the cell unless it rounds to 0.00."""
    grids = [grid_of(rows, y=y, x=x) for rows in panels.values()]
    cells = pandas.concat(grids)
    tallest = max(len(grid) for grid in grids)
    longest = max(len(name) for name in cells.columns)
    # With its title, and its names, which may be slanted.
    panel_height = 0.9 + 0.05 * longest + 0.36 * tallest
    figure, axes = _panels(len(grids), panel_height)
    largest = cells.abs().max(axis=None)
    end = widest or (1.0 if isnan(largest) else largest) or 1.0
    scale = Normalize(-end, end)
    for number, (title, grid) in enumerate(zip(panels, grids, strict=True)):
        # Panels side by side have the same lines.
        first = number - number % 2
        lines = grid.reindex(index=_common_lines(grids[first : first + 2]))
        draw_cells(axes[number], lines, lines.map(_two_places), BLUE_TO_RED, scale)
        axes[number].set_title(title)
        if number == first:
            axes[number].set_ylabel(y)
        else:
            axes[number].set_yticks([])
    draw_scale(figure, axes, BLUE_TO_RED, scale)
    return Picture(figure)


@rc_context(STYLE)
def profiles(panels: Mapping[str, Mapping[str, Rows]], *, x: str, title: str = "") -> Picture:
    """One panel for each title, two a line, with a curve for each name and 95 % intervals."""
    names: dict[str, None] = {}
    for curves in panels.values():
        names |= dict.fromkeys(curves)
    colours = coloured(names, CURVE_COLOURS)
    figure, axes = _panels(len(panels), 2.3, 0.9, sharey="row")
    for panel, (panel_title, curves) in zip(axes, panels.items(), strict=False):
        places: dict[str, None] = {}
        for rows in curves.values():
            places |= dict.fromkeys(str(row.labels[x]) for row in rows)
        order = list(places)
        for name, rows in curves.items():
            points = {order.index(str(row.labels[x])): row for row in rows}
            draw_curve(panel, points, color=colours[name], label=name)
        name_columns(panel, order, first=0.0)
        panel.set_title(panel_title)
    for panel in axes[:: min(2, len(panels))]:
        panel.set_ylabel(title)
    return with_legend(figure)


def _panels(
    n_panels: int, height: float, margin: float = 0.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of panels of this height, two a line; the last place may stay empty."""
    n_lines, n_columns = ceil(n_panels / 2), min(2, n_panels)
    figure, axes = subplots(n_columns, n_lines, height=margin + height * n_lines, **options)
    for panel in axes[n_panels:]:
        panel.set_visible(False)
    return figure, axes


def grid_of(rows: Rows, *, y: str, x: str) -> pandas.DataFrame:
    """The means by line and column, which stand as they come; NaN where there is none."""
    if not rows:
        return pandas.DataFrame()
    table = rows.frame().astype({x: str, y: str})
    grid = table.pivot_table(index=y, columns=x, values="mean", aggfunc="last")
    return grid.reindex(index=table[y].unique(), columns=table[x].unique())


def _common_lines(grids: Sequence[pandas.DataFrame]) -> pandas.Index:
    """The lines of all grids, as they come."""
    return pandas.concat(grids).index.unique()


def _two_places(value: float) -> str:
    if isnan(value) or abs(value) < 0.005:
        return ""
    return f"{value:.2f}"
