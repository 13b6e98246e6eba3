"""One HTML file that needs no network, and the parts it is made of."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmcircuits.storage.writing import write_text

if TYPE_CHECKING:
    import pandas
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
    # jinja escapes every text but what `_html` marks as HTML.
    parts = [_html(part) for part in sections]
    template = _templates().get_template("page.html")
    page = template.render(
        title=title,
        script=_html(script),
        sections=parts,
    )
    write_text(path, page)


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page.

    Args:
        title: plain text.
        text: a sentence or two, plain.
        content: HTML.
    """
    macro = _part("section")
    return str(macro(title, text, _html(content)))


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    macro = _part("paragraphs")
    return str(macro(text.splitlines()))


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, style: str = "") -> str:
    """An HTML table of plain texts; what follows a line break in a cell is set small below it.

    Args:
        head: titles of the columns.
        body: lines of cells.
        style: "figures" aligns numbers.
    """
    macro = _part("table")
    return str(macro(head, list(body), style))


def frame(data: "pandas.DataFrame") -> str:
    """A DataFrame as an HTML table; its index is left out."""
    body = [[str(value) for value in line] for line in data.itertuples(index=False)]
    return table([str(name) for name in data.columns], body)


def plot(figure: "Figure", *, first: bool = False) -> str:
    """A figure as HTML.

    Args:
        figure: the figure.
        first: whether it is the page's first figure, which brings the plotting script.
    """
    # The script is 4 MB, so a page holds it once.
    config = {"displayModeBar": False, "responsive": True}
    html = figure.to_html(full_html=False, include_plotlyjs=first, config=config)
    return f'<div class="wide plot">{html}</div>'


def _part(name: str) -> Any:
    """A macro of parts.html, which escapes its arguments."""
    template = _templates().get_template("parts.html")
    return getattr(template.module, name)


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("harmcircuits", "views")
    return Environment(loader=loader, autoescape=True)


def _html(text: str) -> Any:
    """A text that is HTML already, so that it is not escaped again."""
    from markupsafe import Markup

    return Markup(text)
