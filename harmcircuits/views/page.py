"""Pages: one HTML file that needs no network, and its parts."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from harmcircuits.storage import write_text

if TYPE_CHECKING:
    import jinja2
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
    template = _templates().get_template("page.html")
    page = template.render(
        title=title,
        script=Markup(script),
        sections=[Markup(part) for part in sections],
    )
    write_text(path, page)


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page."""
    return _part("section", title, text, Markup(content))


def subsection(title: str, text: str, content: str) -> str:
    """A titled part of a section."""
    return _part("subsection", title, text, Markup(content))


def paragraphs(text: str) -> str:
    """The result that opens a page: one paragraph for each line of the text."""
    return _part("paragraphs", text.splitlines())


def contents(titles: Sequence[str]) -> str:
    """Links to the sections with these titles."""
    return _part("contents", titles)


def key_figures(figures: Sequence[tuple[str, str, str]]) -> str:
    """The main figures of a page, each with its name and interval."""
    return _part("key_figures", figures)


def missing(reason: str) -> str:
    """The reason for an empty section."""
    return _part("missing", reason)


def download(name: str, content: bytes, text: str) -> str:
    """A link to a file within the page."""
    return _part("download", name, b64encode(content).decode(), text)


def table(
    head: Sequence[str],
    body: Iterable[Sequence[str]],
    *,
    style: str = "",
    label: str = "Table",
) -> str:
    """An HTML table of plain texts; text after a line break in a cell is small."""
    return _part("table", head, list(body), style, label)


def frame(data: "pandas.DataFrame") -> str:
    """A DataFrame as an HTML table, without its index."""
    body = [[str(value) for value in row] for row in data.itertuples(index=False)]
    return table([str(name) for name in data.columns], body)


def plot(figure: "Picture", *, label: str = "Figure") -> str:
    """A figure as SVG."""
    return _part("plot", Markup(figure.svg("none")), " ".join(label.split()))


def visual(html: str, *, label: str = "View") -> str:
    """Elements of circuitsvis; a dark page inverts their colours."""
    return _part("visual", Markup(html), label)


def _part(name: str, *content: object) -> str:
    """A part of parts.html, which escapes every text that is not Markup."""
    template = _templates().get_template("parts.html")
    return str(getattr(template.module, name)(*content))


@cache
def _templates() -> "jinja2.Environment":
    import jinja2

    loader = jinja2.PackageLoader("harmcircuits", "views")
    return jinja2.Environment(loader=loader, autoescape=True)
