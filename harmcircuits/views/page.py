"""One HTML file that needs no network, and the parts it is made of."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmcircuits.storage import write_text

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
    """Write sections as one HTML file."""
    # jinja escapes every text but what `_html` marks as HTML.
    parts = [_html(part) for part in sections]
    template = _templates().get_template("page.html")
    page = template.render(
        title=title,
        script=_html(script),
        sections=parts,
    )
    write_text(path, page)


def write_view(path: str | Path, title: str, content: str, *, script: str = "") -> None:
    """Write one view as one HTML file, light or dark as the reader has it."""
    template = _templates().get_template("view.html")
    page = template.render(title=title, content=_html(content), script=_html(script))
    write_text(path, page)


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page."""
    macro = _part("section")
    return str(macro(title, text, _html(content)))


def subsection(title: str, text: str, content: str) -> str:
    """A titled part of a section."""
    macro = _part("subsection")
    return str(macro(title, text, _html(content)))


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    macro = _part("paragraphs")
    return str(macro(text.splitlines()))


def contents(titles: Sequence[str]) -> str:
    """Links to the sections with these titles."""
    macro = _part("contents")
    return str(macro(titles))


def headline(figures: Sequence[tuple[str, str, str]]) -> str:
    """The figures that a reader takes away."""
    macro = _part("headline")
    return str(macro(figures))


def missing(reason: str) -> str:
    """What stands where a section has nothing to show: a plain sentence that says why."""
    macro = _part("missing")
    return str(macro(reason))


def preformatted(text: str) -> str:
    """Plain text with its line breaks."""
    macro = _part("preformatted")
    return str(macro(text))


def download(name: str, content: bytes, text: str) -> str:
    """A link to a file that the page itself holds."""
    macro = _part("download")
    return str(macro(name, b64encode(content).decode(), text))


def table(
    head: Sequence[str],
    body: Iterable[Sequence[str]],
    *,
    style: str = "",
    label: str = "Table",
) -> str:
    """An HTML table of plain texts; what follows a line break in a cell is set small below it."""
    macro = _part("table")
    return str(macro(head, list(body), style, label))


def frame(data: "pandas.DataFrame") -> str:
    """A DataFrame as an HTML table; its index is left out."""
    body = [[str(value) for value in line] for line in data.itertuples(index=False)]
    return table([str(name) for name in data.columns], body)


def plot(figure: "Figure", *, first: bool = False, label: str = "Figure") -> str:
    """A figure as HTML."""
    # The script is 4 MB, so a page holds it once.
    config = {"displayModeBar": False, "responsive": True}
    html = figure.to_html(full_html=False, include_plotlyjs=first, config=config)
    macro = _part("plot")
    return str(macro(_html(html), " ".join(label.split())))


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
