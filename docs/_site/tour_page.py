"""The tour as a page: `docs/tour.py` runs as a notebook, with the outputs of each cell below it.

`mkdocs build` runs it (half a minute); `mkdocs serve` shows its code alone.
"""

import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbformat import NotebookNode

TOUR = Path(__file__).parents[1] / "tour.py"
SVG, PNG = "image/svg+xml", "image/png"
INTRODUCTION = '<a href="tour.py" download>Download as a notebook (py:percent)</a>'

is_run = True
# HTML that Markdown must not touch, by the comment that holds its place.
contents: dict[str, str] = {}


def executed(path: Path) -> NotebookNode:
    """A py:percent script as a notebook after a run in its folder."""
    notebook = jupytext.read(path, fmt="py:percent")
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    return notebook


def on_startup(*, command: str, **_: object) -> None:
    """Run the tour for `build` alone: `serve` writes the page at every keystroke."""
    global is_run
    is_run = command == "build"


def on_files(site: Files, *, config: Any) -> Files:
    """Add the page."""
    notebook = executed(TOUR) if is_run else jupytext.read(TOUR, fmt="py:percent")
    site.append(File.generated(config, "tour.md", content=page(notebook)))
    return site


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to the notebook, which the repository has, lead to its page."""
    return markdown.replace("](tour.py)", "](tour.md)").replace("](../tour.py)", "](../tour.md)")


def on_post_page(output: str, *, page: Any, **_: object) -> str:
    """Put the outputs of the cells in their places."""
    if page.file.src_uri == "tour.md":
        for place, content in contents.items():
            output = output.replace(place, content)
    return output


def page(notebook: NotebookNode) -> str:
    """A notebook as Markdown; pictures and tables are held back in `contents`."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [output_text(output) for output in cell.get("outputs", [])]
    title, *cells = parts
    return "\n\n".join([title, INTRODUCTION, *cells])


def output_text(output: NotebookNode) -> str:
    """One output of a cell as Markdown."""
    if output.output_type == "stream":
        if output.name == "stderr":  # bars
            return ""
        return f"```text\n{output.text.rstrip()}\n```"
    data = output.get("data", {})
    if SVG in data:
        return image(SVG, b64encode(data[SVG].encode()).decode())
    if PNG in data:
        return image(PNG, data[PNG])
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        # The site styles tables that have no class.
        table = table.replace('<table border="1" class="dataframe">', "<table>")
        return held_back(f'<div class="md-typeset__scrollwrap">{table}</div>')
    return f"```text\n{data.get('text/plain', '')}\n```"


def image(kind: str, content: str) -> str:
    """A picture inside the page."""
    return held_back(f'<img alt="What the cell draws" src="data:{kind};base64,{content}">')


def held_back(content: str) -> str:
    """A comment in place of HTML."""
    place = f"<!-- content {len(contents)} -->"
    contents[place] = content
    return place
