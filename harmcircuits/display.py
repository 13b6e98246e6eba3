"""How a value shows itself: texts of one line, small HTML."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

CARD = "font-size:13px;line-height:1.5;color:inherit;margin:2px 0 6px"
NOTE = "opacity:.7;font-size:12px"
# A notebook has colours and alignment of its own for tables.
LINE = "background:none;border:0;border-top:1px solid rgba(128,128,128,.3)"
CELL = "border:0;padding:2px 14px 2px 0;text-align:left;vertical-align:top;color:inherit"
SQUARE = "height:13px;padding:0;border:1px solid rgba(128,128,128,.25)"


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
    kinds = dict.fromkeys(kind for _, kind in values)
    largest = max(values.values())
    width = min(28, max(7, 360 // len(layers)))

    lines = []
    for kind in kinds:
        cells = [Markup('<td style="{};font-size:10px">{}</td>').format(CELL, kind)]
        for layer in layers:
            place = (layer, kind)
            strength = max(values.get(place, 0.0), 0.0) / largest if largest > 0 else 0.0
            # A red that is legible on white and on black.
            colour = f"min-width:{width}px;background:rgba(208,84,63,{strength:.3f})"
            cell = Markup('<td title="{}" style="{};{}"></td>')
            cells.append(cell.format(texts.get(place, ""), SQUARE, colour))
        lines.append(Markup('<tr style="background:none">{}</tr>').format(Markup("").join(cells)))
    table = Markup('<table style="border-collapse:collapse;margin:2px 0">{}</table>')
    caption = note(f"layers {layers[0]} to {layers[-1]}, from left to right")
    return table.format(Markup("").join(lines)) + caption


def _line(cells: Sequence[Markup]) -> Markup:
    return Markup('<tr style="{}">{}</tr>').format(LINE, Markup("").join(cells))
