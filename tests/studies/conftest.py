"""One finished study, which every test of rows, masks, words and the page reads."""

from typing import NamedTuple

import pytest
import torch
from helpers import small_model

from harmcircuits.hooks.weights import named_weights
from harmcircuits.studies.run import Study
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study


class Finished(NamedTuple):
    """A study of a small `planted`, and the model's weights before it."""

    run: Study
    before: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    model = small_model("planted")
    weights = named_weights(model.bridge)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    grid = {"sizes": (0.004,), "steps": 10, "n_random": 1, "tolerance": 0.2}
    settings = StudySettings(protect=("benign", "knowledge"), **grid)
    out = tmp_path_factory.mktemp("study") / "run"
    return Finished(study(model, settings, out=out), before)
