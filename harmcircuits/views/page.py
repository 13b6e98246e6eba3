"""One HTML file that needs no network, and the parts it is made of."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[str],
    *,
    script: str = "",
) -> None:
    """Write sections as one HTML file.

    Args:
        path: the file to write.
        title: plain text.
        sections: HTML (see `section`).
        script: inline script tags that they use.
    """
    page = _templates().get_template("page.html")
    parts = [_html(part) for part in sections]
    html = page.render(title=title, script=_html(script), sections=parts)
    Path(path).write_text(html, encoding="utf-8")


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page.

    Args:
        title: plain text.
        text: a sentence or two, plain.
        content: HTML.
    """
    return str(_part("section")(title, text, _html(content)))


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    return str(_part("paragraphs")(text.splitlines()))


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, style: str = "") -> str:
    """An HTML table of plain texts; what follows a line break in a cell is set small below it.

    Args:
        head: titles of the columns.
        body: lines of cells.
        style: "figures" aligns numbers.
    """
    return str(_part("table")(head, list(body), style))


def plot(figure: "Figure", *, first: bool = False) -> str:
    """A figure as HTML.

    Args:
        figure: the figure.
        first: whether it is the page's first one, which brings the plotting script.
    """
    config = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=first, config=config)


def _part(name: str) -> Any:
    """A macro of parts.html, which escapes what it is given."""
    return getattr(_templates().get_template("parts.html").module, name)


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader("harmcircuits", "views"), autoescape=True)


def _html(text: str) -> Any:
    """A text that is HTML already, so that it is not escaped again."""
    from markupsafe import Markup

    return Markup(text)
