"""The comparison of circuits.

Would catch: a model whose rows are lost, numbers that are not those of the rows.
"""

import pytest
from helpers import analysis

from harmcircuits.measurements import Rows

shared = analysis("shared_circuits")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return shared.claim.rows()


def test_every_rung_can_do_harm_and_has_a_circuit_of_it_both_ways(rows):
    models = rows.by("model")
    assert set(models) == set(shared.claim.models)
    for of_model in models.values():
        assert of_model.one("harm_valid_rate", mask="none").mean >= 0.9
        for protected in shared.PROTECTED:
            assert of_model.one("harm_valid_rate", mask="harmful", protected=protected)


def test_key_numbers_hold_the_lift_of_the_twin(rows):
    numbers = shared.claim.result(rows).key_numbers.set_index("")
    for model, of_model in rows.by("model").items():
        twin = of_model.one("overlap_lift", first="harmful", second="benign", selection="one shot")
        assert numbers.loc["harmful and benign, lift", model] == f"{twin:.1f}"
