"""Jobs run once, in one process or several, and keep their rows.

Would catch: a finished job run again, a failed one counted as done, rows lost between processes.
"""

from functools import partial
from pathlib import Path

import pytest
from support.jobs import DONE, Job, run_jobs

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
    assert not Rows.read(out / "rows.jsonl").where(DONE, number=13)

    rows = run_jobs(out, jobs(tmp_path, [2, 3, 4]), {"a": 1}, workers=workers)
    squares = {row.labels["number"]: row.mean for row in rows.where("square")}
    assert squares == {2: 4, 3: 9, 4: 16}
    assert Rows.read(out / "rows.jsonl") == rows
    assert sorted((tmp_path / "calls").read_text().split(), key=int) == ["2", "3", "4", "13"]
