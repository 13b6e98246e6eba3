"""One HTML file that needs no network, and the parts it is made of."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmcircuits.storage import write_text

if TYPE_CHECKING:
    import pandas

    from harmcircuits.views.figures import Picture


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[str],
    *,
    script: str = "",
) -> None:
    """Write sections as one HTML file."""
    parts = [_html(part) for part in sections]
    template = _templates().get_template("page.html")
    page = template.render(title=title, script=_html(script), sections=parts)
    write_text(path, page)


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page."""
    return _part("section", title, text, _html(content))


def subsection(title: str, text: str, content: str) -> str:
    """A titled part of a section."""
    return _part("subsection", title, text, _html(content))


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    return _part("paragraphs", text.splitlines())


def contents(titles: Sequence[str]) -> str:
    """Links to the sections with these titles."""
    return _part("contents", titles)


def headline(figures: Sequence[tuple[str, str, str]]) -> str:
    """The figures that a reader takes away."""
    return _part("headline", figures)


def missing(reason: str) -> str:
    """What stands where a section has nothing to show: a plain sentence that says why."""
    return _part("missing", reason)


def preformatted(text: str) -> str:
    """Plain text with its line breaks."""
    return _part("preformatted", text)


def download(name: str, content: bytes, text: str) -> str:
    """A link to a file that the page itself holds."""
    return _part("download", name, b64encode(content).decode(), text)


def table(
    head: Sequence[str],
    body: Iterable[Sequence[str]],
    *,
    style: str = "",
    label: str = "Table",
) -> str:
    """An HTML table of plain texts; what follows a line break in a cell is set small below it."""
    return _part("table", head, list(body), style, label)


def frame(data: "pandas.DataFrame") -> str:
    """A DataFrame as an HTML table; its index is left out."""
    body = [[str(value) for value in line] for line in data.itertuples(index=False)]
    return table([str(name) for name in data.columns], body)


def plot(figure: "Picture", *, label: str = "Figure") -> str:
    """A figure as SVG."""
    return _part("plot", _html(figure.svg("none")), " ".join(label.split()))


def drawn(html: str, *, label: str = "View") -> str:
    """Elements of circuitsvis, which draws them on white: a dark page turns them dark."""
    return _part("drawn", _html(html), label)


def _part(name: str, *content: Any) -> str:
    """A part of parts.html, which escapes every text but what `_html` marks as HTML."""
    template = _templates().get_template("parts.html")
    return str(getattr(template.module, name)(*content))


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader("harmcircuits", "views"), autoescape=True)


def _html(text: str) -> Any:
    """A text that is HTML already, so that it is not escaped again."""
    from markupsafe import Markup

    return Markup(text)
