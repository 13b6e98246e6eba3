"""Long work cut into jobs that run side by side and are not run twice."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

from harmcircuits.measurements import Label, Labels, Measurement, Rows, write_manifest
from harmcircuits.storage import read_json

DONE = "job_seconds"  # metric of a job's last row, which marks it as finished
CPU = "job_cpu_seconds"


@dataclass(frozen=True)
class Job:
    """A part of an experiment."""

    labels: Mapping[str, Label]
    run: Callable[[], Rows]


def jobs_about(case: Any, calls: Sequence[tuple[Callable[..., Rows], Labels]]) -> list[Job]:
    """A job for each function, called with the case and with its labels and those of the model."""
    jobs = []
    for run, of_call in calls:
        labels = {**case.spec.labels, **of_call}
        jobs.append(Job(labels, partial(run, case, labels)))
    return jobs


def run_jobs(
    out: str | Path,
    jobs: Sequence[Job],
    settings: Mapping[str, Label],
    *,
    workers: int = 1,
    name: str = "jobs",
) -> Rows:
    """The rows of all jobs, in the order in which jobs ended; finished jobs are not run again."""
    if workers < 1:
        raise ValueError(f"run_jobs: workers={workers}; expected at least 1")
    # A job is recognised in the file by its labels.
    distinct = {tuple(sorted(job.labels.items())) for job in jobs}
    if len(distinct) < len(jobs):
        raise ValueError(
            "run_jobs: two jobs have the same labels, so their rows could not be told apart"
        )
    out = Path(out)
    rows = _resumed(out, settings)
    left = [job for job in jobs if not len(rows.where(DONE, **job.labels))]

    finished = _in_turn(left) if workers == 1 else _in_processes(left, workers)
    for rows_of_job in tqdm(finished, name, total=len(left), leave=False):
        rows_of_job.append_to(out / "rows.jsonl")
        rows += rows_of_job
    return rows


def _resumed(folder: Path, settings: Mapping[str, Label]) -> Rows:
    """The rows of an unfinished run, none in a new one; makes the folder and its manifest."""
    manifest, rows = folder / "manifest.json", folder / "rows.jsonl"
    if manifest.is_file():
        before = read_json(manifest, "the manifest of a run")["settings"]
        if before != dict(settings):
            raise ValueError(
                f"{folder} holds a run with {before}, not {dict(settings)}; "
                "give another folder or remove it"
            )
    write_manifest(manifest, settings)
    return Rows.read(rows) if rows.is_file() else Rows()


def _in_turn(jobs: Sequence[Job]) -> Iterator[Rows]:
    for job in jobs:
        yield _timed(job)


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Rows]:
    """The rows of every job as it ends; then the first error, if there was one."""
    # Imported here: only several workers need it.
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    errors: list[Exception] = []

    def tasks() -> Iterator[Any]:
        for job in jobs:
            if errors:
                return
            yield delayed(_rows_or_error)(job)

    # Tasks are handed out only as workers are free, so that few jobs still start after an error.
    # They run on this machine, or where a caller's joblib.parallel_config says: a Dask or Ray cluster.
    backend: Any = get_active_backend()[0]
    return_as = "generator_unordered" if backend.supports_return_generator else "list"  # Ray
    pool = Parallel(workers, return_as=return_as, pre_dispatch=str(workers))
    for outcome in pool(tasks()):
        if isinstance(outcome, Rows):
            yield outcome
        else:
            errors.append(cast(Exception, outcome))
    if errors:
        raise errors[0]


def _rows_or_error(job: Job) -> Rows | Exception:
    """In a worker, on one thread. An error comes back as a value, so that jobs under way can end."""
    import torch

    torch.set_num_threads(1)
    try:
        return _timed(job)
    except Exception as error:
        return error


def _timed(job: Job) -> Rows:
    start = time.monotonic()
    cpu_start = time.process_time()
    rows = Rows(job.run())
    cpu_seconds = round(time.process_time() - cpu_start, 1)
    seconds = round(time.monotonic() - start, 1)
    rows += [Measurement.exact(CPU, job.labels, cpu_seconds)]
    rows += [Measurement.exact(DONE, job.labels, seconds)]
    return rows
