"""How a value shows itself: texts of one line, small HTML and SVG."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from markupsafe import Markup

# Both are legible on white and on black.
RED = "#d0543f"
BLUE = "#4a86c8"

CARD = "font-size:13px;line-height:1.5;color:inherit;margin:2px 0 6px"
NOTE = "opacity:.7;font-size:12px"
# A notebook has colours and alignment of its own for tables.
LINE = "background:none;border:0;border-top:1px solid rgba(128,128,128,.3)"
CELL = "border:0;padding:2px 14px 2px 0;text-align:left;vertical-align:top;color:inherit"

CELL_HEIGHT = 14
LABEL_WIDTH = 96
N_TICKS = 8
MARK_WIDTH = 110
BAR_WIDTH = 240


def dtype_name(dtype: object) -> str:
    """A number format as torch names it, such as bfloat16, without the module."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names with commas between them; of more than `most` only the first, and how many follow."""
    texts = [str(name) for name in names]
    if len(texts) <= most + 1:  # "and 1 more" is no shorter than the name
        return ", ".join(texts)
    return f"{', '.join(texts[:most])} and {len(texts) - most} more"


def share(part: float) -> str:
    """A share in per cent: two places below ten per cent, two digits below a hundredth of one."""
    percent = 100 * part
    if percent == 0 or percent >= 10:
        return f"{percent:.0f}%"
    if percent >= 0.01:
        return f"{percent:.2f}%"
    return f"{percent:.2g}%"  # a few dozen of a billion weights are not 0.00%


def duration(seconds: float) -> str:
    """A time in the unit that a reader would choose, to two digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        number = seconds / size
        if number < limit:
            digits = 1 if number < 10 and unit != "s" else 0
            return f"{number:.{digits}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def plural(number: int, noun: str) -> str:
    """A count with its noun."""
    ending = "" if number == 1 else "s"
    return f"{number:,} {noun}{ending}"


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: the nearest known one, and all of them."""
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    start = "There are" if hint else "there are"
    return f"{hint}{start} {listed(names, most=12)}"


def number_text(value: float) -> str:
    """A figure of any size: a whole number in full, others to three digits."""
    is_whole = value == round(value) if abs(value) < 1e15 else False
    return f"{value:,.0f}" if is_whole or 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def settings_text(settings: Mapping[str, Any], longest: int = 40) -> str:
    """Settings in one line, long ones cut."""
    parts = []
    for name, value in settings.items():
        text = str(value)
        parts.append(f"{name} {text if len(text) <= longest else text[:longest] + '…'}")
    return listed(parts)


# HTML


def card(title: str, *parts: str) -> str:
    """A value in a notebook: its title, and its parts below each other."""
    inner = [Markup("<div>{}</div>").format(part) for part in parts if part]
    heading = Markup('<div style="font-weight:600">{}</div>').format(title) if title else ""
    return str(Markup('<div style="{}">{}{}</div>').format(CARD, heading, Markup("").join(inner)))


def note(text: str) -> Markup:
    """A caption; nothing where there is no text."""
    if not text:
        return Markup("")
    return Markup('<div style="{}">{}</div>').format(NOTE, text)


def facts(values: Mapping[str, str]) -> Markup:
    """A table of two columns, without lines that say nothing."""
    return html_table([], [[name, text] for name, text in values.items() if text])


def html_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Markup:
    """A table."""
    lines = []
    if head:
        titles = [Markup('<th style="{}">{}</th>').format(CELL, title) for title in head]
        lines.append(_line(titles))
    for cells in body:
        texts = [Markup('<td style="{}">{}</td>').format(CELL, cell) for cell in cells]
        lines.append(_line(texts))
    table = Markup(
        '<table style="border-collapse:collapse;border:0;margin:2px 0;font-size:13px">{}</table>'
    )
    return table.format(Markup("").join(lines))


def heat_strip(
    values: Mapping[tuple[int, str], float], texts: Mapping[tuple[int, str], str]
) -> Markup:
    """A picture of a value for every layer and kind: a column a layer, a line a kind."""
    if not values:
        return Markup("")
    layers = sorted({layer for layer, _ in values})
    kinds = list(dict.fromkeys(kind for _, kind in values))
    largest = max(max(values.values()), 0.0)
    width = min(28, max(7, 360 // len(layers)))

    shapes = []
    for line, kind in enumerate(kinds):
        middle = line * CELL_HEIGHT + CELL_HEIGHT - 4
        shapes.append(_svg_text(LABEL_WIDTH - 6, middle, kind, "end"))
    for (layer, kind), value in values.items():
        strength = max(value, 0.0) / largest if largest else 0.0
        x = LABEL_WIDTH + layers.index(layer) * width
        y = kinds.index(kind) * CELL_HEIGHT
        shapes.append(_cell(x, y, width, strength, texts[layer, kind]))
    below = len(kinds) * CELL_HEIGHT + 11
    for layer in layers[:: ceil(len(layers) / N_TICKS)]:
        middle = LABEL_WIDTH + layers.index(layer) * width + width / 2
        shapes.append(_svg_text(middle, below, str(layer), "middle"))
    size = (LABEL_WIDTH + len(layers) * width + 12, below + 4)
    return _svg(size, f"{len(layers)} layers by {len(kinds)} kinds of matrix", shapes)


def interval_mark(low: float, mean: float, high: float, ends: tuple[float, float]) -> Markup:
    """A figure and its interval as a dot on a line."""
    start, end = ends
    span = end - start or 1.0

    def place(value: float) -> float:
        share_of_line = min(max((value - start) / span, 0.0), 1.0)
        return round(4 + share_of_line * (MARK_WIDTH - 8), 1)

    shapes = [
        _stroke(place(start), place(end), "currentColor", opacity=0.25, thickness=1),
        _stroke(place(low), place(high), BLUE, opacity=0.7, thickness=4),
        Markup('<circle cx="{}" cy="7" r="3.5" fill="{}"/>').format(place(mean), BLUE),
    ]
    return _svg((MARK_WIDTH, 14), f"{mean:.3g}, from {low:.3g} to {high:.3g}", shapes)


def two_bars(first: float, second: float, shared: float) -> Markup:
    """Two sets as bars, one above the other, that lie over each other where they share members."""
    either = first + second - shared or 1.0
    scale = 300 / either
    bars = [(0.0, 0, first, BLUE), (first - shared, 16, second, RED)]
    shapes = []
    for begin, y, length, colour in bars:
        shape = '<rect x="{:.1f}" y="{}" width="{:.1f}" height="14" fill="{}" fill-opacity=".75"/>'
        shapes.append(Markup(shape).format(begin * scale, y, length * scale, colour))
    frame = '<rect x="{:.1f}" y="0" width="{:.1f}" height="30" fill="none" stroke="currentColor"/>'
    if shared:
        shapes.append(Markup(frame).format((first - shared) * scale, shared * scale))
    return _svg((302, 31), f"{shared:,} shared of {first:,} and {second:,}", shapes)


def bar(done: float) -> Markup:
    """How much of something is done, as a bar."""
    shape = '<rect y="4" width="{:.1f}" height="6" rx="3" fill="{}" fill-opacity="{}"/>'
    shapes = [
        Markup(shape).format(BAR_WIDTH, "currentColor", 0.2),
        Markup(shape).format(BAR_WIDTH * min(done, 1.0), BLUE, 1),
    ]
    return _svg((BAR_WIDTH, 14), f"{done:.0%}", shapes)


def _line(cells: Sequence[Markup]) -> Markup:
    return Markup('<tr style="{}">{}</tr>').format(LINE, Markup("").join(cells))


def _svg(size: tuple[float, float], label: str, shapes: Sequence[Markup]) -> Markup:
    width, height = size
    opening = Markup(
        '<svg role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}" '
        'style="max-width:100%;vertical-align:middle;overflow:visible">'
    ).format(label, width, height, width, height)
    return opening + Markup("").join(shapes) + Markup("</svg>")


def _svg_text(x: float, y: float, text: str, anchor: str) -> Markup:
    shape = '<text x="{}" y="{}" font-size="10" fill="currentColor" text-anchor="{}">{}</text>'
    return Markup(shape).format(x, y, anchor, text)


def _cell(x: int, y: int, width: int, strength: float, text: str) -> Markup:
    """A square of a heat strip; the outline is there even where nothing is."""
    shape = (
        '<rect x="{}" y="{}" width="{}" height="{}" fill="{}" fill-opacity="{:.3f}" '
        'stroke="currentColor" stroke-opacity=".18"><title>{}</title></rect>'
    )
    return Markup(shape).format(x, y, width - 1, CELL_HEIGHT - 1, RED, strength, text)


def _stroke(start: float, end: float, colour: str, *, opacity: float, thickness: int) -> Markup:
    shape = (
        '<line x1="{}" x2="{}" y1="7" y2="7" stroke="{}" stroke-opacity="{}" stroke-width="{}"/>'
    )
    return Markup(shape).format(start, end, colour, opacity, thickness)
