"""Less tidy versions of the compiled organisms, the last pass, and the committed tables.

Would catch: a version that answers otherwise, a pass that trades one behaviour for another.
"""

import compiled
import pytest
from pages import ROOT, text_of
from support import compiled_tables as tables
from support.compiled import VERSIONS, truth_of, version_of
from support.markdown import frame_markdown
from support.removal import Texts, last_pass, mean_losses

from harmcircuits.measurements import Rows
from harmcircuits.organisms.compiled import true_circuits

ROWS = Rows.read(ROOT / "analyses" / "rows" / "compiled.jsonl")


@pytest.mark.parametrize("name", [name for name in vars(tables) if name.endswith("_table")])
def test_a_table_of_the_page_is_that_of_the_rows(name):
    text = text_of("compiled.md") + text_of("log/compiled.md")
    assert frame_markdown(getattr(tables, name)(ROWS)) in text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_right_answers(version):
    model = version_of("shared-head", version)
    assert Texts.of(model, every_string=True).are_right(model.bridge)


def test_a_last_pass_removes_what_only_harm_needs_and_returns_what_nobody_does():
    model = version_of("nested", "as compiled")
    harm, benign, recognition = true_circuits(model.name, model.bridge).values()

    def some(mask):
        return [(name, int(place)) for name, index in mask.removed.items() for place in index][:3]

    alone, shared = some(harm - benign - recognition)[:1], some(harm & benign)
    nobodys = some(~(harm | benign | recognition))
    losses = mean_losses(model.calibrations())
    done = last_pass(model.bridge, losses, nobodys, [*shared, *alone])
    assert done.grown == [*nobodys, *alone] and done.removed == alone
    assert done.n_passes == 2 + 4 + 4
    assert Texts.of(model).are_right(model.bridge)  # as it was


@pytest.mark.slow
def test_scores_are_those_of_the_table():
    labels = {"organism": "shared-head", "version": "as compiled"}
    model = version_of(*labels.values())
    scores = compiled.scores_of(model, model.calibrations())
    for row in compiled.scored(model, truth_of(model, "as compiled"), scores, labels):
        assert row.mean == pytest.approx(ROWS.one(row.metric, **row.labels).mean, abs=0.01)
