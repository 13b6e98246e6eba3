"""Less tidy versions of the compiled organisms, and the committed scores.

Would catch: a version that answers otherwise, a score that changed.
"""

import compiled
import pytest
from blocks import committed
from support.compiled import VERSIONS, truth_of, version_of
from support.removal import Texts


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_right_answers(version):
    model = version_of("shared-head", version)
    assert Texts.of(model, every_string=True).are_right(model.bridge)


@pytest.mark.slow
def test_scores_are_those_of_the_table():
    labels = {"organism": "shared-head", "version": "as compiled"}
    model = version_of(*labels.values())
    scores = compiled.scores_of(model, model.calibrations())
    for row in compiled.score_rows(model, truth_of(model, "as compiled"), scores, labels):
        expected = committed("compiled").one(row.metric, **row.labels).mean
        assert row.mean == pytest.approx(expected, abs=0.01)
