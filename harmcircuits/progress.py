"""How far long work is: bars in a terminal, a line now and then in a log."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from harmcircuits.display import duration

EVERY = 30.0  # seconds between two lines


def progress_bar(console: Console | None = None) -> Progress:
    """What is done, how much of it, and for how long: bars, or lines where there is no terminal.

    Args:
        console: where they are shown; standard error by default.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        return LineProgress(console)
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # A kernel flushes both streams whenever something is displayed; redirected to the bars, which
    # are displayed themselves, that never ends.
    is_redirected = not console.is_jupyter
    return Progress(
        *columns,
        console=console,
        redirect_stdout=is_redirected,
        redirect_stderr=is_redirected,
    )


class LineProgress(Progress):
    """A line at the end of each task, and after every half minute in between.

    Args:
        console: where they are written.
        every: seconds between two lines.
    """

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
