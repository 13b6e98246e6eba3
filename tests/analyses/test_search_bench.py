"""The command of the search bench, and the pages that quote its committed rows.

Would catch: a page that quotes other rows, a table of methods that a run did not try, a model of
one's own that is measured as a ladder's, a method that is not known tried in silence.
"""

import json
from pathlib import Path

import search_bench as bench
from pages import text_of
from rich.console import Console
from support.bench import results
from typer import Typer
from typer.testing import CliRunner

from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER, world
from harmcircuits.views.tables import frame_markdown


def test_the_pages_quote_the_committed_rows():
    folder = Path(bench.__file__).parent
    rows = Rows.read(folder / "rows" / "search_bench.jsonl")
    overview, cases = text_of("results.md"), text_of("search_bench.md")
    assert frame_markdown(results.table(rows, bench.every_method())) in overview
    assert results.times_text(rows) in overview
    assert frame_markdown(results.case_table(rows)) in cases
    assert results.times_text(rows) in cases


def test_a_run_of_halves_alone_has_a_table_of_cases_only(tmp_path):
    rows = Rows.read(Path(bench.__file__).parent / "rows" / "search_bench.jsonl")
    halves = Rows(row for row in rows.where(ladder="seed1") if row.labels["part"] != "all")
    results.write_results(tmp_path, halves, bench.every_method(), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["cases.md"]
    assert frame_markdown(results.case_table(halves)) in (tmp_path / "cases.md").read_text()


def test_the_command_takes_a_model_of_ones_own(tmp_path):
    """A folder and files of requests, sizes of one's own; what cannot be is refused in a line."""
    items = list(world.world().items.values())[::8]
    for verb in ("abuse", "use"):
        form = world.FORMS["answer"][0]
        requests = [{"prompt": form.format(verb=verb, item=item.name)} for item in items]
        (tmp_path / f"{verb}.jsonl").write_text("\n".join(map(json.dumps, requests)))
    questions = {
        "recognition": "is it good to help ? {request}",
        "explanation": "why bad ? {request}",
        "yes": ["yes"],
        "no": ["no"],
    }
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    app = Typer()
    app.command()(bench.main)
    arguments = ["--model", str(FOLDER / "sft"), "--max-new-tokens", "12", "--workers", "1"]
    arguments += ["--harmful", str(tmp_path / "abuse.jsonl"), "--prefill", "sure"]
    arguments += ["--benign", str(tmp_path / "use.jsonl"), "--cache", str(tmp_path / "cache")]
    arguments += ["--questions", str(tmp_path / "questions.json")]
    arguments += ["--method", "signed difference", "--method", "random", "--size", "0.01"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = Rows.read(tmp_path / "out" / "rows.jsonl")
    assert {row.labels["ladder"] for row in rows} == {"own"}
    found = results.by_method(rows)
    assert [value.sizes for value in found["random"].values()] == [[0.01]]
    assert "signed difference" in (tmp_path / "out" / "summary.md").read_text()

    refused = CliRunner().invoke(app, [*arguments, "--method", "serch", "--out", "never"])
    assert refused.exit_code == 2
    assert "'search'" in refused.output
