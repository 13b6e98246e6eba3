"""Plotly figures as stills: the lines, bars, heatmaps and treemaps that `figures` draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harmcircuits.views.stills import CLICK, LEAST_TEXT, PIXELS, ink, text_size
from harmcircuits.views.treemap_still import draw_treemap

WIDTH = 1100  # pixels, where a figure names none
HEIGHT = 450
MARGIN = 60
DASHES: dict[str, Any] = {"solid": "-", "dot": ":", "dash": "--"}
MARKED = 20  # plotly marks the points of a line that has fewer

Place = tuple[float, float, float, float]  # left, bottom, width and height, as shares of a figure


@dataclass(frozen=True)
class Scale:
    """An axis of a figure: where the values of its traces stand."""

    axis: Any
    places: Mapping[str, int]

    @classmethod
    def of(cls, axis: Any, values: Sequence[Any]) -> "Scale":
        """The scale of an axis on which these values stand."""
        are_numbers = all(isinstance(value, int | float | np.number) for value in values)
        if are_numbers and axis.type != "category":
            return cls(axis, {})
        names = dict.fromkeys(str(value) for value in [*(axis.categoryarray or ()), *values])
        return cls(axis, {name: place for place, name in enumerate(names)})

    def placed(self, values: Any, n: int) -> np.ndarray:
        """Values as places; 0, 1, 2, ... where a figure gives none."""
        if values is None or not len(values):
            return np.arange(n, dtype=float)
        if self.places:
            return np.array([self.places[str(value)] for value in values], dtype=float)
        return np.asarray(values, dtype=float)


def plotly_still(figure: go.Figure) -> Figure:
    """The figure as matplotlib draws it."""
    layout = figure.layout
    size = ((layout.width or WIDTH) / PIXELS, (layout.height or HEIGHT) / PIXELS)
    still = Figure(figsize=size)
    panels: dict[str, Axes] = {}
    for (x_name, y_name), traces in _by_axes(figure).items():
        scales = _scales(figure, x_name, y_name)
        axes = still.add_axes(_place(layout, *(scale.axis.domain for scale in scales)))
        panels[y_name] = axes
        _draw(axes, traces, scales, layout)
        _finish(axes, scales)
    for trace in _traces(figure):
        if trace.type != "treemap":
            continue
        axes = still.add_axes(_place(layout, trace.domain.x, trace.domain.y))
        values = np.array(trace.marker.colors, dtype=float)
        colours, norm = _colours(layout, values)
        draw_treemap(axes, trace, colours(norm(values)))

    _share_ranges(panels, layout)
    _write_titles(still, layout)
    _add_colour_bar(still, layout)
    _add_legend(still, figure)
    return still


def _traces(figure: go.Figure) -> list[Any]:
    """The traces, whose classes plotly does not tell."""
    return list(figure.data)


def _by_axes(figure: go.Figure) -> dict[tuple[str, str], list[Any]]:
    """Names of a panel's axes -> its traces."""
    panels: dict[tuple[str, str], list[Any]] = {}
    for trace in _traces(figure):
        if trace.type != "treemap":
            panels.setdefault((trace.xaxis or "x", trace.yaxis or "y"), []).append(trace)
    return panels


def _axis(layout: Any, name: str) -> Any:
    """x2 -> layout.xaxis2."""
    return layout[f"{name[0]}axis{name[1:]}"]


def _scales(figure: go.Figure, x_name: str, y_name: str) -> tuple[Scale, Scale]:
    """Of the axes of a panel, with the values of every trace on them."""
    scales = []
    for name in (x_name, y_name):
        values: list[Any] = []
        for trace in _traces(figure):
            on_it = trace.type != "treemap" and (trace[f"{name[0]}axis"] or name[0]) == name
            of_trace = trace[name[0]] if on_it else None
            values += [] if of_trace is None else list(of_trace)
        scales.append(Scale.of(_axis(figure.layout, name), values))
    return scales[0], scales[1]


def _place(layout: Any, x: Sequence[float] | None, y: Sequence[float] | None) -> Place:
    """Left, bottom, width and height of a part of the figure, as shares of it."""
    edges = {
        side: MARGIN if layout.margin[side] is None else layout.margin[side] for side in "lrtb"
    }
    width, height = layout.width or WIDTH, layout.height or HEIGHT
    (left, right), (bottom, top) = x or (0, 1), y or (0, 1)
    across = (width - edges["l"] - edges["r"]) / width
    along = (height - edges["t"] - edges["b"]) / height
    return (
        edges["l"] / width + across * left,
        edges["b"] / height + along * bottom,
        across * (right - left),
        along * (top - bottom),
    )


def _draw(axes: Axes, traces: Sequence[Any], scales: tuple[Scale, Scale], layout: Any) -> None:
    axes.set_facecolor(layout.plot_bgcolor or "white")
    bars = [trace for trace in traces if trace.type == "bar"]
    for trace in traces:
        if trace.type == "bar":
            _draw_bars(axes, trace, scales, (bars.index(trace), len(bars)), layout.bargap or 0.2)
        elif trace.type == "heatmap":
            _draw_heatmap(axes, trace, scales, layout)
        else:
            _draw_line(axes, trace, scales)
    for shape in layout.shapes:
        if shape.xref == scales[0].axis.plotly_name.replace("axis", ""):
            style = DASHES[shape.line.dash or "solid"]
            axes.axvline(shape.x0, color=shape.line.color, linestyle=style, linewidth=1.5)


def _reach(error: Any) -> np.ndarray | None:
    """How far an interval reaches below and above each point."""
    if error.array is None:
        return None
    reach = np.array([error.arrayminus, error.array], dtype=float)
    return np.nan_to_num(reach).clip(min=0)


def _draw_line(axes: Axes, trace: Any, scales: tuple[Scale, Scale]) -> None:
    """Points with their intervals, joined or not."""
    n = len(trace.x)
    mode = trace.mode or ("lines+markers" if n < MARKED else "lines")
    colour = trace.line.color or trace.marker.color
    axes.errorbar(
        scales[0].placed(trace.x, n),
        scales[1].placed(trace.y, n),
        xerr=_reach(trace.error_x),
        yerr=_reach(trace.error_y),
        color=colour,
        elinewidth=1,
        capsize=2,
        linewidth=0.75 * (trace.line.width or 2),
        linestyle=DASHES[trace.line.dash or "solid"] if "lines" in mode else "none",
        marker="o" if "markers" in mode else "none",
        markersize=0.75 * (trace.marker.size or 6),
    )


def _draw_bars(
    axes: Axes,
    trace: Any,
    scales: tuple[Scale, Scale],
    order: tuple[int, int],
    gap: float,
) -> None:
    """Bars beside those of the other traces; `order` is (which, of how many)."""
    number, of = order
    width = (1 - gap) / of
    middle = scales[0].placed(trace.x, len(trace.y)) + width * (number - (of - 1) / 2)
    axes.bar(
        middle,
        np.asarray(trace.y, dtype=float),
        width=0.97 * width,
        color=trace.marker.color,
        yerr=_reach(trace.error_y),
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": trace.error_y.color or "#444"},
        zorder=2,
    )


def _draw_heatmap(axes: Axes, trace: Any, scales: tuple[Scale, Scale], layout: Any) -> None:
    """Cells, with what is written in them."""
    values = np.array(trace.z, dtype=float)
    n_lines, n_columns = values.shape
    x = scales[0].placed(trace.x, n_columns)
    y = scales[1].placed(trace.y, n_lines)
    colours, norm = _colours(layout, values)
    edge = {"edgecolors": layout.plot_bgcolor, "linewidth": 0.75} if trace.xgap else {}
    axes.pcolormesh(_edges(x), _edges(y), values, cmap=colours, norm=norm, **edge)

    texts = np.full(values.shape, "") if trace.text is None else np.array(trace.text)
    box = axes.get_window_extent()
    inch = axes.figure.dpi
    cell = (box.width / inch / n_columns, box.height / inch / n_lines)
    size = text_size(cell, max(texts.flat, key=len, default=""))
    if size < LEAST_TEXT:
        return
    for (line, column), text in np.ndenumerate(texts):
        if text:
            colour = ink(colours(norm(values[line, column])))
            axes.text(
                float(x[column]),
                float(y[line]),
                str(text),
                ha="center",
                va="center",
                color=colour,
                size=size,
            )


def _edges(middles: np.ndarray) -> np.ndarray:
    """The ends of cells that are a step wide."""
    return np.append(middles - 0.5, middles[-1] + 0.5)


def _colours(layout: Any, values: np.ndarray) -> tuple[LinearSegmentedColormap, Normalize]:
    """The scale that heatmaps and treemaps share, over the values where it has no ends."""
    axis = layout.coloraxis
    stops = [(float(place), colour) for place, colour in axis.colorscale]
    colours = LinearSegmentedColormap.from_list("figure", stops)
    ends = []
    for end, of_values in ((axis.cmin, np.nanmin), (axis.cmax, np.nanmax)):
        ends.append(of_values(values) if end is None else end)
    return colours, Normalize(*ends, clip=True)


def _finish(axes: Axes, scales: tuple[Scale, Scale]) -> None:
    """Ticks, ranges, titles, grids and lines of both axes."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    for scale, name in zip(scales, "xy", strict=True):
        axis = scale.axis
        if axis.type == "log":
            getattr(axes, f"set_{name}scale")("log")
            axes.minorticks_off()
        _set_range(axes, name, scale)
        _set_ticks(axes, name, scale)
        getattr(axes, f"set_{name}label")(_plain(axis.title.text or ""))
        if axis.gridcolor and axis.showgrid is not False:
            getattr(axes, f"{name}axis").grid(visible=True, color=axis.gridcolor)
        if axis.showline:
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color(axis.linecolor)
    if scales[1].axis.zerolinecolor:
        axes.axhline(0, color=scales[1].axis.zerolinecolor, linewidth=1, zorder=1)


def _set_range(axes: Axes, name: str, scale: Scale) -> None:
    axis = scale.axis
    set_range = getattr(axes, f"set_{name}lim")
    if scale.places:
        set_range(-0.5, len(scale.places) - 0.5)
    if axis.range:
        set_range(*(10.0**end if axis.type == "log" else end for end in axis.range))
    elif axis.rangemode == "tozero":
        low, high = getattr(axes, f"get_{name}lim")()
        set_range(min(low, 0), max(high, 0))
    if axis.autorange == "reversed":
        getattr(axes, f"invert_{name}axis")()


def _set_ticks(axes: Axes, name: str, scale: Scale) -> None:
    axis = scale.axis
    of_axes = getattr(axes, f"{name}axis")
    ends = getattr(axes, f"get_{name}lim")()
    ticks = _ticks(scale, *sorted(ends))
    if ticks is not None:
        of_axes.set_ticks(list(ticks), labels=list(ticks.values()))
        getattr(axes, f"set_{name}lim")(*ends)  # ticks may widen it
    elif axis.tickformat:
        of_axes.set_major_formatter(lambda value, _: format(value, axis.tickformat))
    if axis.showticklabels is False:
        of_axes.set_tick_params(labelleft=False, labelbottom=False)
    if axis.tickangle:
        for label in of_axes.get_ticklabels():
            label.set(rotation=-axis.tickangle, ha="right", rotation_mode="anchor")


def _ticks(scale: Scale, low: float, high: float) -> dict[float, str] | None:
    """Place -> text of each tick; None where they are matplotlib's to choose."""
    axis = scale.axis
    if scale.places:
        return {place: name for name, place in scale.places.items()}
    if axis.tickvals is not None:
        texts = axis.ticktext or [f"{value:g}" for value in axis.tickvals]
        named = zip(axis.tickvals, texts, strict=True)
        return {value: _plain(text) for value, text in named if low <= value <= high}
    if axis.dtick == 1:
        return {value: f"{value:.0f}" for value in np.arange(np.ceil(low), np.floor(high) + 1)}
    return None


def _share_ranges(panels: Mapping[str, Axes], layout: Any) -> None:
    """Vertical axes that match have one range, that of all of them."""
    groups: dict[str, list[Axes]] = {}
    for name, axes in panels.items():
        first = _axis(layout, name).matches or name
        groups.setdefault(first, []).append(axes)
    for group in groups.values():
        ends = np.array([axes.get_ylim() for axes in group])
        is_reversed = ends[0, 0] > ends[0, 1]
        low, high = ends.min(), ends.max()
        for axes in group:
            axes.set_ylim((high, low) if is_reversed else (low, high))


def _write_titles(still: Figure, layout: Any) -> None:
    """The titles of panels, which plotly keeps as notes at their place."""
    for note in layout.annotations:
        left, bottom, width, height = _place(layout, None, None)
        still.text(
            left + width * note.x,
            bottom + height * note.y + 0.06 / still.get_figheight(),
            _plain(note.text.removesuffix(CLICK)),
            ha=note.xanchor or "center",
            va="bottom",
            size="large",
        )


def _add_colour_bar(still: Figure, layout: Any) -> None:
    axis = layout.coloraxis
    if axis.colorscale is None or axis.showscale is False:
        return
    left, bottom, width, height = _place(layout, None, None)
    inch = 1 / still.get_figwidth()
    axes = still.add_axes((left + width + 0.15 * inch, bottom, 0.13 * inch, height))
    colours, norm = _colours(layout, np.array([0.0, 1.0]))
    bar = still.colorbar(ScalarMappable(norm, colours), cax=axes)
    bar.outline.set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(_plain(axis.colorbar.title.text or ""), size="medium", loc="left")
    if axis.colorbar.tickvals is not None:
        bar.set_ticks(list(axis.colorbar.tickvals), labels=list(axis.colorbar.ticktext))


def _add_legend(still: Figure, figure: go.Figure) -> None:
    """The names of lines and bars, each once, below everything else."""
    entries = {}
    for trace in _traces(figure):
        if trace.type in ("scatter", "scattergl", "bar") and trace.name:
            entries.setdefault(trace.name, trace)
    if len(entries) < 2:
        return
    handles = [_sample(trace) for trace in entries.values()]
    canvas_bottom = still.get_tightbbox().y0 / still.get_figheight()
    longest = max(len(name) for name in entries)
    columns = int(max(1, min(len(entries), 14 * still.get_figwidth() // (longest + 6))))
    still.legend(
        handles,
        list(entries),
        loc="upper center",
        bbox_to_anchor=(0.5, canvas_bottom),
        ncols=columns,
        frameon=False,
    )


def _sample(trace: Any) -> Any:
    """What stands beside a name in the legend."""
    if trace.type == "bar":
        return Patch(color=trace.marker.color)
    colour = trace.line.color or trace.marker.color
    is_joined = trace.mode != "markers"
    style = DASHES[trace.line.dash or "solid"] if is_joined else "none"
    marker = "none" if trace.mode == "lines" else "o"
    return Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=4)


def _plain(text: str) -> str:
    return text.replace("<br>", "\n")
