"""The comparison of circuits, and the page's table of it.

Would catch: a table that its rows do not give, a model whose rows are lost, words without their
figures.
"""

import pytest
from helpers import analysis
from pages import markdown, text_of

from harmcircuits.measurements import Rows
from harmcircuits.studies.shared_table import shared_table

shared = analysis("shared_circuits")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return shared.claim.rows()


def test_the_page_holds_the_table_that_the_rows_give(rows):
    table = shared_table(rows, shared.TASKS, shared.PROTECTED)
    assert markdown(table) in text_of("results.md")


def test_every_rung_can_do_harm_and_has_a_circuit_of_it_both_ways(rows):
    models = rows.by("model")
    assert set(models) == set(shared.claim.models)
    for of_model in models.values():
        assert of_model.one("harm_valid_rate", mask="none").mean >= 0.9
        for protected in shared.PROTECTED:
            assert of_model.one("harm_valid_rate", mask="harmful", protected=protected)


def test_words_name_the_lift_of_the_twin(rows):
    for of_model in rows.by("model").values():
        twin = of_model.one("overlap_lift", first="harmful", second="benign", selection="one shot")
        assert f"share {twin:.1f} times" in shared.words(of_model)
