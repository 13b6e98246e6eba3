"""A table as Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = []
    for cells in (head, ["---"] * len(head), *body):
        escaped = [str(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)
