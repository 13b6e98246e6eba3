"""Command lines as specs of models.

Would catch: texts that are dropped without a word, a model of one's own that is taken for an organism, a wording file that
is not read, sizes that end in a traceback.
"""

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.options import OWN_MODEL, no_own_model, own_model, specs, takes_own_model

FILES = {"harmful": "a.jsonl", "benign": "b.csv"}


def test_organisms_of_every_folder():
    folders = [FOLDER, Path("other")]
    found = specs(["dpo", "base"], ["sft"], folders, "cpu", harmful="", limit=0, judge="local")
    assert found == tuple(ModelSpec(name, folder) for folder in folders for name in ("dpo", "base"))
    assert specs([], ["sft"], [FOLDER], "cuda") == (ModelSpec("sft", device="cuda"),)


def test_own_models_where_texts_are_given():
    found = specs(
        ["m", "n"], ["sft"], [FOLDER], "cpu", **FILES, limit=3, judge="local", batch_size=2
    )
    assert found == tuple(
        ModelSpec(name, texts=RequestFiles("a.jsonl", "b.csv", limit=3), batch_size=2)
        for name in ("m", "n")
    )
    assert {spec.labels["ladder"] for spec in found} == {"own"}


def test_texts_need_a_model_and_a_model_needs_texts():
    with pytest.raises(ValueError, match="--harmful is for a model of your own; give --model"):
        specs([], ["sft"], [FOLDER], "cpu", **FILES)
    with pytest.raises(ValueError, match="--benign-heldout is for a model"):
        no_own_model(harmful="", benign_heldout="b.csv")
    with pytest.raises(
        ValueError, match="model 'm' needs its requests; give --harmful FILE and --benign FILE"
    ):
        specs(["m"], ["sft"], [FOLDER], "cpu", harmful="", benign="b.csv")
    no_own_model(harmful="", limit=0, judge="local", samples=1)
    with pytest.raises(ValueError, match="--temperature is for a model of your own"):
        specs(["dpo"], ["sft"], [FOLDER], "cpu", temperature=0.7)


def test_a_command_takes_the_options_of_a_model_of_ones_own():
    seen, runner, app = [], CliRunner(), Typer()

    @app.command()
    @takes_own_model
    def command(*, first: str = "a", own: dict, last: int = 1) -> None:
        """What it does."""
        seen.append((first, own, last))

    text = " ".join(runner.invoke(app, ["--help"]).output.split())
    places = [text.index(f"--{name.replace('_', '-')} ") for name in ("first", *OWN_MODEL, "last")]
    assert places == sorted(places) and "What it does." in text and "--own" not in text
    assert runner.invoke(app, []).exit_code == 0
    assert (
        runner.invoke(app, ["--batch-size", "3", "--harmful", "a.jsonl", "--last", "2"]).exit_code
        == 0
    )
    (_, usual, _), (first, given, last) = seen
    no_own_model(**usual)
    assert (first, last) == ("a", 2) and given == {**usual, "batch_size": 3, "harmful": "a.jsonl"}
    assert own_model("m", "cpu", **{**usual, **FILES}) == ModelSpec(
        "m", texts=RequestFiles("a.jsonl", "b.csv")
    )
    with pytest.raises(ValueError, match="--batch-size is for a model of your own"):
        no_own_model(**{**usual, "batch_size": 3})


def test_a_wording_is_read_from_its_file(tmp_path):
    (tmp_path / "w.json").write_text('{"yes": ["Ja"], "recognition": "Darf man {request}?"}')
    spec = own_model("m", "cpu", **FILES, wording=str(tmp_path / "w.json"))
    assert spec.texts is not None
    assert (spec.texts.wording.yes, spec.texts.wording.recognition) == (
        ("Ja",),
        "Darf man {request}?",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "xml"}, "template='xml'; expected chat or raw"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"limit": -1}, "limit=-1"),
        ({"samples": 3}, "temperature=0.0; expected more than 0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p=2.0"),
        ({"wording": "nowhere.json"}, r"nowhere\.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        own_model("m", "cpu", **FILES, **options)
