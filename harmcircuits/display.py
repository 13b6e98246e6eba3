"""Values as text: one-line texts, and small HTML for notebooks."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from markupsafe import Markup

Square = tuple[int, str]  # layer and kind of a matrix, which a heat strip draws as a square

CARD_STYLE = "font-size:13px;line-height:1.5;color:inherit;margin:2px 0 6px"
TITLE_STYLE = "font-weight:600"
NOTE_STYLE = "opacity:.7;font-size:12px"
# A notebook has its own colours and alignment for tables; these styles replace them.
TABLE_STYLE = "border-collapse:collapse;border:0;margin:2px 0;font-size:13px"
ROW_STYLE = "background:none;border:0;border-top:1px solid rgba(128,128,128,.3)"
CELL_STYLE = "border:0;padding:2px 14px 2px 0;text-align:left;vertical-align:top;color:inherit"
STRIP_STYLE = "border-collapse:collapse;margin:2px 0"
SQUARE_STYLE = "height:13px;padding:0;border:1px solid rgba(128,128,128,.25)"


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names with commas between them; of more than `limit` the first ones and a count."""
    texts = [str(name) for name in names]
    n_more = len(texts) - limit
    if n_more <= 1:  # "and 1 more" is no shorter than the name
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {n_more} more"


def share(part: float) -> str:
    """A share in per cent: two decimals below ten per cent, two digits below 0.01 per cent."""
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


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest choice, and all choices."""
    names = list(choices)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    start = f"did you mean {close[0]!r}? There" if close else "there"
    return f"{start} are {listed(names, limit=12)}"


def number_text(value: float) -> str:
    """A figure of any size: whole and large numbers in full, others to three digits."""
    size = abs(value)
    if size < 1e15 and (size >= 1000 or value == round(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def settings_text(settings: Mapping[str, object], limit: int = 40) -> str:
    """Settings in one line; a long value is cut."""
    parts = []
    for name, value in settings.items():
        text = str(value)
        ending = "…" if len(text) > limit else ""
        parts.append(f"{name} {text[:limit]}{ending}")
    return listed(parts)


# HTML


def card(title: str, *parts: str) -> str:
    """A value in a notebook: its title, and its parts below each other."""
    blocks = [_element("div", "", part) for part in parts if part]
    heading = _element("div", TITLE_STYLE, title)
    return str(_element("div", CARD_STYLE, heading, *blocks))


def note(text: str) -> Markup:
    """A caption; no HTML for an empty text."""
    return _element("div", NOTE_STYLE, text) if text else Markup("")


def facts(values: Mapping[str, str]) -> Markup:
    """A table of names and texts, without the empty texts."""
    return html_table([], [[name, text] for name, text in values.items() if text])


def html_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Markup:
    """A table of texts under a row of titles."""
    rows = []
    if head:
        titles = [_element("th", CELL_STYLE, title) for title in head]
        rows.append(_element("tr", ROW_STYLE, *titles))
    for texts in body:
        cells = [_element("td", CELL_STYLE, text) for text in texts]
        rows.append(_element("tr", ROW_STYLE, *cells))
    return _element("table", TABLE_STYLE, *rows)


def heat_strip(values: Mapping[Square, float], texts: Mapping[Square, str]) -> Markup:
    """A picture of non-negative values: a column for each layer, a row for each kind."""
    if not values:
        return Markup("")
    layers = sorted({layer for layer, _ in values})
    kinds = dict.fromkeys(kind for _, kind in values)
    largest = max(values.values()) or 1.0
    width = min(28, max(7, 360 // len(layers)))

    rows = []
    for kind in kinds:
        cells = [_element("td", f"{CELL_STYLE};font-size:10px", kind)]
        for layer in layers:
            square = (layer, kind)
            strength = values.get(square, 0.0) / largest
            # A red that is legible on white and on black.
            colour = f"min-width:{width}px;background:rgba(208,84,63,{strength:.3f})"
            cell = Markup('<td title="{}" style="{};{}"></td>')
            cells.append(cell.format(texts.get(square, ""), SQUARE_STYLE, colour))
        rows.append(_element("tr", "background:none", *cells))

    strip = _element("table", STRIP_STYLE, *rows)
    caption = note(f"layers {layers[0]} to {layers[-1]}, from left to right")
    return strip + caption


def _element(tag: str, style: str, *children: str) -> Markup:
    """One HTML element; plain text among its children is escaped."""
    inner = Markup("").join(children)
    return Markup('<{0} style="{1}">{2}</{0}>').format(tag, style, inner)
