"""A claim: its jobs, its rule, its key numbers, and the three ways in which an analysis runs.

Would catch: rows without the labels that tell cases apart, a rule that sees the rows of two cases,
an outcome that does not follow from the cases, options that are not passed on, a notebook that reads
its command line, a script that runs what is there already.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from support.claims import Claim, in_all, in_some

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.circuitsvis import circuitsvis_script, coloured_tokens
from harmcircuits.views.figures import Picture

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
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == (2 if "error" in done.stderr else 0), done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "cases, of_some, of_all",
    [
        (["holds", "holds"], "holds", "holds"),
        (["holds", "does not hold here"], "holds in part", "does not hold here"),
        (["holds in part", "holds"], "holds in part", "holds in part"),
        (["does not hold here"], "does not hold here", "does not hold here"),
        ([], "does not hold here", "does not hold here"),
    ],
)
def test_an_outcome_follows_from_the_cases(cases, of_some, of_all):
    assert (in_some(cases), in_all(cases)) == (of_some, of_all)


def test_the_rule_sees_one_case_at_a_time():
    rows = Rows([share(0.1, model="sft", seed=0), share(0.3, model="sft", seed=1)])
    result = claim_of_shares().result(rows)
    assert result.outcome == "holds in part"
    assert list(result.cases["outcome"]) == ["holds", "does not hold here"]
    assert list(result.cases["seed"]) == [0, 1]
    assert "holds in part" in result._repr_html_() and "holds in part" in repr(result)


def test_an_outcome_of_its_own_judges_all_rows_at_once():
    claim = claim_of_shares()
    claim.outcome(lambda rows: "holds" if len(rows) == 2 else "does not hold here")
    two = Rows([share(0.1, model="sft", seed=0), share(0.3, model="sft", seed=1)])
    result = claim.result(two)
    assert result.outcome == "holds"
    assert list(result.cases["outcome"]) == ["holds", "does not hold here"]
    assert claim.result(two[:1]).outcome == "does not hold here", "though its only case holds"


def test_rows_that_lack_a_label_of_the_cases_belong_to_none():
    rows = Rows([share(0.1, model="sft", seed=0), share(0.3, model="sft")])
    assert claim_of_shares().result(rows).outcome == "holds"


def test_key_numbers_are_of_a_model_whatever_the_cases_are():
    claim = Claim("X4", "a claim", models=("sft",))
    claim.rule("ladder", "model", "topic", "seed")(lambda rows: True)
    claim.key_numbers(lambda rows: {"rows": f"{len(rows)}"})
    rows = Rows(share(0.1, model="sft", seed=0, topic=topic) for topic in "ab")
    result = claim.result(rows)
    assert result.key_numbers.to_dict("records") == [{"": "rows", "sft": "2"}]
    assert len(result.cases) == 2


def test_a_number_that_a_model_lacks_is_a_dash_and_ladders_are_named():
    claim = Claim("X4", "a claim", models=("sft",))
    claim.key_numbers(lambda rows: {str(row.labels["of"]): f"{row.mean}" for row in rows})
    rows = Rows([share(1, model="sft", of="last"), share(2, model="sft", of="last", ladder="b")])
    rows += [
        share(3, model="sft", of="first", ladder="b"),
        share(4, model="sft", of="x", ladder="b"),
    ]
    table = claim.result(rows).key_numbers.set_index("")
    assert list(table.index) == ["last", "first", "x"], "in the order of who has most"
    assert dict(table.loc["last"]) == {"sft": "1", "sft of b": "2"}
    assert dict(table.loc["first"]) == {"sft": "–", "sft of b": "3"}


def test_a_script_runs_resumes_and_writes_a_page(tmp_path):
    first = run(tmp_path)
    assert first.count("measured:") == 4, "two models with two seeds"
    assert "measured: sft 0 0.1 (1, 2)" in first
    assert "X1. a claim: holds" in first

    rows = Rows.read(tmp_path / "run" / "rows.jsonl").where("share")
    labels = {"ladder": "shipped", "model": "dpo", "seed": 1, "part": "figures"}
    assert rows.where(**labels)
    page = (tmp_path / "run" / "X1.html").read_text()
    assert "2 &lt;b&gt;" in page

    again = run(tmp_path, "--seeds", "3")
    assert again.count("measured:") == 2, "only the new seed"


def test_a_script_takes_the_options_of_its_jobs(tmp_path):
    printed = run(tmp_path, "--size", "0.3", "--steps", "4", "--model", "sft", "--seeds", "1")
    assert "measured: sft 0 0.3 (4,)" in printed
    assert "X1. a claim: does not hold here" in printed
    refused = run(tmp_path, "--size", "0.4")
    assert "error" in refused and "0.4" in refused, "another setting in the same folder"


def test_a_small_run_has_one_seed_and_the_small_options(tmp_path):
    printed = run(tmp_path, "--small", "--model", "sft")
    assert printed.count("measured:") == 1 and "0.5" in printed


def test_help_runs_nothing(tmp_path):
    printed = run(tmp_path, "--help")
    assert "Share of the weights." in printed and "measured:" not in printed


def test_an_imported_analysis_reads_committed_rows_and_runs_on_request(tmp_path, monkeypatch):
    script = tmp_path / "analysis.py"
    script.write_text(SCRIPT)
    (tmp_path / "rows").mkdir()
    kept = Rows([share(0.1, model="sft", seed=0, part="figures")])
    kept.append_to(tmp_path / "rows" / "X1.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    import analysis  # pyright: ignore[reportMissingImports]

    assert analysis.rows == kept
    rows = analysis.claim.rows(tmp_path / "run", models=["sft"], seeds=1, size=0.4)
    assert rows.one("share").mean == 0.4
    with pytest.raises(ValueError, match="'sise'"):
        analysis.claim.rows(tmp_path / "run", sise=0.4)


def test_a_question_has_numbers_and_figures_and_no_outcome(tmp_path, capsys):
    claim = Claim("X4", "a question", models=("sft",))
    claim.key_numbers(lambda rows: {"rows": f"{len(rows)} <b>"})
    claim.figure("Tokens", coloured_tokens(["a", "b"], torch.tensor([0.5, 1.0])))
    claim.figure("Figure", Picture(Figure()))
    result = claim.result(Rows([share(0.1, model="sft", seed=0)]))
    assert result.outcome is None and result.title == "X4. a question"
    assert "1 &lt;b&gt;" in result._repr_html_() and "1 <b>" in repr(result)

    # As a script that has run.
    claim._out, claim._rows = tmp_path, Rows([share(0.1, model="sft", seed=0)])
    claim.main()
    printed = capsys.readouterr().out
    assert printed.startswith("X4. a question\n") and "1 <b>" in printed
    page = (tmp_path / "X4.html").read_text()
    assert "1 &lt;b&gt;" in page and "Each case" not in page
    assert page.count("<svg ") == page.count("CircuitsVis.ColoredTokens") == 1
    assert circuitsvis_script() in page
    assert list(tmp_path.iterdir()) == [tmp_path / "X4.html"], "no line for a table of outcomes"


def test_missing_rows_are_named_with_what_to_do(tmp_path, monkeypatch):
    claim = Claim("X3", "a claim", models=("sft",))
    claim.job(lambda model, seed: Rows())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"X3\.jsonl.*out="):
        claim.rows()
