"""The picture of real models has every mask whose answers were read, and none that is wanted.

Would catch: a mask left out, an answer under another beginning in place of the usual one, and a
sentence beside the picture that new rows make wrong.
"""

import frontier_figure
import pytest

from harmcircuits.measurements import Rows

POINTS = [pair for pairs in frontier_figure.points().values() for pair in pairs]


@pytest.mark.parametrize("name", frontier_figure.FILES)
def test_every_mask_that_was_read_under_the_usual_beginning_is_there_once(name):
    rows = Rows.read(frontier_figure.ROWS / f"{name}.jsonl").where(frontier_figure.HARM)
    read = [row for row in rows if "opening" not in row.labels and row.labels["mask"] != "none"]
    drawn = [(rate, cost) for rate, cost in POINTS if rate in read]
    assert sorted(str(rate.labels["mask"]) for rate, _ in drawn) == sorted(
        str(rate.labels["mask"]) for rate in read
    )
    for rate, cost in drawn:
        assert cost.labels["mask"] == rate.labels["mask"]


def test_none_stands_where_a_mask_is_wanted():
    for rate, cost in POINTS:
        assert rate.mean > frontier_figure.WANTED or cost.mean > frontier_figure.BUDGET
