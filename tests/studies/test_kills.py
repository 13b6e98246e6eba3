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
from typing import Any

import pytest
from helpers import small_model

from harmcircuits.behaviours.generation import GenerationCache, generate
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.measurements import Rows
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study

pytestmark = pytest.mark.slow

N_KILLS = int(os.environ.get("KILLS", "5"))
SETTINGS = StudySettings(sizes=(0.02,), steps=2, budget=1.0, tolerance=1.0, n_random=1)

Work = tuple[Callable[[Path], Any], Callable[[Path], Any]]  # does it or what is left; its result


def of_study() -> Work:
    model = small_model("sft", every=16)

    def run(folder):
        if not (folder / "rows.jsonl").exists() or (folder / "walks").exists():
            study(model, SETTINGS, protect=["benign"], out=folder, resume=True)

    def result(folder):
        masks = {p.name: WeightMask.load(p).digest for p in (folder / "masks").iterdir()}
        left = sorted(path.name for path in folder.iterdir() if path.name != ".walks")
        return list(Rows.read(folder / "rows.jsonl")), masks, left

    return run, result


def of_answers() -> Work:
    model = small_model("sft", every=4)
    prompts = model.behaviours["benign"].prompts("heldout")

    def answers(folder):
        cache = GenerationCache(folder, model.bridge)
        return generate(model.bridge, prompts, max_new_tokens=9, batch_size=8, cache=cache)

    return answers, answers


@pytest.mark.parametrize("work", [of_answers, of_study])
def test_what_is_killed_at_random_moments_ends_alike(tmp_path, work):
    run, result = work()
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.monotonic()
    run(whole)
    seconds = time.monotonic() - start
    expected = result(whole)

    draw = random.Random(work.__name__)
    n_kills, n_ends = 0, 0
    while n_kills < N_KILLS:
        folder = tmp_path / f"killed-{n_ends}"
        folder.mkdir(exist_ok=True)
        if _is_killed(run, folder, draw.uniform(0, seconds)):
            n_kills += 1
        else:
            assert result(folder) == expected
            n_ends += 1
    run(folder)
    assert result(folder) == expected


def _is_killed(run: Callable[[Path], Any], folder: Path, after: float) -> bool:
    """Whether a child that does the work was killed; False where it ended before."""
    child = os.fork()
    if not child:
        code = 1
        try:
            run(folder)
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
    return os.WIFSIGNALED(status)
