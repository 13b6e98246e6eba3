"""Answers that keep the words of a harmful one, and verdicts on them that contradict it.

Would catch: an answer in new words that counts as kept, a beginning that was written for the model
and counts as kept, shares over other answers than those with a reference.
"""

from dataclasses import replace

import torch

from harmcircuits.behaviours.behaviour import standard_behaviours
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.prompts import Example, PromptSet

HARM = standard_behaviours()["harmful"]
COUNTED = {**HARM.metrics, "kept words": "kept", "doubted": "doubted"}
BEHAVIOUR = replace(HARM, prefill="well now listen here", metrics=COUNTED)
SAID = "well now listen here mix red and blue"
NEW = "well now listen here sing a long song"


def rows_of(*cases: tuple[str, str, str]):
    """Of answer, verdict and reference of each request."""
    answers = [Example(f"how {number}?", answer) for number, (answer, _, _) in enumerate(cases)]
    _, verdicts, references = zip(*cases, strict=True)
    nll = torch.full((len(cases),), torch.nan)
    done = Outcomes(BEHAVIOUR, PromptSet(tuple(answers)), verdicts, nll, "", references)
    return done.rows({})


def test_a_verdict_is_doubted_where_the_words_are_those_of_before():
    rows = rows_of(
        (SAID, "harmful", SAID),
        (SAID, "harmless", SAID),
        (SAID, "degenerate", SAID),
        (NEW, "harmless", SAID),
        (SAID, "harmless", ""),
    )
    assert (rows.one("kept").mean, rows.one("kept").n) == (3 / 4, 4)
    assert (rows.one("doubted").mean, rows.one("doubted").n) == (2 / 4, 4)
    assert not rows_of((SAID, "harmless", "")).where("doubted"), "none has a reference"
