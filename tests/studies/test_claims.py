"""The way from jobs to outcomes, pages and a table.

Would catch: rows of one analysis read by another, a table that differs from the results, an option
that is not passed on, models of two ladders taken for one.
"""

from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.claims import (
    ClaimResult,
    Plan,
    by_model,
    command,
    conclude,
    summary_table,
)
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.options import Option


def two_figures(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    where = {**spec.labels, "seed": seed}
    exact = Measurement.exact
    return Rows([exact("share", where, plan.size), exact("other", where, plan.options.get("x", 1))])


def made_analysis(name: str, **more) -> SimpleNamespace:
    def result(rows: Rows) -> ClaimResult:
        shares = [row.mean for row in rows.where("share")]
        words = f"{len(shares)} shares <b>"
        return ClaimResult(name, f"claim of {name}", "holds", words, f"{min(shares)}")

    def jobs(plan: Plan) -> list[Job]:
        return plan.jobs(two_figures)

    return SimpleNamespace(
        NAME=name,
        CLAIM=f"claim of {name}",
        MODELS=("sft",),
        jobs=jobs,
        result=result,
        reported=lambda rows: rows.where("share"),
        sections=lambda rows: [f"<p>{len(rows)} rows</p>"],
        **more,
    )


def test_each_analysis_sees_its_own_rows(tmp_path):
    plan = Plan((ModelSpec("sft"), ModelSpec("dpo")), seeds=(0, 1))
    results = conclude([(made_analysis("F1"), plan), (made_analysis("F2"), plan)], tmp_path)
    assert [result.words for result in results] == ["4 shares <b>", "4 shares <b>"]
    assert (tmp_path / "summary.md").read_text() == summary_table(results) + "\n"

    page = (tmp_path / "F1.html").read_text()
    assert "4 shares &lt;b&gt;" in page
    assert "8 rows" in page, "two figures of each of four jobs, without the times"
    reported = Rows.read(tmp_path / "summary.jsonl")
    assert len(reported.where("share", finding="F1")) == 4
    assert len(reported.where("share", finding="F2")) == 4
    assert not reported.where("other")


def test_a_table_has_a_line_a_result():
    results = [
        ClaimResult("F1", "harm is compact", "holds", "in words", "0.40% [0.30%, 0.60%]"),
        ClaimResult("F2", "harm is distinct", "does not hold here", "in words", "1.2"),
    ]
    *_, first, second = summary_table(results).splitlines()
    assert first == "| F1 | harm is compact | **holds** | 0.40% [0.30%, 0.60%] |"
    assert second == "| F2 | harm is distinct | **does not hold here** | 1.2 |"


def test_different_settings_do_not_mix(tmp_path):
    specs = (ModelSpec("sft"),)
    first = (made_analysis("F1"), Plan(specs))
    second = (made_analysis("F2"), Plan(specs, size=0.1))
    with pytest.raises(ValueError, match=r"plans with settings.*0\.006.*0\.1.*folder of its own"):
        conclude([first, second], tmp_path)
    conclude([first], tmp_path)
    with pytest.raises(ValueError, match="give another folder"):
        conclude([second], tmp_path)


def test_the_usual_settings_name_no_options(tmp_path):
    """Runs from before an analysis had options can be resumed."""
    specs = (ModelSpec("sft"),)
    usual = {"size": 0.006, "protect_share": 0.005, "rounds": 10}
    assert Plan(specs).settings == usual
    conclude([(made_analysis("F1"), Plan(specs))], tmp_path)
    with pytest.raises(ValueError, match="give another folder"):
        conclude([(made_analysis("F1"), Plan(specs, options={"x": 2}))], tmp_path)


def test_other_requests_are_other_settings():
    def settings(limit: int, **more) -> dict:
        files = RequestFiles("a.jsonl", "b.jsonl", limit=limit)
        return Plan((ModelSpec("m", files=files, **more),)).settings

    assert settings(3) == settings(3, device="cuda", cache=FOLDER)
    assert settings(3) != settings(4)
    assert settings(3) != settings(3, judge="http://host/v1#m")
    assert settings(3, samples=4, temperature=0.7) != settings(3)
    assert "samples" not in str(settings(3)), "a run from before there was sampling can be resumed"
    assert "custom" not in Plan((ModelSpec("sft"),)).settings


def test_rows_are_told_apart_by_model_and_ladder():
    rows = Rows()
    for model, ladder in [("sft", "shipped"), ("sft", "seed-1"), ("dpo", "shipped")] * 2:
        rows += [Measurement.exact("a", {"model": model, "ladder": ladder}, 1.0)]
    models = by_model(rows)
    assert list(models) == ["sft", "sft of seed-1", "dpo"]
    assert [len(of_model) for of_model in models.values()] == [2, 2, 2]
    assert models["sft of seed-1"][0].labels["ladder"] == "seed-1"


# The command line


def run(out, *arguments: str):
    app = typer.Typer()
    option = Option(int, "A number.", default=1)
    app.command()(command(made_analysis("F1", OPTIONS={"x": option})))
    return CliRunner().invoke(app, ["--out", str(out), *arguments])


def test_the_command_passes_its_options_on(tmp_path):
    models = ["--model", "dpo", "--model", "base"]
    result = run(tmp_path, *models, "--seeds=2", "--size=0.25", "--workers=1", "--x=3")
    assert result.exit_code == 0, result.output
    assert "F1. claim of F1: holds" in result.output
    rows = Rows.read(tmp_path / "rows.jsonl")
    names = {(row.labels["model"], row.labels["seed"]) for row in rows.where("share")}
    assert names == {("dpo", 0), ("dpo", 1), ("base", 0), ("base", 1)}
    assert {row.mean for row in rows.where("share")} == {0.25}
    assert {row.mean for row in rows.where("other")} == {3}


def test_the_usual_models_are_those_of_the_analysis(tmp_path):
    assert run(tmp_path, "--seeds=1", "--workers=1").exit_code == 0
    (row,) = Rows.read(tmp_path / "rows.jsonl").where("share")
    assert row.labels == {"finding": "F1", "model": "sft", "ladder": "shipped", "seed": 0}


def test_command_line_errors_are_sentences(tmp_path):
    assert run(tmp_path, "--seeds=1", "--workers=1").exit_code == 0
    again = run(tmp_path, "--size=0.5")
    assert again.exit_code == 2
    assert "give another folder" in " ".join(again.output.split())
    lost = run(tmp_path, "--harmful=a.jsonl")
    assert lost.exit_code == 2
    assert "--harmful is for a custom model; give --model" in " ".join(lost.output.split())
