"""Long work cut into jobs that run side by side and are not run twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harmcircuits.measurements import Measurement, Rows, resumed

DONE, CPU = "job_seconds", "job_cpu_seconds"


@dataclass(frozen=True)
class Job:
    """A part of an experiment: `run` gives its rows, `labels` tell it from the other jobs.

    `run` is sent to another process, so it must be picklable: a module's function, or `functools.partial` of one.
    """

    labels: Mapping[str, str | int | float]
    run: Callable[[], Rows]


def run_jobs(
    out: str | Path, jobs: Sequence[Job], settings: Mapping[str, str | int | float], *, workers: int = 1, name: str = "jobs"
) -> Rows:
    """The rows of all jobs in `out`, in the order in which jobs ended; those that are there already are not run again.

    A job's rows are added to `rows.jsonl` all at once when it ends, the last of them `job_cpu_seconds` and `job_seconds`
    with its labels, by which it counts as run. With `workers` > 1 jobs run in as many processes of one thread each, which
    for small models is faster than one process of many threads. After an error in a job no further one starts, and it is
    raised when those under way have ended; what finished is kept. Raises ValueError as `resumed`, for fewer than one
    worker, and for two jobs with the same labels.
    """
    if workers < 1:
        raise ValueError(f"run_jobs: workers={workers}; expected at least 1")
    if len({tuple(sorted(job.labels.items())) for job in jobs}) < len(jobs):
        raise ValueError("run_jobs: two jobs have the same labels, so their rows could not be told apart")
    out = Path(out)
    path, rows = out / "rows.jsonl", resumed(out, settings)
    left = [job for job in jobs if not rows.where(DONE, **job.labels)]
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(jobs), completed=len(jobs) - len(left))

        def keep(found: Rows) -> None:
            nonlocal rows
            Rows(found).append_to(path)
            rows += found
            progress.advance(task)

        if workers == 1:
            for job in left:
                keep(_timed(job))
            return rows
        # Spawned, because forking a process that has run torch's threads can hang.
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            futures, failed = [pool.submit(_timed, job) for job in left], None
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if future.exception():
                    failed = failed or future
                    for other in futures:
                        other.cancel()
                else:
                    keep(future.result())
        if failed:
            failed.result()
    return rows


def _timed(job: Job) -> Rows:
    start, cpu = time.monotonic(), time.process_time()
    found = Rows(job.run())
    found += [Measurement.exact(CPU, job.labels, round(time.process_time() - cpu, 1))]
    done = Measurement.exact(DONE, job.labels, round(time.monotonic() - start, 1))
    return Rows([*found, done])
