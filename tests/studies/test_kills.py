"""Long work killed at random moments (SIGKILL) goes on and ends with the same rows, masks, answers.

Would catch: a row lost or written twice, half a file that is read or that stops the next run, a
search that starts again or that goes another way. Each child is forked from this process, so that
the model is opened once. Twin: the same work, not killed.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import small_model
from support.jobs import CPU, DONE, Job, run_jobs

from harmcircuits.behaviours.generation import GenerationCache, generate
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.search import find_circuit
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study

pytestmark = pytest.mark.slow

N_KILLS = int(os.environ.get("KILLS", "5"))
SETTINGS = StudySettings(sizes=(0.02,), steps=2, budget=1.0, tolerance=1.0, n_random=1)


class Work(NamedTuple):
    """Something that goes on where it was interrupted.

    Attributes:
        run: does it, or what is left of it, in a folder.
        result: what is in the folder at its end, in a form that can be compared.
    """

    run: Callable[[Path], Any]
    result: Callable[[Path], Any]


def of_study() -> Work:
    model = small_model("sft", every=16)

    def run(folder):
        if not (folder / "rows.jsonl").exists() or (folder / "walks").exists():
            study(model, SETTINGS, protect=["benign"], out=folder, resume=True)

    def result(folder):
        masks = {p.name: WeightMask.load(p).digest for p in (folder / "masks").iterdir()}
        left = sorted(path.name for path in folder.iterdir())
        return list(Rows.read(folder / "rows.jsonl")), masks, left

    return Work(run, result)


def of_search() -> Work:
    model = small_model("sft", every=16)
    harm, benign = (model.calibration(name).batches for name in ("harmful", "benign"))

    def run(folder):
        options = {"size": [0.005, 0.01], "steps": 5, "folder": folder / "walk"}
        masks = find_circuit(model.bridge, harm, [benign], **options)
        for number, mask in enumerate(masks):
            mask.save(folder / f"{number}.safetensors")

    def result(folder):
        masks = [WeightMask.load(path) for path in sorted(folder.glob("*.safetensors"))]
        return [(mask.digest, mask.source, mask.trace) for mask in masks]

    return Work(run, result)


def of_jobs() -> Work:
    def job(number):
        time.sleep(0.01)
        labels = {"number": number}
        return Rows([Measurement.exact("m", {**labels, "k": k}, k * number) for k in range(400)])

    jobs = [Job({"number": number}, lambda number=number: job(number)) for number in range(12)]

    def result(folder):
        rows = Rows.read(folder / "rows.jsonl")
        return [row for row in rows if row.metric not in (DONE, CPU)], len(rows)

    return Work(lambda folder: run_jobs(folder, jobs, {"a": 1}), result)


def of_answers() -> Work:
    model = small_model("sft", every=4)
    prompts = model.behaviours["benign"].prompts("heldout")

    def answers(folder):
        cache = GenerationCache(folder, model.bridge)
        return generate(model.bridge, prompts, max_new_tokens=9, batch_size=8, cache=cache)

    return Work(answers, answers)


@pytest.mark.parametrize("work", [of_jobs, of_answers, of_search, of_study])
def test_what_is_killed_at_random_moments_ends_alike(tmp_path, work):
    task = work()
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.monotonic()
    task.run(whole)
    seconds = time.monotonic() - start
    expected = task.result(whole)

    draw = random.Random(work.__name__)
    n_kills, n_ends = 0, 0
    while n_kills < N_KILLS:
        folder = tmp_path / f"killed-{n_ends}"
        folder.mkdir(exist_ok=True)
        if _is_killed(task, folder, draw.uniform(0, seconds)):
            n_kills += 1
        else:
            assert task.result(folder) == expected
            n_ends += 1
    task.run(folder)
    assert task.result(folder) == expected
    print(f"{work.__name__}: {n_kills} kills, {n_ends + 1} ends, all alike ({seconds:.1f} s whole)")


def _is_killed(task: Work, folder: Path, after: float) -> bool:
    """Whether a child that does the work was killed; False where it ended before."""
    child = os.fork()
    if not child:
        code = 1
        try:
            task.run(folder)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "the work that was resumed failed"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the work that was resumed failed"
    return os.WIFSIGNALED(status)
