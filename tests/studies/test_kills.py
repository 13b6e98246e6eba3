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
SETTINGS = StudySettings(sizes=(0.004,), steps=6, budget=1.0, tolerance=1.0, n_random=1)

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
    folder = tmp_path / "killed"
    folder.mkdir()
    for _ in range(N_KILLS):
        _begin_and_kill(run, folder, draw.uniform(0, seconds))
    run(folder)
    assert result(folder) == expected


def _begin_and_kill(run: Callable[[Path], Any], folder: Path, after: float) -> None:
    """Begin the work in a child, and kill it where it has not ended by then."""
    child = os.fork()
    if not child:
        try:
            run(folder)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # of one that has ended, nothing
    os.waitpid(child, 0)
