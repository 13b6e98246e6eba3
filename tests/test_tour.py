"""The tour runs as a notebook, and every cell shows something.

Would catch: a cell that no longer runs, that shows nothing, or needs the repository; a mask under
which the answer stays; an edit that outlives its cell.
"""

import re

import jupytext
import pytest
from nbclient import NotebookClient
from pages import DOCS, ROOT

TOUR = DOCS / "tour.py"


def text_of(cell) -> str:
    """The text that a cell prints, and its value as text or by its kinds; without bars."""
    text = ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            text += output.text
        elif output.output_type in ("execute_result", "display_data"):
            text += output.data.get("text/plain", " ".join(output.data))
    return text


@pytest.mark.slow
def test_every_cell_shows_something_and_the_edit_takes_harm_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    notebook = jupytext.read(TOUR, fmt="py:percent")
    place = {"metadata": {"path": str(DOCS)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 12 <= len(cells) <= 18
    for cell in cells:
        assert text_of(cell).strip(), cell.source
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png", "image/svg+xml"} <= kinds

    unpruned, masked, restored = re.findall(r"-> (.*)", text_of(cells[1]))
    assert unpruned == restored != masked, "the second cell edits the model and undoes it"
    # The third holds a table of rates: the circuit, then no mask.
    rates = dict(re.findall(r"^(\w+)\s+(\d+)%.*?\]\s+\d+%", text_of(cells[2]), flags=re.M))
    assert int(rates["harm_valid_rate"]) <= 20
    assert int(rates["benign_valid_rate"]) >= 95
    assert int(rates["refusal_rate"]) >= 95
