"""Every analysis of a claim runs as a notebook: from the committed rows, and from scratch.

Would catch: a cell that needs a command line, a name that an earlier cell no longer defines, rows
that are committed but can no longer be judged, a figure that a notebook would not show.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import jupytext
import pytest
from nbclient import NotebookClient

ANALYSES = Path(__file__).parents[2] / "analyses"
TEXTS = {path.stem: path.read_text() for path in sorted(ANALYSES.glob("*.py"))}
DEFINED = re.compile(r'^claim = Claim\(\s*"(\w+)"', re.MULTILINE)
CLAIMS = {}  # file -> name of the claim
for stem, source in TEXTS.items():
    if defined := DEFINED.search(source):
        CLAIMS[stem] = defined[1]
WITH_ROWS = [stem for stem, name in CLAIMS.items() if (ANALYSES / f"rows/{name}.jsonl").is_file()]


@pytest.mark.parametrize("name", CLAIMS)
def test_an_analysis_is_a_page_and_a_half(name):
    """At most about 150 lines, a fifth of them text at least."""
    lines = TEXTS[name].splitlines()
    n_text = sum(line.startswith("# ") for line in lines)
    assert len(lines) <= 200
    assert n_text >= len(lines) / 5


@pytest.mark.parametrize("name", WITH_ROWS)
def test_committed_rows_are_judged_and_shown(name):
    """What a notebook does with them, without a kernel."""
    module = module_of(name)
    assert len(module.claim.result(module.rows).key_numbers)
    assert module.claim.figures


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"notebook_of_{name}", ANALYSES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_from_scratch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TEXTS[name].count("claim.rows()") == 1
    notebook = jupytext.reads(
        TEXTS[name].replace("claim.rows()", "claim.rows(small=True)"), "py:percent"
    )
    monkeypatch.setenv("PYTHONPATH", str(ANALYSES.parent), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the models are tiny, and the workers are two
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(ANALYSES)}},
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert "image/svg+xml" in kinds, "a figure"
    assert "text/html" in kinds, "a table"


def class_of(name: str) -> type:
    """A class of its own for each analysis, so that workers share them out."""

    class OfOne:
        @pytest.mark.slow
        def test_it_runs_from_scratch_as_a_notebook(self, monkeypatch):
            run_from_scratch(name, monkeypatch)

    return OfOne


for name in CLAIMS:
    globals()[f"Test_{name}"] = class_of(name)
