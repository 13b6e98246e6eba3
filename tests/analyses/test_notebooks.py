"""Every analysis of a claim runs as a notebook: from the committed rows, and from scratch.

Would catch: a cell that needs a command line, a name that an earlier cell no longer defines, rows
that are committed but can no longer be judged, a figure that a notebook would not show.
"""

import re
from importlib import import_module

import jupytext
import pytest
from helpers import ANALYSES
from nbclient import NotebookClient

TEXTS = {path.stem: path.read_text() for path in sorted(ANALYSES.glob("*.py"))}
CLAIMS = [name for name, text in TEXTS.items() if re.search(r"^claim = Claim\(", text, re.M)]


@pytest.mark.parametrize("name", CLAIMS)
def test_committed_rows_are_judged_and_shown(name):
    """As in a notebook, without a kernel."""
    module = import_module(name)
    assert len(module.claim.result(module.rows).key_numbers)
    assert module.claim.figures


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_it_runs_from_scratch_as_a_notebook(name, monkeypatch):
    assert TEXTS[name].count("claim.rows()") == 1
    text = TEXTS[name].replace("claim.rows()", "claim.rows(small=True)")
    notebook = jupytext.reads(text, "py:percent")
    monkeypatch.setenv("PYTHONPATH", str(ANALYSES.parent), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the models are tiny, and the workers are two
    place = {"metadata": {"path": str(ANALYSES)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/svg+xml", "text/html"} <= kinds, "a figure and a table"
