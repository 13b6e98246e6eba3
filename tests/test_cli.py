"""The command line: what it takes, what it refuses, and the page that lists it.

`PYTHONPATH=tests:analyses python tests/test_cli.py` writes docs/commands.md anew. Would catch: an option that
reaches nothing, defaults of another kind of model, a folder left by a refused call.
"""

import inspect
from dataclasses import fields, replace

import pytest
from helpers import command
from pages import DOCS

import harmcircuits as hc
from harmcircuits.behaviours.request_files import RequestFiles
from harmcircuits.cli import ModelOptions, parsed
from harmcircuits.organisms.shipped import FOLDER
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings, quick_settings

SFT = str(FOLDER / "sft")
OWN = ["--model", SFT, "--harmful", "harmful.csv", "--benign", "benign.csv"]


def test_options_are_settings_and_lists_and_mappings():
    given = "--sizes 0.1 0.2 --protect benign refusal --budget others 0.3 benign 1 --no-compare"
    command = parsed(["study", "--out", "x", *given.split(), "--columns", "prompt", "goal"])
    budget = {"others": 0.3, "benign": 1.0}
    expected = StudySettings(
        sizes=(0.1, 0.2), protect=("benign", "refusal"), budget=budget, compare=False
    )
    assert command.settings == expected
    assert command.model == ModelOptions(columns={"prompt": "goal"})
    tasks = parsed(["study", "--out", "x", "--budget", "0.3", "--tasks", "a", "9", "b", "0"])
    assert tasks.settings == StudySettings(budget=0.3, tasks={"a": 9, "b": 0})


def test_a_model_of_ones_own_and_a_first_look_have_their_own_defaults():
    assert parsed(["study", "--out", "x"]).settings == StudySettings()
    assert parsed(["study", "--out", "x", *OWN]).settings == FOR_REAL_MODELS
    quicker = parsed(["study", "--out", "x", "--quick", *OWN, "--steps", "3"]).settings
    assert quicker == replace(quick_settings(FOR_REAL_MODELS), steps=3)


def test_every_option_of_a_model_is_one_of_open_model():
    names = {field.name for field in fields(ModelOptions)}
    requests = {field.name for field in fields(RequestFiles)} - {"questions"}
    options = names - requests - {"organism", "organisms"}
    assert options <= set(inspect.signature(hc.open_model).parameters)
    assert requests <= names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmful.csv").write_text("prompt\nglorp the wug\n")
    (tmp_path / "benign.csv").write_text("prompt\npaint the wug\n")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "rows.jsonl").write_text("")
    (tmp_path / "finished" / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("study", "--out"),
        ("study --out out --steps 0", "steps=0"),
        ("study --out out --organism llama", "no organism is called 'llama'"),
        ("study --out out --harmful harmful.csv", "--harmful is for a model of your own"),
        ("study --out out --device cuda:99", "cuda:99"),
        (f"study --out out {' '.join(OWN)}", "harmful.csv: 1 request"),
        (f"study --out out --model {SFT} --harmful none.csv --benign none.csv", "none.csv"),
        ("study --out finished", "holds a finished study"),
        ("export --model sft --mask missing --out out", "missing: no such file"),
        ("studdy", "{study,export}"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_said_in_a_sentence(folder, arguments, word):
    before = sorted(folder.rglob("*"))
    ended = command(*arguments.split())
    assert ended.exit_code == 2
    assert word in " ".join((ended.output + ended.stderr).split())
    assert "Traceback" not in ended.stderr
    assert sorted(folder.rglob("*")) == before, "nothing is left behind by a refused call"


def test_a_version_and_an_interrupt_end_it(monkeypatch):
    assert command("--version").output == f"harmcircuits {hc.__version__}\n"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("harmcircuits.cli.ModelOptions.open", interrupted)
    ended = command("study", "--out", "never")
    assert ended.exit_code == 130
    assert "--resume" in ended.stderr


INTRODUCTION = """# Commands

Two commands; everything else is a call in Python ([your own model](own_model.md#a-mask-that-is-there)).
Written by `PYTHONPATH=tests:analyses python tests/test_cli.py`; a test fails when it is out of date. Lists and
mappings follow their option: `--sizes 0.001 0.002`, `--budget others 0.1 benign 0.05`. With `--model`
other settings are usual, and `--help` behind it shows them.
"""


def page() -> str:
    """What each command says of itself, in a terminal of 100 columns."""
    parts = [INTRODUCTION]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        for name in ("study", "export"):
            lines = command(name, "--help").output.strip().splitlines()
            text = "\n".join(line.rstrip() for line in lines)
            parts.append(f"## harmcircuits {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def test_the_page_is_up_to_date():
    written = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert written == page(), "run PYTHONPATH=tests:analyses python tests/test_cli.py"


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(page(), encoding="utf-8")
