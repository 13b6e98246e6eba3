"""One HTML file that needs no network, and the parts it is made of."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

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
    template = Path(__file__).parent / "page.html"
    page = Template(template.read_text(encoding="utf-8"))
    html = page.substitute(
        title=escape(title),
        body="\n".join(sections),
        script=script,
    )
    Path(path).write_text(html, encoding="utf-8")


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page.

    Args:
        title: plain text.
        text: a sentence or two, plain.
        content: HTML.
    """
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    lines = [f'<p class="verdict">{escape(line)}</p>' for line in text.splitlines()]
    return "".join(lines)


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, style: str = "") -> str:
    """An HTML table of plain texts; what follows a line break in a cell is set small below it.

    Args:
        head: titles of the columns.
        body: lines of cells.
        style: "figures" aligns numbers.
    """
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = []
    for row in body:
        cells = "".join(_cell(text) for text in row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<table class="{style}"><tr>{top}</tr>{"".join(lines)}</table>'


def _cell(text: str) -> str:
    figure, _, interval = text.partition("\n")
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return f"<td>{escape(figure)}{small}</td>"


def plot(figure: "Figure", *, first: bool = False) -> str:
    """A figure as HTML.

    Args:
        figure: the figure.
        first: whether it is the page's first one, which brings the plotting script.
    """
    config = {"displayModeBar": False, "responsive": True}
    return figure.to_html(
        full_html=False,
        include_plotlyjs=first,
        config=config,
    )
