"""Jobs run once, in one process or several, and keep their rows.

Would catch: a finished job run again, a failed one counted as done, rows lost between processes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from joblib import parallel_config
from support.jobs import JOB_SECONDS, Job, run_jobs

from harmcircuits.measurements import Measurement, Rows


def square(folder: Path, number: int) -> Rows:
    with (folder / "calls").open("a") as file:
        file.write(f"{number}\n")
    if number == 13:
        raise RuntimeError("thirteen")
    return Rows([Measurement.exact("square", {"number": number}, number**2)])


def jobs(folder: Path, numbers: list[int]) -> list[Job]:
    return [Job({"number": number}, partial(square, folder, number)) for number in numbers]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_job_runs_once_and_a_failed_one_is_not_done(tmp_path, workers):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="thirteen"):
        run_jobs(out, jobs(tmp_path, [2, 13]), {"a": 1}, workers=workers)
    assert not Rows.read(out / "rows.jsonl").where(JOB_SECONDS, number=13)

    rows = run_jobs(out, jobs(tmp_path, [2, 3, 4]), {"a": 1}, workers=workers)
    squares = {row.labels["number"]: row.mean for row in rows.where("square")}
    assert squares == {2: 4, 3: 9, 4: 16}
    assert Rows.read(out / "rows.jsonl") == rows
    assert sorted((tmp_path / "calls").read_text().split(), key=int) == ["2", "3", "4", "13"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_jobs_run_on_a_cluster(backend):
    """`pip install dask[distributed] ray`; each starts two workers on this machine."""
    jobs = [Job({"number": number}, partial(process, number)) for number in range(4)]
    with cluster(backend), parallel_config(backend), TemporaryDirectory() as out:
        rows = run_jobs(out, jobs, {}, workers=2).where("process")
    assert sorted(row.labels["number"] for row in rows) == [0, 1, 2, 3]
    assert os.getpid() not in [row.mean for row in rows]


def process(number: int) -> Rows:
    return Rows([Measurement.exact("process", {"number": number}, os.getpid())])


@contextmanager
def cluster(backend: str) -> Iterator[None]:
    if backend == "dask":
        distributed = pytest.importorskip("distributed")
        with distributed.LocalCluster(2, threads_per_worker=1) as local, local.get_client():
            yield
    else:
        ray = pytest.importorskip("ray")
        pytest.importorskip("ray.util.joblib").register_ray()
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": path})
        yield
        ray.shutdown()
