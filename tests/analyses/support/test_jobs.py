"""Jobs run once, in one process or several, and keep their rows.

Would catch: a finished job run again, a failed one counted as done, rows lost between processes.
"""

from functools import partial
from pathlib import Path

import pytest
from support.jobs import CPU, DONE, Job, run_jobs

from harmcircuits.measurements import Measurement, Rows


def square(folder: Path, number: int) -> Rows:
    with (folder / "calls").open("a") as file:
        file.write(f"{number}\n")
    if number == 13:
        raise RuntimeError("thirteen")
    return Rows([Measurement.exact("square", {"number": number}, number**2)])


def jobs(folder: Path, numbers: list[int]) -> list[Job]:
    return [Job({"number": number}, partial(square, folder, number)) for number in numbers]


def calls(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "calls").read_text().split())


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_runs_once(tmp_path, workers):
    out = tmp_path / "run"
    run_jobs(out, jobs(tmp_path, [2, 3]), {"a": 1}, workers=workers)
    rows = run_jobs(out, jobs(tmp_path, [2, 3, 4]), {"a": 1}, workers=workers)
    assert isinstance(rows, Rows)
    squares = {row.labels["number"]: row.mean for row in rows.where("square")}
    assert squares == {2: 4, 3: 9, 4: 16}
    assert calls(tmp_path) == [2, 3, 4]
    assert Rows.read(out / "rows.jsonl") == rows
    for metric in (DONE, CPU):
        assert {row.labels["number"] for row in rows.where(metric)} == {2, 3, 4}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_job_is_not_done_and_the_others_are_kept(tmp_path, workers):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="thirteen"):
        run_jobs(out, jobs(tmp_path, [2, 13]), {}, workers=workers)
    rows = Rows.read(out / "rows.jsonl")
    assert rows.one("square", number=2).mean == 4
    assert not rows.where(DONE, number=13)
    with pytest.raises(RuntimeError, match="thirteen"):
        run_jobs(out, jobs(tmp_path, [2, 13]), {}, workers=1)
    assert calls(tmp_path) == [2, 13, 13]
