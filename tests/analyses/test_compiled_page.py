"""Less tidy versions of the compiled organisms, and the committed tables.

Would catch: a version that answers otherwise, a table that is not of its rows.
"""

import compiled
import pytest
from pages import ROOT, text_of
from support import compiled_tables as tables
from support.compiled import VERSIONS, truth_of, version_of
from support.markdown import frame_markdown
from support.removal import Texts

from harmcircuits.measurements import Rows

ROWS = Rows.read(ROOT / "analyses" / "rows" / "compiled.jsonl")


@pytest.mark.parametrize("name", [name for name in vars(tables) if name.endswith("_table")])
def test_a_table_of_the_page_is_that_of_the_rows(name):
    text = text_of("compiled.md") + text_of("log/compiled.md")
    assert frame_markdown(getattr(tables, name)(ROWS)) in text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_right_answers(version):
    model = version_of("shared-head", version)
    assert Texts.of(model, every_string=True).are_right(model.bridge)


@pytest.mark.slow
def test_scores_are_those_of_the_table():
    labels = {"organism": "shared-head", "version": "as compiled"}
    model = version_of(*labels.values())
    scores = compiled.scores_of(model, model.calibrations())
    for row in compiled.scored(model, truth_of(model, "as compiled"), scores, labels):
        assert row.mean == pytest.approx(ROWS.one(row.metric, **row.labels).mean, abs=0.01)
