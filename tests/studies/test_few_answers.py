"""Circuits that were scored on few answers: said by the search, its trace and the verdict.

Would catch: a circuit of seven answers that reads like one of seven hundred; a warning that is always
there; one about a behaviour that the search did not use.
"""

from dataclasses import replace

import pytest
from helpers import small_model

from harmcircuits.behaviours.calibration import FEW_ANSWERS
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.summary import Terms, _warnings


def test_the_search_warns_and_its_trace_counts():
    model = small_model("sft", every=32)
    n_verified = model.calibration("harmful").n_verified
    assert 0 < n_verified < FEW_ANSWERS
    with pytest.warns(UserWarning, match=rf"find_circuit: .* harmful {n_verified}"):
        mask = model.find_circuit("harmful", protect=(), size=0.001, steps=1, renew=False)
    assert mask.trace.one("examples_scored", data="target").mean == n_verified


def test_the_verdict_says_so():
    counts = {"harmful": 7, "benign": 64, "refusal": 3, "knowledge": 2}
    rows = Rows(
        Measurement.exact("calibration_examples", {"behaviour": name}, number)
        for name, number in counts.items()
    )
    (warning,) = _warnings(rows, replace(Terms.standard(), protected=("benign", "refusal")))
    assert "harmful 7, refusal 3;" in warning
    assert "knowledge" not in warning, "it is not protected"
