"""The generated blocks of pages: each stands between `<!-- NAME -->` and `<!-- /NAME -->`."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas
from support.jobs import CPU_SECONDS, JOB_SECONDS

from harmcircuits.measurements import Rows

ROOT = Path(__file__).parents[2]
Blocks = dict[str, Callable[[], str | pandas.DataFrame]]


@cache
def committed(name: str) -> Rows:
    """The committed rows of an analysis, without the times of its jobs."""
    rows = Rows.read(ROOT / "analyses" / "rows" / f"{name}.jsonl")
    return Rows(row for row in rows if row.metric not in (JOB_SECONDS, CPU_SECONDS))


def markdown(table: pandas.DataFrame) -> str:
    """A table as Markdown, without its index."""
    cells = table.astype(str).rename(columns=lambda title: str(title).replace("|", "\\|"))
    return cells.to_markdown(index=False, disable_numparse=True)


def fenced(name: str, content: str | pandas.DataFrame) -> str:
    """A block with its marks, as it stands on a page."""
    text = content if isinstance(content, str) else markdown(content)
    return f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"


def with_blocks(page: str, blocks: Blocks) -> str:
    """The text of a page with these blocks in their places."""
    for name, content in blocks.items():
        block = fenced(name, content())
        pattern = rf"<!-- {re.escape(name)} -->.*<!-- /{re.escape(name)} -->"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
    return page
