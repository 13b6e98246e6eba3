"""Plotly figures drawn from rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from harmcircuits.circuits.sites import KINDS
from harmcircuits.measurements import Measurement, Rows

RED, BLUE, GREY, AMBER, GREEN = "#b3261e", "#1f5fa8", "#8a8f98", "#c77700", "#2e7d5b"
PALETTE = (RED, AMBER, GREY, BLUE, GREEN, "#5c6470", "#8fa9c4", "#8e5aa8", "#b08d57")
FONT = {"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 13, "color": "#20242a"}


def share_figure(
    lines: Mapping[str, Mapping[float, Rows]], panels: Mapping[str, str], *, kept: Sequence[str]
) -> go.Figure:
    """Figures (panels: metric -> title) and the worst kept ability against the share of weights removed, in per cent.

    `lines`: name -> share -> rows measured there, one for each metric. A point is left out of the panels that it lacks.
    The first two lines are solid, the others dotted. Bars are 95 % intervals.
    """
    panels = {**panels, "": "worst kept ability"}
    figure = make_subplots(1, len(panels), subplot_titles=list(panels.values()), horizontal_spacing=0.06)
    for number, (name, points) in enumerate(lines.items()):
        for column, metric in enumerate(panels, start=1):
            of_point = {
                share: [r for m in ([metric] if metric else kept) for r in rows.where(m)]
                for share, rows in points.items()
            }
            shown = {share: min(found, key=_mean) for share, found in of_point.items() if found}
            figure.add_scatter(
                x=[100 * share for share in shown], y=[row.mean for row in shown.values()],
                error_y=_interval(list(shown.values())), name=name, legendgroup=name, showlegend=column == 1,
                line={"color": PALETTE[number % len(PALETTE)], "dash": "solid" if number < 2 else "dot", "width": 2.5},
                marker={"size": 6}, row=1, col=column,
            )  # fmt: skip
    ticks = [0.0001, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    figure.update_xaxes(title="weights removed, %", type="log", tickvals=ticks, gridcolor="#eceef1")
    figure.update_yaxes(gridcolor="#eceef1", zeroline=False, rangemode="tozero")
    for column, metric in enumerate(panels, start=1):
        if not metric or metric.endswith("_rate"):
            figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", col=column)
    return _styled(figure, height=360)


def location_figure(rows: Rows) -> go.Figure:
    """Share of each block matrix that a mask takes (%), by layer and kind; in the cell, how many weights.

    `rows`: those of one mask (see `location_rows`); others are left out.
    """
    cells = rows.where("weights_removed", by="matrix")
    layers = sorted({int(row.labels["layer"]) for row in cells})
    kinds = [kind for kind in KINDS if any(row.labels["kind"] == kind for row in cells)]
    found = {(row.labels["layer"], row.labels["kind"]): row for row in cells}
    share = [[100 * found[layer, kind].mean / int(found[layer, kind].labels["of"]) for kind in kinds] for layer in layers]
    count = [[f"{found[layer, kind].mean:.0f}" for kind in kinds] for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            z=share, x=kinds, y=[f"layer {layer}" for layer in layers], text=count, texttemplate="%{text}",
            colorscale=[[0, "#ffffff"], [1, RED]], zmin=0, colorbar={"title": "% of<br>matrix"},
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, height=110 + 48 * len(layers))


def cross_ablation_figure(panels: Mapping[str, Rows], rates: Mapping[str, str]) -> go.Figure:
    """Rates (metric -> title, the columns) under every removed circuit (the label `mask`), one panel for each set of rows.

    White: the ability is whole; red: it is gone. The cell says the rate in per cent.
    """
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.02)
    masks = list(dict.fromkeys(str(row.labels["mask"]) for rows in panels.values() for row in rows))
    for column, rows in enumerate(panels.values(), start=1):
        found = {(row.labels["mask"], row.metric): 100 * row.mean for row in rows if row.metric in rates}
        z = [[found.get((mask, metric)) for metric in rates] for mask in masks]
        text = [["" if value is None else f"{value:.0f}" for value in line] for line in z]
        heatmap = go.Heatmap(
            z=z, x=list(rates.values()), y=masks, text=text, texttemplate="%{text}", colorscale=[[0, RED], [1, "#ffffff"]],
            zmin=0, zmax=100, showscale=False, xgap=1, ygap=1,
        )  # fmt: skip
        figure.add_trace(heatmap, row=1, col=column)
    figure.update_yaxes(autorange="reversed", title="removed circuit", col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(tickangle=-40, showgrid=False)
    return _styled(figure, height=150 + 30 * len(masks)).update_layout(margin={"b": 95, "l": 150}, plot_bgcolor="#dfe2e6")


def overlap_figure(panels: Mapping[str, Rows], pairs: Mapping[tuple[str, str], str]) -> go.Figure:
    """Lift of pairs of circuits ((first, second) -> title) with 95 % intervals; one panel a null, one colour a model.

    `panels`: title -> rows of one metric. The dotted line is chance.
    """
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.03)
    models = list(dict.fromkeys(str(row.labels["model"]) for rows in panels.values() for row in rows))
    for column, rows in enumerate(panels.values(), start=1):
        for number, (model, colour) in enumerate(zip(models, (GREY, AMBER, RED, BLUE, GREEN), strict=False)):
            found = [(i, rows.where(model=model, first=a, second=b)) for i, (a, b) in enumerate(pairs)]
            points = [(i, one[0]) for i, one in found if one]
            bars = [row for _, row in points]
            shift = 0.16 * (number - (len(models) - 1) / 2)
            figure.add_scatter(
                x=[row.mean for row in bars], y=[i + shift for i, _ in points], error_x=_interval(bars), mode="markers",
                name=model, legendgroup=model, showlegend=column == 1, marker={"color": colour, "size": 8},
                row=1, col=column,
            )  # fmt: skip
    figure.add_vline(x=1, line={"dash": "dot", "color": "#555"})
    figure.update_yaxes(tickvals=list(range(len(pairs))), ticktext=list(pairs.values()), autorange="reversed")
    figure.update_xaxes(type="log", gridcolor="#eceef1", tickvals=[0.5, 1, 2, 3, 5, 10, 20, 50])
    return _styled(figure, height=150 + 44 * len(pairs)).update_layout(margin={"l": 230})


def token_figure(lines: Mapping[str, Rows]) -> go.Figure:
    """What each position adds to a mask's score (nats), by its distance from the first answer token, for several texts."""
    figure = go.Figure()
    for (name, rows), colour in zip(lines.items(), (RED, BLUE, GREEN, AMBER), strict=False):
        rows = sorted(rows, key=lambda row: row.labels["offset"])
        offsets = [row.labels["offset"] for row in rows]
        figure.add_bar(x=offsets, y=[row.mean for row in rows], error_y=_interval(rows), name=name, marker_color=colour)
    figure.update_xaxes(title="token, counted from the first answer token", dtick=1)
    figure.update_yaxes(title="nats", gridcolor="#eceef1")
    return _styled(figure, height=330)


def comparison_figure(lines: Mapping[str, Rows], columns: Mapping[str, str]) -> go.Figure:
    """Rates (columns: metric -> title) of several masks (lines: name -> rows) as bars with 95 % intervals."""
    figure = go.Figure()
    palette = ["#5c6470", RED, AMBER, "#c3c8cf", "#8fa9c4", GREEN, BLUE, GREY]
    for colour, (name, found) in zip(palette, lines.items(), strict=False):
        picked = [(title, found.where(metric)[0]) for metric, title in columns.items() if found.where(metric)]
        bars = [row for _, row in picked]
        figure.add_bar(
            x=[title for title, _ in picked],
            y=[row.mean for row in bars],
            name=name,
            marker_color=colour,
            error_y={**_interval(bars), "color": "#444"},
        )
    figure.update_yaxes(range=[0, 1.06], tickformat=".0%", gridcolor="#eceef1")
    figure.update_layout(barmode="group", bargap=0.22)
    return _styled(figure, height=360)


def heatmaps(panels: Mapping[str, Rows], *, x: str, y: str, widest: float | None = None) -> go.Figure:
    """One heatmap for each panel (title -> rows), two a line: label `y` downwards, label `x` across, the mean in the cell
    unless it rounds to 0.00.

    Columns and lines stand in the order of the rows. All panels share a colour scale from -`widest` to `widest`, the
    largest magnitude by default.
    """
    n_lines, gap = -(-len(panels) // 2), 130  # pixels between lines, for slanted labels and titles
    bodies = {title: {(str(row.labels[y]), str(row.labels[x])): row.mean for row in rows} for title, rows in panels.items()}
    tallest = max(len({line for line, _ in body}) for body in bodies.values())
    plot_height = n_lines * 34 * tallest + (n_lines - 1) * gap
    figure = make_subplots(
        n_lines, min(2, len(panels)), subplot_titles=list(panels), shared_yaxes=True,
        horizontal_spacing=0.03, vertical_spacing=gap / plot_height if n_lines > 1 else 0,
    )  # fmt: skip
    for number, body in enumerate(bodies.values()):
        beside = list(bodies.values())[number - number % 2 :][:2]  # they share an axis, so their lines must be the same
        down = list(dict.fromkeys(line for other in beside for line, _ in other))
        across = list(dict.fromkeys(column for _, column in body))
        z = [[body.get((line, column)) for column in across] for line in down]
        text = [["" if value is None or abs(value) < 0.005 else f"{value:.2f}" for value in line] for line in z]
        row, col = number // 2 + 1, number % 2 + 1
        heatmap = go.Heatmap(z=z, x=across, y=down, text=text, texttemplate="%{text}", coloraxis="coloraxis")
        figure.add_trace(heatmap, row=row, col=col)
        figure.update_xaxes(type="category", tickangle=-40 if len(across) > 6 else 0, row=row, col=col)
        figure.update_yaxes(type="category", autorange="reversed", title=y if col == 1 else None, row=row, col=col)
    figure.update_xaxes(showline=True, mirror=True, linecolor="#c3c8cf")
    figure.update_yaxes(showline=True, mirror=True, linecolor="#c3c8cf")
    top = widest or max((abs(value) for body in bodies.values() for value in body.values()), default=0.0) or 1.0
    scale = [[0, BLUE], [0.5, "#ffffff"], [1, RED]]
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": -top, "cmax": top, "colorbar": {"thickness": 12}})
    styled = _styled(figure, height=plot_height + 150)
    return styled.update_layout(margin={"l": 80, "b": 100})


def profiles(panels: Mapping[str, Mapping[str, Rows]], *, x: str, title: str = "") -> go.Figure:
    """One panel for each title, two a line: a curve for each name over label `x`, in the order of its rows.

    `title` names the vertical axis, which the panels of a line share. Bars are 95 % intervals.
    """
    n_lines, gap = -(-len(panels) // 2), 80  # pixels between lines, for labels and titles
    plot_height = n_lines * 170 + (n_lines - 1) * gap
    figure = make_subplots(
        n_lines, min(2, len(panels)), subplot_titles=list(panels), shared_yaxes=True,
        horizontal_spacing=0.04, vertical_spacing=gap / plot_height if n_lines > 1 else 0,
    )  # fmt: skip
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    palette = dict(zip(names, [GREY, RED, BLUE, AMBER, GREEN, "#5c6470"], strict=False))
    for number, curves in enumerate(panels.values()):
        for name, rows in curves.items():
            figure.add_scatter(
                x=[str(row.labels[x]) for row in rows],
                y=[row.mean for row in rows],
                error_y=_interval(rows),
                name=name,
                legendgroup=name,
                showlegend=number == 0,
                line={"color": palette[name], "width": 2},
                row=number // 2 + 1,
                col=number % 2 + 1,
            )
    figure.update_xaxes(type="category", gridcolor="#eceef1")
    figure.update_yaxes(gridcolor="#eceef1", zerolinecolor="#c3c8cf", title=title, col=1)
    figure.update_yaxes(gridcolor="#eceef1", zerolinecolor="#c3c8cf", col=2)
    return _styled(figure, height=plot_height + 130).update_layout(legend={"y": -45 / plot_height}, margin={"b": 80})


def _interval(rows: Rows) -> dict[str, Any]:
    upper, lower = [row.high - row.mean for row in rows], [row.mean - row.low for row in rows]
    return {"array": upper, "arrayminus": lower, "thickness": 1, "width": 2}


def _mean(row: Measurement) -> float:
    return row.mean


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


