"""circuitsvis elements as stills: tokens with a value, attention, neurons, tokens gained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harmcircuits.views.figures import BLUE, RED, SILVER
from harmcircuits.views.stills import BLACK, FAINT, ink

LETTER = 0.085  # inches, of a letter of the font of tokens
FONT: dict[str, Any] = {"family": "monospace", "size": 10}
SMALL: dict[str, Any] = {"size": 7, "color": FAINT}
AXIS: dict[str, Any] = {"family": "monospace", "size": 8}
VALUE_WIDTH = 0.42  # inches, of what stands below a token
LINE = 0.46  # inches: a line of tokens and, below it, of values
TEXT_WIDTH = 10.0  # inches, of a line of tokens
MARGIN = 0.15
LEAST_VALUE = 0.005  # what rounds to 0.00 is not written
CELL = 0.24  # inches, of a line of a table
SIDE = 0.2  # inches, of a token on an axis of attention
MOST_POSITIONS = 5  # of tokens gained


@dataclass(frozen=True)
class Drawing:
    """A still and its size."""

    size: tuple[float, float]
    draw: Callable[[Axes], None]


def element_still(element: str, props: Mapping[str, Any]) -> Figure:
    """An element as matplotlib draws it."""
    drawing = DRAWINGS[element](props)
    still = Figure(figsize=drawing.size)
    drawing.draw(_axes(still, drawing.size, (0, 0)))
    return still


def panels_still(
    panels: Sequence[tuple[str, str, Mapping[str, Any]]],
    columns: int,
) -> Figure:
    """Elements side by side, each under its title."""
    drawings = [DRAWINGS[element](props) for _, element, props in panels]
    width = max(drawing.size[0] for drawing in drawings)
    height = max(drawing.size[1] for drawing in drawings) + LINE
    n_lines = -(-len(panels) // columns)
    still = Figure(figsize=(columns * width, n_lines * height))
    for number, (title, _, _) in enumerate(panels):
        line, column = divmod(number, columns)
        drawing = drawings[number]
        axes = _axes(still, drawing.size, (column * width, line * height + LINE))
        axes.text(MARGIN, -0.1, title, weight="bold")
        drawing.draw(axes)
    return still


def _axes(still: Figure, size: tuple[float, float], corner: tuple[float, float]) -> Axes:
    """Axes that count inches to the right and down."""
    whole_width, whole_height = still.get_size_inches()
    (width, height), (left, top) = size, corner
    bottom = whole_height - top - height
    place = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    axes = still.add_axes(place, xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def _tokens(props: Mapping[str, Any]) -> Drawing:
    """A text, each token in its colour and with its value below it."""
    tokens, values = _texts(props["tokens"]), _array(props["values"])
    colours = _between(props.get("negativeColor", RED), props.get("positiveColor", BLUE))
    largest = np.nanmax(np.abs(values), initial=1e-6)
    norm = Normalize(props.get("minValue", -largest), props.get("maxValue", largest), clip=True)
    lines = _lines(tokens, values)

    def draw(axes: Axes) -> None:
        _draw_lines(axes, lines, colours, norm, top=MARGIN)

    return Drawing((TEXT_WIDTH + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN), draw)


def _attention(props: Mapping[str, Any]) -> Drawing:
    """From each token, a line, to those before it, columns."""
    tokens = _texts(props["tokens"])
    pattern = _array(props["attention"])
    hidden = np.triu(np.ones(pattern.shape, dtype=bool), k=1)
    colours = _between("white", props.get("positiveColor", BLUE), middle="")
    norm = Normalize(props.get("minValue", 0.0), props.get("maxValue", 1.0))
    names = max(map(_width, tokens))
    side = SIDE * len(tokens)

    def draw(axes: Axes) -> None:
        left, top = names + MARGIN, MARGIN
        right, bottom = left + side, top + side
        edges = np.arange(len(tokens) + 1) * SIDE
        cells = np.ma.array(pattern, mask=hidden)
        axes.pcolormesh(left + edges, top + edges, cells, cmap=colours, norm=norm)
        axes.plot([left, left, right], [top, bottom, bottom], color=SILVER, linewidth=0.8)
        for number, token in enumerate(tokens):
            middle = (number + 0.5) * SIDE
            axes.text(left - 0.05, top + middle, token, ha="right", va="center", **AXIS)
            below = {"ha": "center", "va": "top", "rotation": 90}
            axes.text(left + middle, bottom + 0.05, token, **below, **AXIS)
        corner = (left + 0.72 * side, top + 0.06, 0.24 * side, 0.09)
        _scale_bar(axes.inset_axes(corner, transform=axes.transData), colours, norm)

    return Drawing((names + side + 2 * MARGIN, names + side + 2 * MARGIN), draw)


def _neurons(props: Mapping[str, Any]) -> Drawing:
    """Every neuron's activations over each text."""
    colours, norm = _between(RED, BLUE), Normalize(-1, 1)
    texts = [_texts(tokens) for tokens in props["tokens"]]
    first = max(_width(tokens[0]) for tokens in texts)  # says which text it is
    blocks = []
    for number, name in enumerate(props["firstDimensionLabels"]):
        lines = []
        for tokens, activations in zip(texts, props["activations"], strict=True):
            values = np.array([of_token[number][0] for of_token in activations])
            lines += _lines(tokens, values, first=first)
        blocks.append((name, lines))
    height = sum(LINE * (len(lines) + 0.6) for _, lines in blocks)

    def draw(axes: Axes) -> None:
        top = MARGIN
        for name, lines in blocks:
            axes.text(MARGIN, top + 0.1, name, va="center", weight="bold")
            top = _draw_lines(axes, lines, colours, norm, top=top + 0.6 * LINE)

    return Drawing((TEXT_WIDTH + 2 * MARGIN, height + 2 * MARGIN), draw)


def _gained(props: Mapping[str, Any]) -> Drawing:
    """The positions at which most changes side by side, each with its tokens."""
    columns = _gained_columns(props)
    widths = []
    for column in columns:
        widths.append(max(_width(text) for text, _ in column) + 0.25)

    def draw(axes: Axes) -> None:
        left = MARGIN
        for column, width in zip(columns, widths, strict=True):
            for line, (text, colour) in enumerate(column):
                weight = "normal" if line else "bold"
                middle = MARGIN + (line + 0.5) * CELL
                axes.text(left, middle, text, va="center", color=colour, weight=weight, **FONT)
            left += width

    return Drawing((sum(widths) + 2 * MARGIN, len(columns[0]) * CELL + 2 * MARGIN), draw)


def _gained_columns(props: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """Texts and their colours for each position: its name, what it gains and what it loses."""
    cells = _texts(props["tokens"][0])
    (gained,), (lost,) = props["topkIdxs"], props["bottomkIdxs"]
    columns = []
    for position, name in enumerate(props["firstDimensionLabels"][:MOST_POSITIONS]):
        column = [(name, BLACK)]
        column += [(cells[index], BLUE) for (index,) in gained[position]]
        column.append(("…", FAINT))
        column += [(cells[index], RED) for (index,) in lost[position]]
        columns.append(column)
    return columns


DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Drawing]] = {
    "ColoredTokens": _tokens,
    "AttentionPattern": _attention,
    "TextNeuronActivations": _neurons,
    "TopkTokens": _gained,
}

Line = list[tuple[str, float, float]]  # token, value, width in inches


def _lines(tokens: Sequence[str], values: np.ndarray, first: float = 0.0) -> list[Line]:
    """Tokens with their values, broken into lines; the first is so wide at least."""
    lines: list[Line] = [[]]
    length = 0.0
    for token, value in zip(tokens, values.tolist(), strict=True):
        width = max(_width(token) + 0.08, VALUE_WIDTH)
        if not lines[0]:
            width = max(width, first + 0.08)
        if lines[-1] and length + width > TEXT_WIDTH:
            lines.append([])
            length = 0.0
        lines[-1].append((token, value, width))
        length += width
    return lines


def _draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    colours: Colormap,
    norm: Normalize,
    *,
    top: float,
) -> float:
    """Tokens in their colours and their values below them; returns where they end."""
    for line in lines:
        left = MARGIN
        for token, value, width in line:
            colour = colours(norm(value))
            axes.add_patch(Rectangle((left, top), width - 0.02, 0.22, facecolor=colour))
            middle = left + width / 2 - 0.01
            axes.text(
                middle, top + 0.11, token, ha="center", va="center", color=ink(colour), **FONT
            )
            if abs(value) >= LEAST_VALUE:
                axes.text(middle, top + 0.3, f"{value:+.2f}", ha="center", va="center", **SMALL)
            left += width
        top += LINE
    return top


def _scale_bar(axes: Axes, colours: Colormap, norm: Normalize) -> None:
    """The colours from one end to the other, with their values."""
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    ends = [float(norm.inverse(share)) for share in (0.0, 1.0)]
    bar.set_ticks(ends, labels=[f"{end:g}" for end in ends])
    axes.tick_params(length=0, labelsize=7)


def _between(negative: str, positive: str, middle: str = "white") -> Colormap:
    """Colours from one to the other, white in the middle."""
    stops = [negative, middle, positive] if middle else [negative, positive]
    return LinearSegmentedColormap.from_list("tokens", stops)


def _texts(tokens: Sequence[str]) -> list[str]:
    """Tokens as they are read: those of an element that takes HTML are escaped."""
    return [unescape(token).strip(" ").replace("\n", "⏎") for token in tokens]


def _width(text: str) -> float:
    """Of a text in the font of tokens, in inches."""
    return LETTER * sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=float)
