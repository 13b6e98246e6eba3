"""Plotly figures drawn from rows."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import plotly.express as px
import plotly.graph_objects as go
from matplotlib.figure import Figure as MatplotlibFigure
from plotly.subplots import make_subplots

from harmcircuits.circuits.sites import KINDS
from harmcircuits.measurements import Rows
from harmcircuits.views.page import write_view
from harmcircuits.views.plotly_stills import plotly_still
from harmcircuits.views.stills import CLICK, ending, still, with_still, write_still

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

# In the order in which lines come; after the last colour the first comes again. The first lines
# are the ones to look at.
PALETTE = [RED, AMBER, GREY, BLUE, GREEN, SLATE, SKY, VIOLET, SAND]
MODEL_COLOURS = [GREY, AMBER, RED, BLUE, GREEN]
TEXT_COLOURS = [RED, BLUE, GREEN, AMBER]
MASK_COLOURS = [SLATE, RED, AMBER, VIOLET, SKY, GREEN, BLUE, GREY]
CURVE_COLOURS = [GREY, RED, BLUE, AMBER, GREEN, SLATE]

FONT = {
    "family": "system-ui, -apple-system, Segoe UI, sans-serif",
    "size": 13,
    "color": "#20242a",
}
TITLE_SIZE = 16  # of a panel
INTERVAL = {"thickness": 1, "width": 2}
SHARE_TICKS = [
    0.0001,
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
]  # per cent
LIFT_TICKS = [0.5, 1, 2, 3, 5, 10, 20, 50]
LIFT_RANGE = 4.0  # of log2: from a sixteenth of chance to sixteen times chance
MAP_FIGURES = ["mean", "of", "chance"]  # weights removed, weights, weights removed by chance
COUNTS_TEXT = (
    "%{customdata[0]:,.0f} of %{customdata[1]:,.0f} weights removed<br>"
    "%{customdata[2]:,.1f} by chance<extra></extra>"
)
WORST_KEPT = "worst kept ability"
N_SOLID = 2  # of the lines of a share figure
LINE_SPREAD = 0.16  # between models that share a line of an overlap figure
SCREEN = 600  # pixels
LEAST_LINE = 18  # pixels, for a number
MANY_COLUMNS = 6  # from which on labels are slanted


class Picture(go.Figure):
    """A plotly figure that saves itself, and that notebooks show where no script runs as well."""

    # IPython would show it by this before it asks for `_repr_mimebundle_`.
    _ipython_display_: Any = None

    def save(self, path: str | Path, title: str = "") -> None:
        """Write it as a page that needs no network (5 MB: plotly's script), or as a still."""
        if ending(path) == ".html":
            content = self.to_html(full_html=False, include_plotlyjs=True)
            write_view(path, title or "Figure", content)
        else:
            write_still(path, self._still, title)

    def _still(self) -> MatplotlibFigure:
        return plotly_still(self)

    def _repr_mimebundle_(self, *args: Any, **options: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(*args, **options)
        if "text/html" in bundle:
            bundle["text/html"] = with_still(bundle["text/html"], "Plotly", self._still, "Figure")
        image = still(self._still, "png")
        return {**bundle, "image/png": b64encode(image).decode()}


def share_figure(
    lines: Mapping[str, Mapping[float, Rows]],
    panels: Mapping[str, str],
    *,
    kept: Sequence[str],
) -> Picture:
    """Figures against the share of weights removed, in per cent, with 95 % intervals."""
    metrics = {title: [metric] for metric, title in panels.items()}
    metrics[WORST_KEPT] = list(kept)
    rows_of_lines = {line: _labelled(points, "share") for line, points in lines.items()}
    together = _labelled(rows_of_lines, "line")
    rows_of_panels = {}
    for title, of_panel in metrics.items():
        rows_of_panels[title] = Rows(row for row in together if row.metric in of_panel)

    place = ["panel", "line", "share"]
    table = _table(_labelled(rows_of_panels, "panel"), *place)
    table["percent"] = 100 * table["share"]
    ascending = table.sort_values("mean", kind="stable")
    lowest = ascending.drop_duplicates(place).sort_index()

    figure = px.line(
        lowest,
        x="percent",
        y="mean",
        error_y="above",
        error_y_minus="below",
        color="line",
        color_discrete_sequence=PALETTE,
        line_dash="line",
        line_dash_sequence=["solid"] * N_SOLID + ["dot"] * len(lines),
        facet_col="panel",
        facet_col_spacing=0.06,
        category_orders={
            "line": list(lines),
            "panel": list(metrics),
        },
        labels={
            "percent": "weights removed, %",
            "mean": "",
        },
        log_x=True,
    )
    # Markers as plotly has them by default: on lines of fewer than 20 points.
    figure.update_traces(mode=None, line_width=2.5, marker_size=6, error_y=INTERVAL)
    # Without prefixes: 0.0002 % and not 200µ %.
    figure.update_xaxes(matches=None, tickvals=SHARE_TICKS, gridcolor=GRID, exponentformat="none")
    figure.update_yaxes(
        matches=None,
        showticklabels=True,
        gridcolor=GRID,
        zeroline=False,
        rangemode="tozero",
    )
    are_rates = [metric.endswith("_rate") for metric in panels]
    for column, is_rate in enumerate([*are_rates, True], start=1):
        if is_rate:
            figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", col=column)
    figure = _styled(figure, height=380)
    figure.update_layout(legend={"y": -0.3})
    return figure


def location_figure(rows: Rows) -> Picture:
    """Share of each block matrix that a mask takes (%), by layer and kind."""
    table = _table(rows.where("weights_removed", by="matrix"), "layer", "kind", "of")
    table["layer"] = table["layer"].astype(int)
    table["percent"] = 100 * table["mean"] / table["of"].astype(int)
    layers = sorted(table["layer"].unique())
    present = set(table["kind"])
    place = {
        "index": layers,
        "columns": [kind for kind in KINDS if kind in present],
    }
    percent = _grid(table, y="layer", x="kind", values="percent").reindex(**place)
    count = _grid(table, y="layer", x="kind").reindex(**place)
    figure = px.imshow(
        percent,
        y=[f"layer {layer}" for layer in layers],
        labels={
            "x": "",
            "y": "",
            "color": "% of<br>matrix",
        },
        color_continuous_scale=[WHITE, RED],
        range_color=[0, table["percent"].max()],
        aspect="auto",
    )
    figure.update_traces(text=count.map(_whole_number), texttemplate="%{text}")
    # Of many layers lines are lower, so that the figure fits a screen as long as they can be read.
    line_height = max(LEAST_LINE, min(48, SCREEN // max(1, len(layers))))
    return _styled(figure, height=110 + line_height * len(layers))


def component_map(rows: Rows) -> Picture:
    """Where a mask's weights sit, against chance: layers by kinds."""
    of_matrices = rows.where("weights_removed", by="matrix")
    n_removed = sum(row.mean for row in of_matrices)
    if not n_removed:
        raise ValueError("component_map: the mask removes nothing; expected rows of one that does")
    matrices = _table(of_matrices, "layer", "kind", "of")
    matrices["layer"] = matrices["layer"].astype(int)
    evenly = n_removed / matrices["of"].sum()
    matrices["chance"] = matrices["of"] * evenly
    layers = sorted(matrices["layer"].unique())
    present = set(matrices["kind"])
    kinds = [kind for kind in KINDS if kind in present]
    place: dict[str, Any] = {"index": layers, "columns": kinds}
    grids = {}
    for column in MAP_FIGURES:
        grids[column] = _grid(matrices, y="layer", x="kind", values=column).reindex(**place)

    figure = make_subplots(
        1,
        2,
        specs=[[{"type": "xy"}, {"type": "domain"}]],
        subplot_titles=["weights removed", f"the same as areas{CLICK}"],
        horizontal_spacing=0.04,
        column_widths=[0.5, 0.5],
    )
    heatmap = go.Heatmap(
        z=_log_lift(grids["mean"], grids["chance"]),
        x=kinds,
        y=[f"layer {layer}" for layer in layers],
        text=grids["mean"].map(_whole_number),
        texttemplate="%{text}",
        customdata=np.stack([grids[column] for column in MAP_FIGURES], axis=-1),
        hovertemplate="%{y} %{x}<br>" + COUNTS_TEXT,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )
    figure.add_trace(heatmap, row=1, col=1)
    figure.add_trace(_treemap(matrices, rows.where("weights_removed", by="unit")), row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-40)
    figure.update_coloraxes(
        colorscale=[BLUE, WHITE, RED],
        cmin=-LIFT_RANGE,
        cmax=LIFT_RANGE,
        colorbar={
            "thickness": 12,
            "title": "times<br>chance",
            "tickvals": [-4, -2, 0, 2, 4],
            "ticktext": ["1/16", "1/4", "1", "4", "16"],
        },
    )
    figure = _styled(figure, height=max(420, 150 + 26 * len(layers)))
    figure.update_traces(hovertemplate="%{y} %{x}<br>" + COUNTS_TEXT, selector={"type": "heatmap"})
    figure.update_traces(hovertemplate="%{label}<br>" + COUNTS_TEXT, selector={"type": "treemap"})
    figure.update_layout(margin={"l": 70, "b": 90}, plot_bgcolor=NO_DATA)
    return figure


def _treemap(matrices: pandas.DataFrame, units: Rows) -> go.Treemap:
    """Layers, in these matrices, in these heads or neurons; areas are weights removed."""
    table = pandas.concat([_levels(matrices), _unit_nodes(matrices, units)], ignore_index=True)
    table = table[table["mean"] > 0]
    return go.Treemap(
        ids=table["id"],
        labels=table["label"],
        parents=table["parent"],
        values=table["mean"],
        branchvalues="total",
        maxdepth=3,
        marker={
            "colors": _log_lift(table["mean"], table["chance"]),
            "coloraxis": "coloraxis",
        },
        customdata=table[MAP_FIGURES],
        texttemplate="%{label}<br>%{value}",
    )


def _levels(matrices: pandas.DataFrame) -> pandas.DataFrame:
    """The nodes of the whole model, of its layers, and of their matrices."""
    whole = pandas.DataFrame([{name: matrices[name].sum() for name in MAP_FIGURES}])
    layers = matrices.pivot_table(index="layer", values=MAP_FIGURES, aggfunc="sum").reset_index()
    names = "layer " + layers["layer"].astype(str)
    above = "layer " + matrices["layer"].astype(str)
    levels = [
        whole.assign(id="model", label="model", parent=""),
        layers.assign(id=names, label=names, parent="model"),
        matrices.assign(id=above + " " + matrices["kind"], label=matrices["kind"], parent=above),
    ]
    return pandas.concat(levels).filter(["id", "label", "parent", *MAP_FIGURES])


def _unit_nodes(matrices: pandas.DataFrame, units: Rows) -> pandas.DataFrame:
    """The nodes of heads or neurons; those of a matrix that have no row are one node together."""
    of_matrices = matrices.set_index(["layer", "kind"])
    nodes = []
    for (layer, kind), rows in units.by("layer", "kind").items():
        matrix = of_matrices.loc[(layer, kind)]
        evenly = matrix["mean"] / matrix["of"]
        name = f"layer {layer} {kind}"
        unit = rows[0].labels["unit"]
        sizes = {
            f"{unit} {row.labels['index']}": (row.mean, float(row.labels["of"])) for row in rows
        }
        n_removed = matrix["mean"] - sum(removed for removed, _ in sizes.values())
        n_weights = matrix["of"] - sum(of for _, of in sizes.values())
        sizes[f"other {unit}s"] = (n_removed, n_weights)
        for label, (removed, of) in sizes.items():
            figures = {"mean": removed, "of": of, "chance": of * evenly}
            nodes.append({"id": f"{name} {label}", "label": label, "parent": name, **figures})
    return pandas.DataFrame(nodes, columns=["id", "label", "parent", *MAP_FIGURES])


def _log_lift(removed: Any, chance: Any) -> Any:
    """log2 of removed over chance, within what the colours show; none removed is the lowest."""
    with np.errstate(divide="ignore"):
        return np.log2(removed / chance).clip(-LIFT_RANGE, LIFT_RANGE)


def cross_ablation_figure(
    panels: Mapping[str, Rows],
    rates: Mapping[str, str],
) -> Picture:
    """Rates under every removed circuit, in per cent."""
    grids = []
    for rows in panels.values():
        table = _table(rows, "mask")
        table["percent"] = 100 * table["mean"]
        grids.append(_grid(table, y="mask", x="metric", values="percent"))
    masks = _index(grids)
    grids = [grid.reindex(index=masks, columns=list(rates)) for grid in grids]

    figure = px.imshow(
        np.stack(grids),
        x=list(rates.values()),
        y=list(masks),
        facet_col=0,
        labels={"y": "removed circuit"},
        color_continuous_scale=[RED, WHITE],
        range_color=[0, 100],
        aspect="auto",
    )
    # Python's texts: d3, which would write the numbers, rounds 62.5 up, unlike the tables.
    for number, grid in enumerate(grids):
        figure.update_traces(text=grid.map(_whole_number), selector=number)
    figure.update_traces(texttemplate="%{text}", xgap=1, ygap=1)
    # px numbers the panels of an array.
    for number, title in enumerate(panels):
        figure.update_annotations(text=title, selector=number)
        figure.update_traces(name=title, selector=number)
    figure.update_coloraxes(showscale=False)
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(tickangle=-40, showgrid=False)
    figure = _styled(figure, height=150 + 30 * len(masks))
    figure.update_layout(margin={"b": 95, "l": 150}, plot_bgcolor=NO_DATA)
    return figure


def overlap_figure(
    panels: Mapping[str, Rows],
    pairs: Mapping[tuple[str, str], str],
) -> Picture:
    """Lift of pairs of circuits with 95 % intervals; one panel a null, one colour a model."""
    table = _table(_labelled(panels, "panel"), "panel", "model", "first", "second")
    models = list(table["model"].unique())
    places = pandas.DataFrame(list(pairs), columns=["first", "second"])
    places["place"] = range(len(places))
    points = places.merge(table, on=["first", "second"])
    points = points.drop_duplicates(["panel", "model", "place"])
    middle = (len(models) - 1) / 2
    shift = points["model"].map(models.index) - middle
    points["height"] = points["place"] + LINE_SPREAD * shift

    figure = px.scatter(
        points,
        x="mean",
        y="height",
        error_x="above",
        error_x_minus="below",
        color="model",
        color_discrete_sequence=MODEL_COLOURS,
        facet_col="panel",
        facet_col_spacing=0.03,
        category_orders={
            "model": models,
            "panel": list(panels),
        },
        labels={
            "mean": "",
            "height": "",
        },
        log_x=True,
    )
    figure.update_traces(marker_size=8, error_x=INTERVAL)
    figure.add_vline(x=1, line={"dash": "dot", "color": CHANCE_LINE})
    figure.update_yaxes(
        tickvals=list(places["place"]),
        ticktext=list(pairs.values()),
        autorange="reversed",
    )
    figure.update_xaxes(matches=None, gridcolor=GRID, tickvals=LIFT_TICKS)
    figure = _styled(figure, height=150 + 44 * len(pairs))
    figure.update_layout(margin={"l": 230})
    return figure


def token_figure(lines: Mapping[str, Rows]) -> Picture:
    """What each position adds to a mask's score, in nats."""
    table = _table(_labelled(lines, "line"), "line", "offset")
    figure = px.bar(
        table.sort_values("offset"),
        x="offset",
        y="mean",
        error_y="above",
        error_y_minus="below",
        color="line",
        color_discrete_sequence=TEXT_COLOURS,
        category_orders={"line": list(lines)},
        labels={
            "offset": "token, counted from the first answer token",
            "mean": "nats",
        },
        barmode="group",
    )
    figure.update_traces(error_y=INTERVAL)
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(gridcolor=GRID)
    return _styled(figure, height=330)


def comparison_figure(
    lines: Mapping[str, Rows],
    columns: Mapping[str, str],
) -> Picture:
    """Rates of several masks as bars with 95 % intervals."""
    table = _table(_labelled(lines, "line"), "line")
    titles = pandas.DataFrame(list(columns.items()), columns=["metric", "title"])
    rates = titles.merge(table, on="metric")
    figure = px.bar(
        rates.drop_duplicates(["line", "metric"]),
        x="title",
        y="mean",
        error_y="above",
        error_y_minus="below",
        color="line",
        color_discrete_sequence=MASK_COLOURS,
        category_orders={"line": list(lines)},
        labels={
            "title": "",
            "mean": "",
        },
        barmode="group",
        range_y=[0, 1.06],
    )
    figure.update_traces(error_y={**INTERVAL, "color": BAR_INTERVAL})
    figure.update_yaxes(tickformat=".0%", gridcolor=GRID)
    figure.update_layout(bargap=0.22)
    return _styled(figure, height=360)


def heatmaps(
    panels: Mapping[str, Rows],
    *,
    x: str,
    y: str,
    widest: float | None = None,
) -> Picture:
    """One heatmap for each panel, two a line; the mean is in the cell unless it rounds to 0.00."""
    grids = []
    for rows in panels.values():
        table = _table(rows, x, y)
        table = table.astype({x: str, y: str})
        grids.append(_grid(table, y=y, x=x))
    tallest = max(len(grid) for grid in grids)
    gap = 130  # for slanted labels and titles
    n_lines, height = _lines(len(panels), line_height=34 * tallest, gap=gap)

    # By hand: the panels of px.imshow are slices of one array, and these have columns of their own.
    figure = make_subplots(
        n_lines,
        min(2, len(panels)),
        subplot_titles=list(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=gap / height if n_lines > 1 else 0,
    )
    for number, grid in enumerate(grids):
        first = number - number % 2
        # Panels side by side share an axis, so their lines must be the same.
        of_line = grid.reindex(index=_index(grids[first : first + 2]))
        heatmap = go.Heatmap(
            z=of_line,
            x=list(of_line.columns),
            y=list(of_line.index),
            text=of_line.map(_two_places),
            texttemplate="%{text}",
            coloraxis="coloraxis",
        )
        place: dict[str, Any] = {
            "row": number // 2 + 1,
            "col": number % 2 + 1,
        }
        angle = -40 if len(grid.columns) > MANY_COLUMNS else 0
        figure.add_trace(heatmap, **place)
        figure.update_xaxes(tickangle=angle, **place)

    frame: dict[str, Any] = {
        "type": "category",
        "showline": True,
        "mirror": True,
        "linecolor": SILVER,
    }
    figure.update_xaxes(**frame)
    figure.update_yaxes(**frame)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title=y, col=1)
    magnitudes = pandas.concat(grids).abs().fillna(0).to_numpy()
    end = widest or magnitudes.max(initial=0) or 1.0
    figure.update_coloraxes(
        colorscale=[BLUE, WHITE, RED],
        cmin=-end,
        cmax=end,
        colorbar={"thickness": 12},
    )
    figure = _styled(figure, height=height + 150)
    figure.update_layout(margin={"l": 80, "b": 100})
    return figure


def profiles(
    panels: Mapping[str, Mapping[str, Rows]],
    *,
    x: str,
    title: str = "",
) -> Picture:
    """One panel for each title, two a line, with a curve for each name and 95 % intervals."""
    names: dict[str, None] = {}
    for curves in panels.values():
        names |= dict.fromkeys(curves)
    gap = 80  # for labels and titles
    n_lines, height = _lines(len(panels), line_height=170, gap=gap)

    rows_of_panels = {panel: _labelled(curves, "curve") for panel, curves in panels.items()}
    table = _table(_labelled(rows_of_panels, "panel"), "panel", "curve", x)
    figure = px.line(
        table.astype({x: str}),
        x=x,
        y="mean",
        error_y="above",
        error_y_minus="below",
        color="curve",
        color_discrete_sequence=CURVE_COLOURS,
        facet_col="panel",
        facet_col_wrap=2,
        facet_col_spacing=0.04,
        facet_row_spacing=gap / height,
        category_orders={
            "curve": list(names),
            "panel": list(panels),
        },
        labels={
            x: "",
            "mean": title,
        },
    )
    # Markers as plotly has them by default: on lines of fewer than 20 points.
    figure.update_traces(mode=None, line_width=2, error_y=INTERVAL)
    figure.update_xaxes(type="category", matches=None, showticklabels=True, gridcolor=GRID)
    figure.update_yaxes(matches=None, gridcolor=GRID, zerolinecolor=SILVER)
    # px lets all panels share the vertical axis.
    for line in range(1, n_lines + 1):
        left = next(figure.select_yaxes(row=line, col=1))
        name = left.plotly_name.replace("axis", "")
        figure.update_yaxes(matches=name, row=line, col=2)
    figure = _styled(figure, height=height + 130)
    figure.update_layout(legend={"y": -45 / height}, margin={"b": 80})
    return figure


def _lines(
    n_panels: int,
    *,
    line_height: int,
    gap: int,
) -> tuple[int, int]:
    """How many lines panels take, two a line, and the height of all of them; in pixels."""
    n_lines = ceil(n_panels / 2)
    height = n_lines * line_height + (n_lines - 1) * gap
    return n_lines, height


def _labelled(groups: Mapping[Any, Rows], name: str) -> Rows:
    """All rows together, each with what it stood under as a label of this name."""
    together = []
    for group, rows in groups.items():
        for row in rows:
            labels = {**row.labels, name: group}
            together.append(replace(row, labels=labels))
    return Rows(together)


def _table(rows: Rows, *labels: str) -> pandas.DataFrame:
    """A line a row: these labels, the metric, the mean, and how far its interval reaches."""
    columns = [*labels, "metric", "mean", "low", "high"]
    table = pandas.DataFrame(columns=columns)
    if len(rows):  # a frame of no rows has no columns, and px asks for them
        table = rows.frame().filter(columns)
    above = table["high"] - table["mean"]
    below = table["mean"] - table["low"]
    return table.assign(above=above, below=below)


def _grid(
    table: pandas.DataFrame,
    *,
    y: str,
    x: str,
    values: str = "mean",
) -> pandas.DataFrame:
    """The values by line and column, which stand as they come; NaN where there is none."""
    grid = table.pivot_table(
        index=y,
        columns=x,
        values=values,
        aggfunc="last",
    )
    return grid.reindex(
        index=table[y].unique(),
        columns=table[x].unique(),
    )


def _index(grids: Sequence[pandas.DataFrame]) -> pandas.Index:
    """The lines of all grids, as they come."""
    return pandas.concat(grids).index.unique()


def _whole_number(value: float) -> str:
    return "" if isnan(value) else f"{value:.0f}"


def _two_places(value: float) -> str:
    if isnan(value) or abs(value) < 0.005:
        return ""
    return f"{value:.2f}"


def _styled(figure: go.Figure, *, height: int) -> Picture:
    # px writes "panel=title" above a panel, "line" above a legend, and column names on hovering.
    for annotation in figure.select_annotations():
        title = annotation.text.removeprefix("panel=")
        annotation.update(text=title, font_size=TITLE_SIZE)
    figure.update_traces(hovertemplate=None)
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 50, "b": 55},
        font=FONT,
        plot_bgcolor="white",
        paper_bgcolor="white",
        legend={"orientation": "h", "y": -0.22},
        legend_title="",
    )
    return Picture(figure)
