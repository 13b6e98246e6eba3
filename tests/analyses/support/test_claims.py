"""A claim: its jobs, its rule, its key numbers, and the three ways in which an analysis runs.

Would catch: rows without the labels that tell cases apart, a rule that gets the rows of two cases,
a count that does not follow from the cases, options that are not passed on, a notebook that reads
its command line, a script that runs finished jobs again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT
from support.claims import Claim, in_runs

from harmcircuits.measurements import Measurement, Rows

SCRIPT = '''
from harmcircuits.measurements import Measurement, Rows
from support.claims import Claim

claim = Claim("X1", "a claim", models=("sft", "dpo"), seeds=2, small={"size": 0.5})

@claim.job
def figures(model, seed, *, size: float = 0.1, steps: tuple[int, ...] = (1, 2)):
    """What is measured.

    Args:
        size: share of the weights.
        steps: how many.
    """
    print("measured:", model.name, seed, size, steps)
    return Rows([Measurement.exact("share", {}, size)])

rows = claim.rows()

@claim.rule()
def is_borne_out(rows):
    return rows.one("share").mean < 0.2

@claim.key_numbers
def key_numbers(rows):
    return {"rows": f"{len(rows)} <b>"}

claim.result(rows)
claim.main()
'''


def share(value: float, **labels) -> Measurement:
    return Measurement.exact("share", {"ladder": "shipped", **labels}, value)


def claim_of_shares() -> Claim:
    claim = Claim("X2", "a claim", models=("sft",))
    claim.rule()(lambda rows: rows.one("share").mean < 0.2)
    return claim


def run(folder: Path, *options: str) -> str:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "--out", str(folder / "run"), "--workers", "1"]
    # As scripts beside it find it.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'analyses'}"}
    process = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert process.returncode == (2 if "error" in process.stderr else 0), process.stderr
    return process.stdout + process.stderr


@pytest.mark.parametrize(
    "cases, expected",
    [
        ({"a": [True], "b": [True]}, "2 of 2"),
        ({"a": [True], "b": [False]}, "1 of 2"),
        ({"a": [False], "b": [False]}, "none of 2"),
        ({"a": [True, True], "b": [True, False]}, "1 of 2 (3 of 4 cases)"),
        ({"a": [True, False]}, "none of 1 (1 of 2 cases)"),
    ],
)
def test_a_training_run_counts_if_each_of_its_cases_does(cases, expected):
    assert in_runs(cases) == expected


def test_what_a_confound_explains_is_undecided_and_a_case_may_be_several():
    claim = Claim("X2", "a claim", models=("sft",))
    claim.effect(lambda rows: {"a": True, "b": True, "c": False})
    claim.rule()(lambda rows: {"a": True, "b": False, "c": True})
    rows = Rows([share(0.1, model="sft", seed=0)])
    line = claim.result(rows).line
    assert line.endswith("| none of 1 (2 of 3 cases) | none of 1 (1 of 3 cases) |")
    claim.confound(lambda rows: True)
    result = claim.result(rows)
    assert result.with_controls == "undecided (a confound)"
    assert result.effect == "none of 1 (2 of 3 cases)"


def test_controls_count_only_where_the_effect_is_there():
    claim = claim_of_shares()
    claim.effect(lambda rows: False)
    result = claim.result(Rows([share(0.1, model="sft", seed=0)]))
    assert result.verdict == "training runs: none of 1; with controls: none of 1"


def test_the_rule_sees_one_case_at_a_time():
    rows = Rows([share(0.1, model="sft", seed=0), share(0.3, model="sft", seed=1)])
    result = claim_of_shares().result(rows)
    assert result.verdict == "training runs: none of 1 (1 of 2 cases)"
    assert list(result.cases["with controls"]) == [True, False]
    assert list(result.cases["seed"]) == [0, 1]
    assert "none of 1" in result._repr_html_() and "none of 1" in repr(result)


@pytest.mark.slow
def test_a_script_runs_resumes_and_writes_a_page(tmp_path):
    first = run(tmp_path)
    assert first.count("measured:") == 4, "two models with two seeds"
    assert "measured: sft 0 0.1 (1, 2)" in first
    assert "X1. a claim: training runs: 1 of 1" in first

    rows = Rows.read(tmp_path / "run" / "rows.jsonl").where("share")
    labels = {"ladder": "shipped", "model": "dpo", "seed": 1, "part": "figures"}
    assert rows.where(**labels)
    page = (tmp_path / "run" / "X1.html").read_text()
    assert "2 &lt;b&gt;" in page

    again = run(tmp_path, "--seeds", "3")
    assert again.count("measured:") == 2, "only the new seed"

    answer = run(tmp_path, "--size", "0.4")
    assert "error" in answer and "0.4" in answer, "another setting in the same folder"


def test_an_imported_analysis_reads_committed_rows_and_runs_on_request(tmp_path, monkeypatch):
    script = tmp_path / "analysis.py"
    script.write_text(SCRIPT)
    (tmp_path / "rows").mkdir()
    rows = Rows([share(0.1, model="sft", seed=0, part="figures")])
    rows.append_to(tmp_path / "rows" / "X1.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    import analysis  # pyright: ignore[reportMissingImports]

    assert analysis.rows == rows
    rows = analysis.claim.rows(tmp_path / "run", models=["sft"], seeds=1, size=0.4)
    assert rows.one("share").mean == 0.4
    with pytest.raises(ValueError, match="'sise'"):
        analysis.claim.rows(tmp_path / "run", sise=0.4)
