"""How far long work is: bars in a terminal or a notebook, a line now and then in a log."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from harmcircuits.display import bar, card, duration, html_table

EVERY = 30.0  # seconds between two lines
REDRAWN_EVERY = 0.1  # seconds between two drawings in a notebook, at least


def progress_bar(console: Console | None = None) -> Progress:
    """What is done, how much of it, and for how long: bars, or lines where there is no terminal."""
    console = console or Console(stderr=True)
    if console.is_jupyter:
        return NotebookProgress(console)
    if not console.is_terminal:
        return LineProgress(console)
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


class LineProgress(Progress):
    """A line at the end of each task, and after every half minute in between."""

    def __init__(self, console: Console, every: float = EVERY) -> None:
        super().__init__(console=console, disable=True)
        self.every = every
        self._written = self.get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task on."""
        super().advance(task_id, advance)
        task = self._tasks[task_id]
        is_due = self.get_time() - self._written >= self.every
        if task.finished or is_due:
            self._written = self.get_time()
            done = f"{task.completed:,.0f}/{task.total or 0:,.0f}"
            text = f"{task.description}: {done} in {duration(task.elapsed or 0.0)}"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing to take down, and no empty line."""


class NotebookProgress(Progress):
    """Bars in a notebook: one output for all of them, drawn anew at most ten times a second."""

    def __init__(self, console: Console) -> None:
        # Without rich's thread `track` counts in this one, and each count can be drawn.
        super().__init__(console=console, auto_refresh=False)
        self._output: Any = None
        self._drawn_at = 0.0

    def start(self) -> None:
        """Show the output."""
        from IPython.display import display

        if self._output is None:
            self._output = display(self._texts(), raw=True, display_id=True)

    def stop(self) -> None:
        """Leave the output as things stand."""
        self._draw()

    def refresh(self) -> None:
        """Draw the bars anew, unless that was a moment ago."""
        if self.get_time() - self._drawn_at >= REDRAWN_EVERY:
            self._draw()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task on."""
        super().advance(task_id, advance)
        self.refresh()

    def update(self, task_id: TaskID, **changes: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change a task."""
        super().update(task_id, **changes)
        self.refresh()

    def _draw(self) -> None:
        if self._output is not None:
            self._drawn_at = self.get_time()
            self._output.update(self._texts(), raw=True)

    def _texts(self) -> dict[str, str]:
        """The bars as HTML, and as text for what shows none."""
        body, lines = [], []
        for task in self.tasks:
            done = task.completed / task.total if task.total else 0.0
            counts = [_count(task), duration(task.elapsed or 0.0)]
            body.append([task.description, bar(done), *counts])
            lines.append(" ".join([task.description, *counts]))
        return {"text/html": card("", html_table([], body)), "text/plain": "\n".join(lines)}


def _count(task: Task) -> str:
    total = "?" if task.total is None else f"{task.total:,.0f}"
    return f"{task.completed:,.0f}/{total}"
