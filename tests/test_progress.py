"""Progress in a log: a line now and then, where a bar would be torn into pieces.

Would catch: a log without any sign of life for hours, and one with a line for every step.
"""

import io

from rich.console import Console

from harmcircuits.progress import LineProgress, progress_bar


def test_a_log_gets_lines_and_a_terminal_bars():
    file = io.StringIO()
    assert isinstance(progress_bar(Console(file=file)), LineProgress)
    bars = progress_bar(Console(file=file, force_terminal=True))
    assert not isinstance(bars, LineProgress)


def test_a_line_comes_at_the_end_and_now_and_then():
    file = io.StringIO()
    progress = LineProgress(Console(file=file, width=200), every=60)
    now = [1000.0]
    progress.get_time = lambda: now[0]
    progress._written = now[0]
    with progress:
        task = progress.add_task("search [of] 7", total=100)
        for _ in range(100):
            now[0] += 1
            progress.advance(task)
    lines = file.getvalue().splitlines()
    assert lines == ["search [of] 7: 60/100 in 60 s", "search [of] 7: 100/100 in 1.7 min"]
