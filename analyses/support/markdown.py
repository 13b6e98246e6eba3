"""Tables as Markdown, and texts in their places on the pages of docs/."""

import re
from collections.abc import Iterable, Sequence

import pandas


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = []
    for cells in (head, ["---"] * len(head), *body):
        escaped = [str(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def frame_markdown(data: pandas.DataFrame) -> str:
    """A DataFrame as a Markdown table; its index is left out."""
    return markdown_table(list(data.columns), data.astype(str).to_numpy().tolist())


def between(page: str, name: str, *parts: str) -> str:
    """A page with these parts between `<!-- NAME -->` and `<!-- /NAME -->`, if it has such marks."""
    start = f"<!-- {name} -->"
    end = f"<!-- /{name} -->"
    block = "\n\n".join([start, *parts, end])
    return re.sub(f"{start}.*{end}", lambda _: block, page, flags=re.DOTALL)
