"""Plotly figures drawn from rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from harmcircuits.circuits.sites import KINDS
from harmcircuits.measurements import Label, Measurement, Rows

RED = "#b3261e"
BLUE = "#1f5fa8"
GREY = "#8a8f98"
AMBER = "#c77700"
GREEN = "#2e7d5b"
SLATE = "#5c6470"
SKY = "#8fa9c4"
VIOLET = "#8e5aa8"
SAND = "#b08d57"
SILVER = "#c3c8cf"
WHITE = "#ffffff"

GRID = "#eceef1"
NO_DATA = "#dfe2e6"  # behind a heatmap's cells
CHANCE_LINE = "#555"
BAR_INTERVAL = "#444"

# In the order in which lines come. The first lines are the ones to look at.
PALETTE = (RED, AMBER, GREY, BLUE, GREEN, SLATE, SKY, VIOLET, SAND)
MODEL_COLOURS = (GREY, AMBER, RED, BLUE, GREEN)
TEXT_COLOURS = (RED, BLUE, GREEN, AMBER)
MASK_COLOURS = (SLATE, RED, AMBER, SILVER, SKY, GREEN, BLUE, GREY)
CURVE_COLOURS = (GREY, RED, BLUE, AMBER, GREEN, SLATE)

FONT = {
    "family": "system-ui, -apple-system, Segoe UI, sans-serif",
    "size": 13,
    "color": "#20242a",
}
SHARE_TICKS = [0.0001, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]  # per cent
LIFT_TICKS = [0.5, 1, 2, 3, 5, 10, 20, 50]
N_SOLID = 2  # of the lines of a share figure
LINE_SPREAD = 0.16  # between models that share a line of an overlap figure
MANY_COLUMNS = 6  # from which on labels are slanted

Cells = Mapping[tuple[Label, Label], float]  # by line and column
Grid = list[list[float | None]]


def share_figure(
    lines: Mapping[str, Mapping[float, Rows]],
    panels: Mapping[str, str],
    *,
    kept: Sequence[str],
) -> go.Figure:
    """Figures against the share of weights removed, in per cent, with 95 % intervals.

    One panel for each metric, and one for the worst kept ability. The first two lines are solid,
    the others dotted.

    Args:
        lines: name -> share -> the rows measured there, one for each metric. A point is left out of
            the panels that it lacks.
        panels: metric -> title.
        kept: metrics of the abilities that should stay.
    """
    titles = [*panels.values(), "worst kept ability"]
    metrics_of_panels = [[metric] for metric in panels]
    metrics_of_panels.append(list(kept))
    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.06)
    for number, (name, points) in enumerate(lines.items()):
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "dash": "solid" if number < N_SOLID else "dot",
            "width": 2.5,
        }
        for column, metrics in enumerate(metrics_of_panels, start=1):
            lowest = _lowest(points, metrics)
            rows = list(lowest.values())
            figure.add_scatter(
                x=[100 * share for share in lowest],
                y=_means(rows),
                error_y=_interval(rows),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line=style,
                marker={"size": 6},
                row=1,
                col=column,
            )
    figure.update_xaxes(
        title="weights removed, %",
        type="log",
        tickvals=SHARE_TICKS,
        gridcolor=GRID,
    )
    figure.update_yaxes(gridcolor=GRID, zeroline=False, rangemode="tozero")
    are_rates = [metric.endswith("_rate") for metric in panels]
    for column, is_rate in enumerate([*are_rates, True], start=1):
        if is_rate:
            figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", col=column)
    return _styled(figure, height=360)


def _lowest(
    points: Mapping[float, Rows],
    metrics: Sequence[str],
) -> dict[float, Measurement]:
    """At every share that has one the lowest figure among these metrics."""
    lowest = {}
    for share, rows in points.items():
        of_metrics = Rows()
        for metric in metrics:
            of_metrics += rows.where(metric)
        if len(of_metrics):
            lowest[share] = min(of_metrics, key=_mean)
    return lowest


def location_figure(rows: Rows) -> go.Figure:
    """Share of each block matrix that a mask takes (%), by layer and kind.

    The cell says how many weights.

    Args:
        rows: those of one mask (see `location_rows`); figures of other places are left out.
    """
    share: dict[tuple[Label, Label], float] = {}
    count: dict[tuple[Label, Label], float] = {}
    for row in rows.where("weights_removed", by="matrix"):
        place = row.labels["layer"], row.labels["kind"]
        share[place] = 100 * row.mean / int(row.labels["of"])
        count[place] = row.mean
    layers = sorted({int(layer) for layer, _ in share})
    present = {kind for _, kind in share}
    kinds = [kind for kind in KINDS if kind in present]

    heatmap = go.Heatmap(
        z=_grid(share, layers, kinds),
        x=kinds,
        y=[f"layer {layer}" for layer in layers],
        text=_texts(_grid(count, layers, kinds), _whole_number),
        texttemplate="%{text}",
        colorscale=[[0, WHITE], [1, RED]],
        zmin=0,
        colorbar={"title": "% of<br>matrix"},
    )
    figure = go.Figure(heatmap)
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, height=110 + 48 * len(layers))


def cross_ablation_figure(
    panels: Mapping[str, Rows],
    rates: Mapping[str, str],
) -> go.Figure:
    """Rates under every removed circuit, in per cent.

    White: the ability is whole; red: it is gone.

    Args:
        panels: title -> rows, whose label `mask` names the removed circuit: the lines.
        rates: metric -> title: the columns.
    """
    figure = make_subplots(
        1,
        len(panels),
        subplot_titles=list(panels),
        shared_yaxes=True,
        horizontal_spacing=0.02,
    )
    masks = _labels_of(panels.values(), "mask")
    for column, rows in enumerate(panels.values(), start=1):
        percent: dict[tuple[Label, Label], float] = {}
        for row in rows:
            mask = str(row.labels["mask"])
            percent[mask, row.metric] = 100 * row.mean
        grid = _grid(percent, masks, list(rates))
        heatmap = go.Heatmap(
            z=grid,
            x=list(rates.values()),
            y=masks,
            text=_texts(grid, _whole_number),
            texttemplate="%{text}",
            colorscale=[[0, RED], [1, WHITE]],
            zmin=0,
            zmax=100,
            showscale=False,
            xgap=1,
            ygap=1,
        )
        figure.add_trace(heatmap, row=1, col=column)
    figure.update_yaxes(autorange="reversed", title="removed circuit", col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(tickangle=-40, showgrid=False)
    figure = _styled(figure, height=150 + 30 * len(masks))
    return figure.update_layout(margin={"b": 95, "l": 150}, plot_bgcolor=NO_DATA)


def overlap_figure(
    panels: Mapping[str, Rows],
    pairs: Mapping[tuple[str, str], str],
) -> go.Figure:
    """Lift of pairs of circuits with 95 % intervals; one panel a null, one colour a model.

    The dotted line is chance.

    Args:
        panels: title -> rows of one metric, with the labels `model`, `first` and `second`.
        pairs: (first, second) -> title.
    """
    figure = make_subplots(
        1,
        len(panels),
        subplot_titles=list(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    models = _labels_of(panels.values(), "model")
    middle = (len(models) - 1) / 2
    for column, rows in enumerate(panels.values(), start=1):
        for number, (model, colour) in enumerate(zip(models, MODEL_COLOURS, strict=False)):
            by_line = _first_rows(rows, model, list(pairs))
            shift = LINE_SPREAD * (number - middle)
            lifts = list(by_line.values())
            figure.add_scatter(
                x=_means(lifts),
                y=[line + shift for line in by_line],
                error_x=_interval(lifts),
                mode="markers",
                name=model,
                legendgroup=model,
                showlegend=column == 1,
                marker={"color": colour, "size": 8},
                row=1,
                col=column,
            )
    figure.add_vline(x=1, line={"dash": "dot", "color": CHANCE_LINE})
    figure.update_yaxes(
        tickvals=list(range(len(pairs))),
        ticktext=list(pairs.values()),
        autorange="reversed",
    )
    figure.update_xaxes(type="log", gridcolor=GRID, tickvals=LIFT_TICKS)
    figure = _styled(figure, height=150 + 44 * len(pairs))
    return figure.update_layout(margin={"l": 230})


def _first_rows(
    rows: Rows,
    model: str,
    pairs: Sequence[tuple[str, str]],
) -> dict[int, Measurement]:
    """A model's row of every pair that has one, by the number of the pair."""
    by_line = {}
    for line, (first, second) in enumerate(pairs):
        of_pair = rows.where(model=model, first=first, second=second)
        if len(of_pair):
            by_line[line] = of_pair[0]
    return by_line


def token_figure(lines: Mapping[str, Rows]) -> go.Figure:
    """What each position adds to a mask's score, in nats.

    By its distance from the first answer token.

    Args:
        lines: title -> rows of one kind of text, with the label `offset`.
    """
    figure = go.Figure()
    for (name, of_name), colour in zip(lines.items(), TEXT_COLOURS, strict=False):
        rows = sorted(of_name, key=_offset)
        figure.add_bar(
            x=[row.labels["offset"] for row in rows],
            y=_means(rows),
            error_y=_interval(rows),
            name=name,
            marker_color=colour,
        )
    figure.update_xaxes(title="token, counted from the first answer token", dtick=1)
    figure.update_yaxes(title="nats", gridcolor=GRID)
    return _styled(figure, height=330)


def comparison_figure(
    lines: Mapping[str, Rows],
    columns: Mapping[str, str],
) -> go.Figure:
    """Rates of several masks as bars with 95 % intervals.

    Args:
        lines: name -> rows of one mask.
        columns: metric -> title.
    """
    figure = go.Figure()
    for (name, rows), colour in zip(lines.items(), MASK_COLOURS, strict=False):
        by_title = {}
        for metric, title in columns.items():
            of_metric = rows.where(metric)
            if len(of_metric):
                by_title[title] = of_metric[0]
        rates = list(by_title.values())
        figure.add_bar(
            x=list(by_title),
            y=_means(rates),
            name=name,
            marker_color=colour,
            error_y={**_interval(rates), "color": BAR_INTERVAL},
        )
    figure.update_yaxes(range=[0, 1.06], tickformat=".0%", gridcolor=GRID)
    figure.update_layout(barmode="group", bargap=0.22)
    return _styled(figure, height=360)


def heatmaps(
    panels: Mapping[str, Rows],
    *,
    x: str,
    y: str,
    widest: float | None = None,
) -> go.Figure:
    """One heatmap for each panel, two a line; the mean is in the cell unless it rounds to 0.00.

    Columns and lines stand in the order of the rows. All panels share a colour scale.

    Args:
        panels: title -> rows.
        x: label that names the columns.
        y: label that names the lines.
        widest: the colours reach from -`widest` to `widest`; the largest magnitude by default.
    """
    cells_of_panels = [_cells(rows, x, y) for rows in panels.values()]
    tallest = max(len(_lines_of([cells])) for cells in cells_of_panels)
    figure, plot_height = _two_a_line(
        list(panels),
        line_height=34 * tallest,
        gap=130,  # for slanted labels and titles
        spacing=0.03,
    )
    for number, cells in enumerate(cells_of_panels):
        place = _place(number)
        first = number - number % 2
        # Panels side by side share an axis, so their lines must be the same.
        lines = _lines_of(cells_of_panels[first : first + 2])
        columns = list(dict.fromkeys(column for _, column in cells))
        figure.add_trace(_heatmap(cells, lines, columns), **place)
        angle = -40 if len(columns) > MANY_COLUMNS else 0
        title = y if place["col"] == 1 else None
        figure.update_xaxes(type="category", tickangle=angle, **place)
        figure.update_yaxes(type="category", autorange="reversed", title=title, **place)

    frame = {"showline": True, "mirror": True, "linecolor": SILVER}
    figure.update_xaxes(**frame)
    figure.update_yaxes(**frame)
    end = widest or _largest_magnitude(cells_of_panels) or 1.0
    colours = {
        "colorscale": [[0, BLUE], [0.5, WHITE], [1, RED]],
        "cmin": -end,
        "cmax": end,
        "colorbar": {"thickness": 12},
    }
    figure.update_layout(coloraxis=colours)
    figure = _styled(figure, height=plot_height + 150)
    return figure.update_layout(margin={"l": 80, "b": 100})


def _cells(rows: Rows, x: str, y: str) -> dict[tuple[Label, Label], float]:
    """The means by line and column."""
    cells: dict[tuple[Label, Label], float] = {}
    for row in rows:
        line = str(row.labels[y])
        column = str(row.labels[x])
        cells[line, column] = row.mean
    return cells


def _lines_of(panels: Iterable[Cells]) -> list[Label]:
    lines: dict[Label, None] = {}
    for cells in panels:
        lines |= dict.fromkeys(line for line, _ in cells)
    return list(lines)


def _largest_magnitude(panels: Iterable[Cells]) -> float:
    largest = 0.0
    for cells in panels:
        for value in cells.values():
            largest = max(largest, abs(value))
    return largest


def _heatmap(
    cells: Cells,
    lines: Sequence[Label],
    columns: Sequence[Label],
) -> go.Heatmap:
    grid = _grid(cells, lines, columns)
    return go.Heatmap(
        z=grid,
        x=columns,
        y=lines,
        text=_texts(grid, _two_places),
        texttemplate="%{text}",
        coloraxis="coloraxis",
    )


def profiles(
    panels: Mapping[str, Mapping[str, Rows]],
    *,
    x: str,
    title: str = "",
) -> go.Figure:
    """One panel for each title, two a line, with a curve for each name and 95 % intervals.

    Args:
        panels: title -> name -> rows, in the order in which they stand on the curve.
        x: label on the horizontal axis.
        title: of the vertical axis, which the panels of a line share.
    """
    figure, plot_height = _two_a_line(
        list(panels),
        line_height=170,
        gap=80,  # for labels and titles
        spacing=0.04,
    )
    names: dict[str, None] = {}
    for curves in panels.values():
        names |= dict.fromkeys(curves)
    colours = dict(zip(names, CURVE_COLOURS, strict=False))
    for number, curves in enumerate(panels.values()):
        for name, rows in curves.items():
            figure.add_scatter(
                x=[str(row.labels[x]) for row in rows],
                y=_means(rows),
                error_y=_interval(rows),
                name=name,
                legendgroup=name,
                showlegend=number == 0,
                line={"color": colours[name], "width": 2},
                **_place(number),
            )
    figure.update_xaxes(type="category", gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=SILVER)
    figure.update_yaxes(title=title, col=1)
    figure = _styled(figure, height=plot_height + 130)
    return figure.update_layout(legend={"y": -45 / plot_height}, margin={"b": 80})


def _two_a_line(
    titles: list[str],
    *,
    line_height: int,
    gap: int,
    spacing: float,
) -> tuple[go.Figure, int]:
    """Empty panels, two a line, and the height of all lines; heights and gap in pixels."""
    n_lines = ceil(len(titles) / 2)
    height = n_lines * line_height + (n_lines - 1) * gap
    figure = make_subplots(
        n_lines,
        min(2, len(titles)),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=spacing,
        vertical_spacing=gap / height if n_lines > 1 else 0,
    )
    return figure, height


def _place(number: int) -> dict[str, Any]:
    """Where the panel of this number stands."""
    return {"row": number // 2 + 1, "col": number % 2 + 1}


def _labels_of(panels: Iterable[Rows], name: str) -> list[str]:
    """The values of a label, as they come."""
    values: dict[str, None] = {}
    for rows in panels:
        values |= dict.fromkeys(str(row.labels[name]) for row in rows)
    return list(values)


def _grid(
    cells: Cells,
    lines: Sequence[Label],
    columns: Sequence[Label],
) -> Grid:
    """The cells line by line; None where there is none."""
    grid = []
    for line in lines:
        grid.append([cells.get((line, column)) for column in columns])
    return grid


def _texts(grid: Grid, text: Callable[[float | None], str]) -> list[list[str]]:
    texts = []
    for line in grid:
        texts.append([text(value) for value in line])
    return texts


def _whole_number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _two_places(value: float | None) -> str:
    if value is None or abs(value) < 0.005:
        return ""
    return f"{value:.2f}"


def _means(rows: Iterable[Measurement]) -> list[float]:
    return [row.mean for row in rows]


def _interval(rows: Iterable[Measurement]) -> dict[str, Any]:
    """Plotly's error bar of 95 % intervals."""
    upper = []
    lower = []
    for row in rows:
        upper.append(row.high - row.mean)
        lower.append(row.mean - row.low)
    return {"array": upper, "arrayminus": lower, "thickness": 1, "width": 2}


def _mean(row: Measurement) -> float:
    return row.mean


def _offset(row: Measurement) -> Label:
    return row.labels["offset"]


def _styled(figure: go.Figure, *, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 50, "b": 55},
        font=FONT,
        plot_bgcolor="white",
        paper_bgcolor="white",
        legend={"orientation": "h", "y": -0.22},
    )
    return figure
