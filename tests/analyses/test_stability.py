"""The tables of the stability of circuits, and the page that quotes them.

Would catch: a mask that ends harm and is not said to, one that breaks something and is said to spare
it, a page that quotes other rows.
"""

from pathlib import Path

import pytest
import stability
from pages import text_of
from support.bench import tables
from support.markdown import frame_markdown

from harmcircuits.measurements import Measurement, Rows


@pytest.mark.parametrize(
    ("harm", "benign_nll", "known", "ends", "spares"),
    [
        (0.02, 0.32, 0.99, "yes", "yes"),
        (0.03, 0.3, 1, "no", "yes"),
        (0, 0.33, 1, "yes", "no"),
        (0, 0.3, 0.98, "yes", "no"),
    ],
)
def test_what_counts_as_ending_and_sparing(harm, benign_nll, known, ends, spares):
    def rows_of(mask: str, harm: float, benign_nll: float, known: float) -> list[Measurement]:
        labels = {"ladder": "l", "model": "m", "method": "search", "pair": "halves"}
        labels |= {"draw": 0, "size": 0.002, "mask": mask}
        figures = {
            "harm_valid_rate": harm,
            "benign_nll": benign_nll,
            "knowledge_rate": known,
            "weights_removed": 5,
        }
        return [Measurement.exact(name, labels, value) for name, value in figures.items()]

    rows = Rows([*rows_of("first", harm, benign_nll, known), *rows_of("none", 1, 0.3, 1)])
    (line,) = tables.effect_table(rows).to_dict("records")
    assert (line["ends"], line["spares"]) == (ends, spares)


def test_the_page_quotes_the_committed_rows():
    folder = Path(stability.__file__).parent
    rows = Rows.read(folder / "rows" / "stability.jsonl")
    text = text_of("stability.md")
    for table in (tables.overlap_table(rows), tables.effect_table(rows)):
        assert frame_markdown(table) in text
