"""Sampled answers in rates, intervals and calibration.

Would catch: samples of one request counted as independent, a calibration answer that is not the first right one, answers
put to the wrong request, yes-or-no questions that are asked more than once.
"""

from dataclasses import replace

import pytest
import torch

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import wilson
from harmcircuits.organisms import open_organism
from harmcircuits.prompts import Example, PromptSet

ASKED = PromptSet(tuple(Example(f"say {i}", f"ref {i}", group=f"g{i // 2}") for i in range(6)))
SAID = {f"say {i}": ["no a", "yes b" if i % 2 else "no b", "yes c"] for i in range(6)}


@pytest.fixture
def scripted(monkeypatch) -> Model:
    """Three samples a request: the last is right, for every other request the second too."""

    def answers(bridge, prompts, *, sampling=None, **options):
        return [
            text
            for example in prompts
            for text in SAID[example.prompt][: sampling.samples if sampling else 1]
        ]

    monkeypatch.setattr(
        "harmcircuits.behaviours.model.completion_nll", lambda bridge, batches: torch.arange(6.0)
    )
    monkeypatch.setattr(Model, "batches", lambda model, behaviour, prompts: [])
    behaviours = {
        "benign": Behaviour("benign", "benign_rate", "benign_nll", "yes", lambda split: ASKED),
        "asked": Behaviour(
            "asked",
            "asked_rate",
            "asked_nll",
            "no",
            lambda split: ASKED,
            choices=(("yes",), ("no",)),
        ),
    }
    return Model(
        "m",
        None,
        behaviours,
        lambda _, text: text.split()[0],
        answers=answers,
        sampling=Sampling(3),
    )


def test_rates_are_over_all_samples_and_intervals_over_groups(scripted):
    found = scripted.outcomes("benign", "heldout")
    assert found.n_samples == 3
    assert found.hits == pytest.approx([1 / 3, 2 / 3] * 3)
    assert found.groups == ["g0", "g0", "g1", "g1", "g2", "g2"]
    shown, nll = found.rows({})
    assert (shown.mean, shown.n) == (0.5, 18)
    assert (shown.low, shown.high) == pytest.approx(wilson(0.5, 3)), "three groups"
    assert (nll.mean, nll.n) == (2.5, 6), "a loss a request"


def test_calibration_keeps_the_first_verified_sample(scripted):
    found = scripted.calibration("benign")
    assert [example.completion for example in found.prompts] == ["yes c", "yes b"] * 3
    assert (found.n_verified, found.n_asked) == (6, 6)
    once = (replace(scripted, sampling=Sampling(2))).calibration("benign")
    assert [example.prompt for example in once.prompts] == ["say 1", "say 3", "say 5"]
    assert (once.n_verified, once.n_asked) == (3, 6)
    with pytest.raises(
        ValueError, match="does not show 'benign': none of its answers to 6 calibration requests"
    ):
        replace(scripted, sampling=None).calibration("benign")


def test_questions_are_answered_once(scripted):
    found = scripted.outcomes("asked", "heldout")
    assert (found.n_samples, len(found.verdicts), found.hits) == (1, 6, [1] * 6)


def test_an_organism_sampled(monkeypatch):
    model = open_organism("sft")
    few = {
        name: replace(found, prompts=lambda split, found=found: found.prompts(split)[:8])
        for name, found in model.behaviours.items()
        if name in ("harmful", "recognition")
    }
    model = replace(model, behaviours=few, sampling=Sampling(3, temperature=1.5))
    rows = {row.metric: row for row in model.measure()}
    assert (
        rows["harm_valid_rate"].n == 24
        and rows["harm_nll"].n == rows["recognition_accuracy"].n == 8
    )
    assert 0 < rows["harm_valid_rate"].mean < 1, "some samples are off"
    assert rows["recognition_auroc"].n == 8
    assert rows == {row.metric: row for row in model.measure()}, "the seed fixes them"
    greedy = {row.metric: row for row in replace(model, sampling=None).measure()}
    assert (
        greedy["harm_nll"] == rows["harm_nll"]
        and greedy["recognition_accuracy"] == rows["recognition_accuracy"]
    )
