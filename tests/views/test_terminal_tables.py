"""Tables of a terminal of 80 columns: nothing is cut, every figure is whole.

Would catch: an ellipsis, a line that a terminal would break, a figure or a word of a title in two
parts, a part of a table that does not say whose figures it has, a column that is left out.
"""

import re
from io import StringIO

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.summary import Terms, result_tables
from harmcircuits.views.tables import NAME_WIDTH, TextTable, frame_table, text_table

WIDTH = 80


def shown(table: TextTable, width: int = WIDTH) -> str:
    terminal = StringIO()
    Console(width=width, file=terminal).print(table)
    return terminal.getvalue()


def refuse_cuts(text: str, width: int = WIDTH) -> None:
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def refuse_losses(table: TextTable, text: str) -> None:
    """Every figure in one piece, every word of a title and of a name."""
    for number, column in enumerate(table.columns):
        for word in str(column.header).split():
            assert word in text
        for cell in column.cells:
            pieces = [cell] if number >= table.n_names else str(cell).split()
            for piece in pieces:
                assert re.search(rf"(^|\s){re.escape(str(piece))}(\s|$)", text, flags=re.M), piece


def judged() -> Rows:
    """How well a judge of a long name tells four contrasts."""
    rows = []
    for contrast in ("all of them", "same topic", "explanations alone", "begun alike"):
        for split in ("calibration", "choice"):
            labels = {
                "judge": "meta-llama/Llama-Guard-3-8B",
                "contrast": contrast,
                "split": split,
                "requests": 1200,
                "used": "yes",
            }
            rows.append(Measurement("judge_auroc", labels, 0.9512, 0.9034, 0.9811))
    return Rows(rows)


@pytest.mark.parametrize("name", ["study_sft", "qwen_study", "smollm2_study"])
def test_a_study_fits(name):
    rows = Rows.read(FOLDER.parents[2] / "analyses" / "rows" / f"{name}.jsonl")
    tables = result_tables(rows + judged(), Terms.standard(["benign"]))
    assert len(tables) == 3
    for table in tables:
        assert isinstance(table, TextTable)
        refuse_cuts(shown(table))
        refuse_losses(table, shown(table))


def test_every_part_says_whose_figures_it_has():
    table = text_table("Rates", ["mask", *(f"ability {number}" for number in range(20))])
    table.add_row("search, only benign protected", *(f"{number}.5" for number in range(20)))
    text = shown(table)
    parts = text.strip().split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert "search, only benign protected" in part
    assert text.count("Rates") == 1
    assert len(shown(table, 400).strip().split("\n\n")) == 1, "one part where there is room"


def test_a_name_is_broken_between_words():
    name = "what a search adds up, in files under --max-memory"
    table = text_table("", ["", "memory"])
    table.add_row(name, "0.12 GiB")
    lines = [line[:NAME_WIDTH].strip() for line in shown(table).splitlines()]
    assert "what a search adds up, in" in lines and "files under --max-memory" in lines


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("abcdefgh", min_size=1, max_size=20), min_size=2, max_size=12),
    st.integers(60, 120),
)
def test_any_table_is_whole_at_any_width(cells, width):
    frame = pd.DataFrame([cells], columns=[f"{number} column" for number in range(len(cells))])
    table = frame_table(frame)
    refuse_cuts(shown(table, width), width)
    refuse_losses(table, shown(table, width))
