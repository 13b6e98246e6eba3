"""Views as still pictures, SVG or PNG: drawn by matplotlib, without a browser or a network."""

import warnings
from base64 import b64encode
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from harmcircuits.storage import replacing

ENDINGS = (".html", ".svg", ".png")
PIXELS = 100  # of a view, an inch of a still
FILE_SCALE = 2  # pixels of a PNG for one of a view
LEAST_TEXT = 4.0  # points; what is smaller is left out
MOST_TEXT = 9.0
LETTER = 0.62  # of a text's size, the width of a letter
CLICK = "; click to open"  # what a title says on a page alone

BLACK = "#20242a"
FAINT = "#6b727c"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "harmcircuits",  # names in the file are not drawn anew
    "text.parse_math": False,  # a token may hold dollars
    "text.color": BLACK,
    "axes.labelcolor": BLACK,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
}

Draw = Callable[[], Figure]


def ending(path: str | Path) -> str:
    """What a view is saved as."""
    suffix = Path(path).suffix.lower()
    if suffix not in ENDINGS:
        expected = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise ValueError(
            f"{path}: the ending is {suffix or 'missing'!r}; a view is saved as a page or as a "
            f"still, so end the name in {expected}"
        )
    return suffix


def write_still(path: str | Path, draw: Draw, title: str = "") -> None:
    """Write a still."""
    kind = ending(path).removeprefix(".")
    content = still(draw, kind, title=title, scale=FILE_SCALE)
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def still(draw: Draw, kind: str, *, title: str = "", scale: int = 1) -> bytes:
    """A still as a file's content."""
    content = BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # A letter that the font lacks is a box, which says so itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw()
        if title:
            top = figure.get_tightbbox().y1 / figure.get_figheight()
            figure.suptitle(title, y=top + 0.1 / figure.get_figheight(), va="bottom")
        undated = {"Date": None} if kind == "svg" else None  # the same still, the same file
        figure.savefig(
            content,
            format=kind,
            dpi=scale * PIXELS,
            bbox_inches="tight",
            metadata=undated,
        )
    return content.getvalue()


def with_still(html: str, library: str, draw: Draw, label: str) -> str:
    """HTML that a script draws, with a still in its place where none is run or none can draw."""
    name = uuid4().hex[:12]
    source = f"data:image/png;base64,{b64encode(still(draw, 'png')).decode()}"
    image = f'<img style="max-width:100%" alt="{escape(label)}" src="{source}">'
    # Drawn while it is shown, since what is hidden has no size.
    shown = f'<script>document.getElementById("live-{name}").style.display = ""</script>'
    other = f'(window.{library} ? "still-" : "live-") + "{name}"'
    return (
        f'<div id="still-{name}">{image}</div>'
        f'<div id="live-{name}" style="display:none">{shown}{html}</div>'
        f"<script>document.getElementById({other}).remove()</script>"
    )


def ink(colour: Any) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = to_rgb(colour)
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def text_size(box: tuple[float, float], text: str) -> float:
    """Points at which a text fits a box of this width and height, in inches."""
    lines = text.split("\n")
    width, height = box
    across = 0.92 * width / (LETTER * max(1, *map(len, lines)))
    along = 0.8 * height / len(lines)
    return min(MOST_TEXT, 72 * across, 72 * along)
