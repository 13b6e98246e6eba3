"""A command that cannot go on says so in one sentence: the name, the value and the remedy.

Would catch: a traceback, a message in the words of another interface, an error that comes only after
the model was loaded, a folder or a file that is there after a call that was refused.
"""

import errno
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

from harmcircuits.cli import app
from harmcircuits.command_errors import in_options, one_sentence
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.pairs import values_by_name

SFT = str(FOLDER / "sft")
REQUESTS = ["--harmful", "harmful.csv", "--benign", "benign.csv"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmful.csv").write_text("prompt\nglorp the wug\n")
    (tmp_path / "benign.csv").write_text("request\npaint the wug\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("prompt\nzürp\n".encode("latin-1"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "rows.jsonl").write_text("")
    (tmp_path / "begun" / "walks").mkdir(parents=True)
    return tmp_path


STUDY = ["study", "--out", "out"]
ERRORS = {
    "no such file": (
        [*STUDY, "--model", SFT, "--harmful", "none.csv", "--benign", "benign.csv"],
        ["none.csv", "no such file", "give the path"],
    ),
    "a folder for a file": (
        [*STUDY, "--model", SFT, "--harmful", "begun", "--benign", "benign.csv"],
        ["begun", "neither a file of requests"],
    ),
    "a CSV without the column": (
        [*STUDY, "--model", SFT, *REQUESTS, "--column", "harmful.prompt=goal"],
        ["harmful.csv", "no column 'goal'", "there are prompt"],
    ),
    "a CSV with an unknown column": (
        [*STUDY, "--model", SFT, *REQUESTS],
        ["benign.csv", "It has request", "say which by --column prompt=NAME"],
    ),
    "an empty file": (
        [*STUDY, "--model", SFT, "--harmful", "empty.csv", "--benign", "benign.csv"],
        ["empty.csv", "no rows", "expected at least one prompt"],
    ),
    "another encoding": (
        [*STUDY, "--model", SFT, "--harmful", "latin.csv", "--benign", "benign.csv"],
        ["latin.csv, line 2", "not UTF-8 (byte 0xfc)", "save the file"],
    ),
    "no such device": (
        ["generate", "--organism", "sft", "--prompt", "a", "--device", "gpu"],
        ["--device 'gpu'", "no such device", "expected cpu, cuda"],
    ),
    "a GPU that is not there": (
        [*STUDY, "--device", "cuda:99"],
        ["--device 'cuda:99'", "CUDA device", "give --device 'cpu'"],
    ),
    "no such model": (
        ["generate", "--model", "nowhere/model", "--prompt", "a"],
        ["model 'nowhere/model'", "cannot be loaded", "expected a folder or a hub id"],
    ),
    "a model without its files": (
        ["generate", "--model", "begun", "--prompt", "a"],
        ["model 'begun'", "cannot be loaded", "expected a folder or a hub id"],
    ),
    "two that contradict": (
        [*STUDY, "--model", SFT, "--organism", "dpo"],
        [f"--model '{SFT}' and --organism 'dpo'", "give one"],
    ),
    "two values for one name": (
        [*STUDY, "--budget-of", "benign=1", "--budget-of", "benign=2"],
        ["--budget-of 'benign=2'", "'1' before", "give 'benign' one value"],
    ),
    "a value that is no number": (
        [*STUDY, "--budget-of", "benign=much"],
        ["--budget-of 'benign=much'", "is no number", "such as 'benign=0.1'"],
    ),
    "go on and remove": (
        ["study", "--out", "begun", "--resume", "--force"],
        ["--resume and --force", "give one"],
    ),
    "a finished folder": (
        ["study", "--out", "finished"],
        ["finished already holds a study", "another folder, or --force"],
    ),
    "a finished folder to go on with": (
        ["study", "--out", "finished", "--resume"],
        ["finished already holds a study", "another folder, or --force"],
    ),
    "an unfinished folder": (
        ["study", "--out", "begun"],
        ["begun holds an unfinished study", "give --resume to go on", "--force"],
    ),
    "a file for a folder": (["study", "--out", "file"], ["file is a file", "give --out"]),
    "a size of too few weights": (
        [*STUDY, "--size", "0.000001"],
        ["--size 1e-06", "1 weight of 983,040", "give 1e-05 or more"],
    ),
    "no mask": (
        ["measure", "--organism", "sft", "--mask", "file"],
        ["file: not a safetensors file", "expected a saved mask"],
    ),
    "a file of rows that is there": (
        ["measure", "--organism", "sft", "--mask", "file", "--out", "file"],
        ["file exists", "a file that does not exist yet, or --force"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.usefixtures("unchecked")
def test_an_error_has_a_name_a_value_and_a_remedy(folder, name):
    arguments, words = ERRORS[name]
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, [*arguments])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in message
    assert message.startswith("error: ") and "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before, "nothing is left behind by a refused call"


def test_a_missing_harness_is_said_before_a_model_is_opened(folder, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError("No module named 'lm_eval'")

    def opened(*_, **__):
        raise AssertionError("the model was opened first")

    monkeypatch.setattr("harmcircuits.studies.utility.import_module", missing)
    monkeypatch.setattr("harmcircuits.cli.open_model", opened)
    monkeypatch.setattr("harmcircuits.studies.utility._manager", lambda _: missing(""))
    from harmcircuits.studies import utility

    monkeypatch.setattr(utility, "_manager", utility._manager)
    monkeypatch.setattr(utility, "_manager", lambda _: utility._harness("lm_eval.tasks"))
    result = CliRunner().invoke(app, [*STUDY, "--task", "lambada_openai"])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2
    for word in ("lm-evaluation-harness", "'lm_eval'", "pip install 'harmcircuits[real]'"):
        assert word in message


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/rows.jsonl"), 1,
         ["out/rows.jsonl: No space left on device", "make room", "--resume"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1,
         ["out of memory", "CUDA", "--batch-size", "--max-memory", "--resume"]),
        (MemoryError(), 1, ["out of memory", "--batch-size", "--resume"]),
        (RuntimeError("CUDA error: device-side assert"), 1, ["device failed", "--resume"]),
        (KeyboardInterrupt(), 130, ["interrupted", "--resume"]),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_one_sentence_with_a_state_that_resumes(
    folder, monkeypatch, error, code, words
):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("harmcircuits.cli.open_model", failing)
    result = CliRunner().invoke(app, STUDY)
    message = " ".join(result.stderr.split())
    assert result.exit_code == code
    for word in words:
        assert word in message
    assert "Traceback" not in result.output


def test_errors_of_the_program_itself_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a slip"), one_sentence():
        raise RuntimeError("a slip")
    with pytest.raises(typer.Exit), one_sentence():
        raise ValueError("what a user can cause")


def test_arguments_become_options():
    flags = {"sizes": "--size", "out": "--out", "is_quick": "--quick", "columns": "--column"}
    for text, expected in (
        ("sizes=[1.5]; expected", "--size [1.5]; expected"),
        ("study: sizes: none", "--size: none"),
        ("without is_quick=True, or out=FOLDER", "without --quick, or --out FOLDER"),
        ("by columns={'prompt': 'goal'}", "by --column prompt=goal"),
        ("source=, out= a folder", "source=, --out a folder"),
        ("layout=3", "layout=3"),
    ):
        assert in_options(text, flags) == expected


def test_values_by_name():
    assert values_by_name(["a=b=c", "d="], "o", "a=b", may_be_empty=True) == {"a": "b=c", "d": ""}
    for texts in (["a"], ["=b"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match=r"o='.*'(; expected NAME=VALUE|, and '1' before)"):
            values_by_name(texts, "o", "a=b")


def test_a_warning_is_a_sentence_without_its_place(capsys):
    with one_sentence():
        warnings.warn("find_circuit: scored on few answers", stacklevel=1)
    assert capsys.readouterr().err == "warning: scored on few answers\n"
