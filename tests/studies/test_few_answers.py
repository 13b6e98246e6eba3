"""Circuits that were scored on few answers: said by the search, its trace, the verdict and the card.

Would catch: a circuit of seven answers that reads like one of seven hundred; a warning that is always
there; one about a behaviour that the search did not use.
"""

import warnings
from types import SimpleNamespace

import pytest
from helpers import random_batch, small_model

from harmcircuits.behaviours.calibration import FEW_ANSWERS, few_answers
from harmcircuits.hooks.search import find_circuit
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.summary import _warnings


def test_only_behaviours_below_the_bound_are_named():
    assert few_answers({"harmful": FEW_ANSWERS, "benign": 300}) == ""
    text = few_answers({"harmful": FEW_ANSWERS - 1, "benign": 300, "refusal": 1})
    assert "harmful 19, refusal 1;" in text


def test_the_search_warns_and_its_trace_counts():
    model = small_model("sft", every=32)
    n_verified = model.calibration("harmful").n_verified
    assert 0 < n_verified < FEW_ANSWERS
    with pytest.warns(UserWarning, match=rf"find_circuit: .* harmful {n_verified}"):
        mask = model.find_circuit("harmful", protect=(), size=0.001, steps=1, renew=False)
    assert mask.trace.one("examples_scored", data="target").mean == n_verified


def test_enough_answers_are_counted_and_not_warned_of(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = find_circuit(
            llama, [random_batch(24)], protect={"kept": [random_batch(6)]}, size=0.01, steps=1
        )
    counts = {row.labels["data"]: row.mean for row in mask.trace.where("examples_scored")}
    assert counts == {"target": 24, "kept": 4}, "of three requests two are priced"


@pytest.mark.usefixtures("unchecked")
def test_the_verdict_says_so():
    rows = Rows()
    for name, number in {"harmful": 7, "benign": 64, "refusal": 3, "knowledge": 2}.items():
        rows += [Measurement.exact("calibration_examples", {"behaviour": name}, number)]
    target = SimpleNamespace(name="harmful", metrics={})
    terms = SimpleNamespace(target=target, protected=("benign", "refusal"))
    (warning,) = _warnings(rows, terms)  # pyright: ignore[reportArgumentType]
    assert "harmful 7, refusal 3;" in warning
    assert "knowledge" not in warning, "it is not protected"
