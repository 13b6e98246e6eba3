"""Command lines as specs of models.

Would catch: requests that are dropped without a word, a custom model that is taken for an organism,
a file of questions that is not read, sizes that end in a traceback.
"""

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.options import (
    CUSTOM_MODEL,
    custom_model,
    no_custom_model,
    specs,
    takes_custom_model,
)

FILES = {"harmful": "a.jsonl", "benign": "b.csv"}


def test_organisms_of_every_folder():
    folders = [FOLDER, Path("other")]
    options = {"harmful": "", "limit": 0, "judge": "local"}
    assert specs(["dpo", "base"], ["sft"], folders, "cpu", **options) == (
        ModelSpec("dpo", FOLDER),
        ModelSpec("base", FOLDER),
        ModelSpec("dpo", Path("other")),
        ModelSpec("base", Path("other")),
    )
    assert specs([], ["sft"], [FOLDER], "cuda") == (ModelSpec("sft", device="cuda"),)


def test_custom_models_where_requests_are_given():
    options = {**FILES, "limit": 3, "judge": "local", "batch_size": 2}
    models = specs(["m", "n"], ["sft"], [FOLDER], "cpu", **options)
    files = RequestFiles("a.jsonl", "b.csv", limit=3)
    assert models == tuple(ModelSpec(name, files=files, batch_size=2) for name in ("m", "n"))
    assert {spec.labels["ladder"] for spec in models} == {"own"}


def test_requests_need_a_model_and_a_model_needs_requests():
    with pytest.raises(ValueError, match="--harmful is for a custom model; give --model"):
        specs([], ["sft"], [FOLDER], "cpu", **FILES)
    with pytest.raises(ValueError, match="--benign-heldout is for a custom model"):
        no_custom_model(harmful="", benign_heldout="b.csv")
    with pytest.raises(ValueError, match=r"'m' needs its requests; give harmful=.* benign="):
        specs(["m"], ["sft"], [FOLDER], "cpu", harmful="", benign="b.csv")
    with pytest.raises(ValueError, match="--temperature is for a custom model"):
        specs(["dpo"], ["sft"], [FOLDER], "cpu", temperature=0.7)
    no_custom_model(harmful="", limit=0, judge="local", samples=1)


@pytest.fixture
def app():
    """A command with the options of a custom model, and what it is called with."""
    app, calls = Typer(), []

    @app.command()
    @takes_custom_model
    def command(*, first: str = "a", custom: dict, last: int = 1) -> None:
        """What it does."""
        calls.append((first, custom, last))

    return app, calls


def test_a_command_shows_the_options_of_a_custom_model_in_their_place(app):
    text = " ".join(CliRunner().invoke(app[0], ["--help"]).output.split())
    assert "What it does." in text
    assert "--custom" not in text
    places = []
    for name in ("first", *CUSTOM_MODEL, "last"):
        option = CUSTOM_MODEL.get(name)
        flag = (option and option.flag) or f"--{name.replace('_', '-')}"
        places.append(text.index(f"{flag} "))
    assert places == sorted(places)


def test_a_command_takes_the_options_of_a_custom_model(app):
    command, calls = app
    runner = CliRunner()
    assert runner.invoke(command, []).exit_code == 0
    arguments = ["--batch-size", "3", "--harmful", "a.jsonl", "--last", "2"]
    assert runner.invoke(command, arguments).exit_code == 0
    (_, usual, _), (first, given, last) = calls
    assert (first, last) == ("a", 2)
    assert given == {**usual, "batch_size": 3, "harmful": "a.jsonl"}

    no_custom_model(**usual)
    with pytest.raises(ValueError, match="--batch-size is for a custom model"):
        no_custom_model(**{**usual, "batch_size": 3})
    expected = ModelSpec("m", files=RequestFiles("a.jsonl", "b.csv"))
    assert custom_model("m", "cpu", **{**usual, **FILES}) == expected


def test_questions_are_read_from_their_file(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text('{"yes": ["Ja"], "recognition": "Darf man {request}?"}')
    spec = custom_model("m", "cpu", **FILES, questions=str(file))
    assert spec.files is not None
    questions = spec.files.questions
    assert (questions.yes, questions.recognition) == (("Ja",), "Darf man {request}?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "xml"}, "template='xml'; expected chat or raw"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"limit": -1}, "limit=-1"),
        ({"samples": 3}, r"temperature=0\.0; expected more than 0"),
        ({"temperature": 1.0, "top_p": 2.0}, r"top_p=2\.0"),
        ({"questions": "nowhere.json"}, r"nowhere\.json: no such file"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        custom_model("m", "cpu", **FILES, **options)
