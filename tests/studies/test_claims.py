"""The way from jobs to verdicts, pages and a table.

Would catch: rows of one analysis read by another, a table that differs from the findings, an option that is not passed on.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.claims import ClaimResult, Plan, command, conclude, summary
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec


def found_rows(spec: ModelSpec, q: float, seed: int):
    return [
        Measurement.exact("share", {**spec.labels, "seed": seed}, q),
        Measurement.exact("other", {**spec.labels, "seed": seed}, 1.0),
    ]


def an_analysis(name: str) -> SimpleNamespace:
    def finding(rows):
        shares = [row.mean for row in rows.where("share")]
        return ClaimResult(
            name, f"claim of {name}", "holds", f"{len(shares)} shares <b>", f"{min(shares)}"
        )

    return SimpleNamespace(
        NAME=name,
        CLAIM=f"claim of {name}",
        MODELS=("sft",),
        jobs=lambda plan: [
            Job({**spec.labels, "seed": seed}, partial(found_rows, spec, plan.q, seed))
            for spec in plan.specs
            for seed in plan.seeds
        ],
        finding=finding,
        needed=lambda rows: rows.where("share"),
        sections=lambda rows: [f"<p>{len(rows)} rows</p>"],
    )


def test_each_analysis_sees_its_own_rows(tmp_path):
    plan = Plan((ModelSpec("sft"), ModelSpec("dpo")), seeds=(0, 1))
    found = conclude([(an_analysis("F1"), plan), (an_analysis("F2"), plan)], tmp_path)
    assert [one.words for one in found] == ["4 shares <b>", "4 shares <b>"]
    assert (tmp_path / "summary.md").read_text() == summary(found) + "\n"
    page = (tmp_path / "F1.html").read_text()
    assert "4 shares &lt;b&gt;" in page
    assert "8 rows" in page, "two figures of each of four jobs, without the times"
    kept = Rows.read(tmp_path / "summary.jsonl")
    assert len(kept.where("share", finding="F1")) == len(kept.where("share", finding="F2")) == 4
    assert not kept.where("other")


def test_different_settings_do_not_mix(tmp_path):
    specs = (ModelSpec("sft"),)
    with pytest.raises(ValueError, match="plans with settings"):
        conclude(
            [(an_analysis("F1"), Plan(specs)), (an_analysis("F2"), Plan(specs, q=0.1))], tmp_path
        )


def test_other_requests_are_other_settings():
    def plan(limit: int, **more) -> Plan:
        return Plan(
            (ModelSpec("m", texts=RequestFiles("a.jsonl", "b.jsonl", limit=limit), **more),)
        )

    assert plan(3).settings == plan(3, device="cuda", cache=FOLDER).settings
    assert plan(3).settings != plan(4).settings
    assert plan(3).settings != plan(3, judge="http://host/v1#m").settings
    assert plan(3, samples=4, temperature=0.7).settings != plan(3).settings
    assert "samples" not in str(plan(3).settings), (
        "a run from before there was sampling can be resumed"
    )
    assert "own" not in Plan((ModelSpec("sft"),)).settings


def test_the_command_passes_its_options_on(tmp_path):
    app = typer.Typer()
    app.command()(command(an_analysis("F1")))
    options = ["--model", "dpo", "--model", "base", "--seeds", "2", "--q", "0.25", "--workers", "1"]
    result = CliRunner().invoke(app, ["--out", str(tmp_path), *options])
    assert result.exit_code == 0
    assert "F1. claim of F1: holds" in result.output
    rows = Rows.read(tmp_path / "rows.jsonl").where("share")
    assert {(row.labels["model"], row.labels["seed"]) for row in rows} == {
        (m, s) for m in ("dpo", "base") for s in (0, 1)
    }
    assert {row.mean for row in rows} == {0.25}
    again = CliRunner().invoke(app, ["--out", str(tmp_path), "--q", "0.5"])
    assert again.exit_code == 2
    assert "give another folder" in " ".join(again.output.split())
    lost = CliRunner().invoke(app, ["--out", str(tmp_path), "--harmful", "a.jsonl"])
    assert lost.exit_code == 2
    assert "--harmful is for a model of your own" in " ".join(lost.output.split())


def test_a_spec_opens_its_model_and_names_its_ladder(tmp_path):
    spec = ModelSpec("sft")
    assert spec.labels == {"model": "sft", "ladder": "shipped"}
    assert ModelSpec("sft", tmp_path / "seed-1").labels["ladder"] == "seed-1"
    model = spec.open(seed=3)
    assert model.name == "sft"
    assert {"harmful", "parts", "recognition_margin"} <= set(model.behaviours)
    with pytest.raises(ValueError, match="no organism"):
        ModelSpec("sft", FOLDER.parent).open()
