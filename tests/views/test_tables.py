"""Figures as text.

Would catch: a scale or a sign that is lost, an interval of another figure.
"""

from harmcircuits.measurements import Measurement
from harmcircuits.views.tables import percent, points, to_places


def test_figures_carry_their_intervals():
    row = Measurement("x", {}, -0.034, -0.061, 0.012)
    assert percent(row) == "-3 % [-6, 1]"
    assert points(row) == "-3 points [-6, 1]"
    assert to_places(row, 2) == "-0.03 [-0.06, 0.01]"
