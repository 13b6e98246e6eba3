"""The test of double dissociation on hand-made rates.

Would catch: an outcome from points instead of intervals, a loss that both abilities share called one.
"""

import pytest
from support.dissociation import dissociation

from harmcircuits.measurements import Measurement


def rates(metric: str, *n_hits: int) -> list[Measurement]:
    """Of 64: unpruned, under the own circuit, under the other's."""
    return [
        Measurement.rate(metric, {}, [number < n for number in range(64)], range(64))
        for n in n_hits
    ]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ((64, 0, 64), (64, 0, 64), "clean double"),
        ((64, 0, 50), (64, 10, 64), "graded double"),
        ((64, 0, 64), (64, 30, 30), "single"),
        ((64, 60, 64), (64, 62, 64), "none"),
        # Nothing is lost, but 40 of 64 is too uncertain to be called spared.
        ((40, 0, 40), (64, 20, 64), "graded double"),
    ],
)
def test_outcomes(first, second, outcome):
    assert dissociation(rates("a", *first), rates("b", *second)).outcome == outcome
