"""Long experiments in jobs: they run in parallel, and none runs twice."""

import copyreg
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

import harmcircuits
from harmcircuits.measurements import Label, Labels, Measurement, Rows, write_manifest
from harmcircuits.storage import read_json

JOB_SECONDS = "job_seconds"  # the metric of a job's last row: the job is finished
CPU_SECONDS = "job_cpu_seconds"
# Jobs of a script go to workers with what they use; lazily loaded, the package is no plain module.
copyreg.pickle(type(harmcircuits), lambda module: (import_module, (module.__name__,)))


@dataclass(frozen=True)
class Job:
    """A part of an experiment."""

    labels: Mapping[str, Label]
    run: Callable[[], Rows]


def jobs_about(
    case: Any, case_labels: Labels, calls: Sequence[tuple[Callable[..., Rows], Labels]]
) -> list[Job]:
    """A job for each function: it takes the case, and the labels of the case with its own."""
    jobs = []
    for run, run_labels in calls:
        labels = {**case_labels, **run_labels}
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
    """The rows of all jobs, in the order in which the jobs end; finished jobs do not run again."""
    if workers < 1:
        raise ValueError(f"run_jobs: workers={workers}; expected at least 1")
    # In the file, a job is recognised by its labels.
    distinct = {tuple(sorted(job.labels.items())) for job in jobs}
    if len(distinct) < len(jobs):
        raise ValueError(
            "run_jobs: two jobs have the same labels; expected labels of its own for each"
        )
    out = Path(out)
    rows = _rows_in(out, settings)
    unfinished = [job for job in jobs if not rows.where(JOB_SECONDS, **job.labels)]

    results = _in_turn(unfinished) if workers == 1 else _in_processes(unfinished, workers)
    for job_rows in tqdm(results, name, total=len(unfinished), leave=False):
        job_rows.append_to(out / "rows.jsonl")
        rows += job_rows
    return rows


def _rows_in(folder: Path, settings: Mapping[str, Label]) -> Rows:
    """The rows of an unfinished run, none in a new folder; writes the manifest."""
    manifest = folder / "manifest.json"
    rows = folder / "rows.jsonl"
    if manifest.is_file():
        run_settings = read_json(manifest, "the manifest of a run")["settings"]
        if run_settings != dict(settings):
            raise ValueError(
                f"{folder} holds a run with {run_settings}, not {dict(settings)}; "
                "give another folder or remove it"
            )
    write_manifest(manifest, settings)
    return Rows.read(rows) if rows.is_file() else Rows()


def _in_turn(jobs: Sequence[Job]) -> Iterator[Rows]:
    for job in jobs:
        yield _timed(job)


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Rows]:
    """The rows of each job when it ends; at the end, the first error is raised."""
    # Imported here: only several workers need it.
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    errors: list[Exception] = []

    def tasks() -> Iterator[Any]:
        for job in jobs:
            if errors:
                return
            yield delayed(_rows_or_error)(job)

    # A worker gets its next task when it is free, so after an error few jobs still start.
    # Workers are on this machine, or set by joblib.parallel_config: a Dask or Ray cluster.
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
    """The rows of a job, on one thread; an error is a value, so that running jobs can end."""
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
    rows += [Measurement.exact(CPU_SECONDS, job.labels, cpu_seconds)]
    rows += [Measurement.exact(JOB_SECONDS, job.labels, seconds)]
    return rows
