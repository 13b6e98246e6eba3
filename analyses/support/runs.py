"""The frame of an analysis that judges no claim: its jobs, and the tables of their rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas
from rich.console import Console
from support.jobs import Job, run_jobs

from harmcircuits.measurements import Label, Rows
from harmcircuits.storage import write_text
from harmcircuits.views.tables import frame_table

Tables = Mapping[str, Callable[[Rows], pandas.DataFrame]]  # by the name of their block on a page


def run_analysis(
    out: Path,
    jobs: Sequence[Job],
    settings: Mapping[str, Label],
    tables: Tables,
    *,
    workers: int,
    name: str,
    n_names: int = 1,
) -> Rows:
    """The rows of all jobs, in `rows.jsonl`; and their tables, on the screen and in `table.txt`."""
    rows = run_jobs(out, jobs, settings, workers=workers, name=name)
    texts = []
    for table in tables.values():
        frame = table(rows)
        if len(frame):
            texts.append(frame.to_string(index=False))
            Console().print(frame_table(frame, n_names=n_names))
    write_text(out / "table.txt", "\n\n".join(texts) + "\n")
    return rows
