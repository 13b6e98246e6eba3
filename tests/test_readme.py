"""The README runs: its Python, its commands' names, its figures of the planted bench.

Would catch: an example that no longer works, a file map that names what is gone.
"""

import re
from pathlib import Path

import attacks
import emergent_misalignment
import pytest
from helpers import small_model
from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

import harmcircuits as hc
from harmcircuits.behaviours.own import OwnBehaviour
from harmcircuits.cli import app
from harmcircuits.prompt_files import SHAPES
from harmcircuits.studies.claims import command as command_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_python_blocks_run(few, capsys, monkeypatch):
    """On a model that is asked few requests; as they stand by `pytest -m slow`."""
    if few:
        monkeypatch.setattr(hc, "open_model", small_model)
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert printed.count("WeightMask(circuit") == 3
    assert printed.count("harm_valid_rate") == 3
    assert "valid harm" in printed and "a search of its own" in printed


def test_the_behaviour_of_the_readme_is_read(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.S)
    (tmp_path / "flattery.toml").write_text(text)
    rows = "\n".join(f"is wall {n} white ?" for n in range(40))
    (tmp_path / "opinions.csv").write_text(f"prompt\n{rows}\n")
    behaviour = OwnBehaviour.of(tmp_path / "flattery.toml").behaviour()
    assert behaviour.judge is not None
    assert behaviour.judge("is wall 3 white ?", "Great question!") == behaviour.wanted


def test_the_shapes_of_the_readme_are_recognised():
    table = README.split("| recognised by |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        recognised, name = line.split("|")[1].strip(), line.split(":")[0].strip("| ")
        columns = re.findall(r"`([\w,]+)`", recognised)[0].split(",")
        shape = next(shape for shape in SHAPES if shape.fits(columns))
        assert shape.name in ("", name, "chat messages")
        assert shape.name or columns == ["prompt"]


def test_commands_exist():
    known: set[str] = set()
    for name, command in get_command(app).commands.items():
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
        options = {option for parameter in command.params for option in parameter.opts}
        shown = re.findall(rf"harmcircuits {name} (.*)", README)
        assert (
            shown
            and {option for line in shown for option in re.findall(r"--[\w-]+", line)} <= options
        )
        known |= options
    analysis = Typer()
    analysis.command()(command_of(attacks, emergent_misalignment))
    known |= {name for option in get_command(analysis).params for name in option.opts}
    own = README.split("## On your own model")[1].split("\n## ")[0]
    assert set(re.findall(r"--[\w-]+", own)) <= known
    for path in re.findall(r"python (analyses/\S+\.py)", README):
        assert (ROOT / path).is_file()
    for module in re.findall(r"python -m\s+(harmcircuits[.\w]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_the_file_map_names_the_rooms_and_nothing_else():
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", README.split("## Files")[1], flags=re.M))
    package = ROOT / "harmcircuits"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert listed == rooms | files
