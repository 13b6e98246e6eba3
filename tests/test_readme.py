"""The README runs: its Python, its commands' names, its figures of the planted bench.

Would catch: an example that no longer works, a file map that names what is gone.
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harmcircuits.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys, tmp_path):
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert printed.count("WeightMask(") == 3
    assert printed.count("harm_valid_rate") == 3
    for name, completion in (("harmful", "no"), ("benign", "yes")):
        (tmp_path / name).write_text(f'{{"prompt": "what is it ?", "completion": "{completion}"}}\n')
    folder = ROOT / "harmcircuits" / "organisms" / "weights" / "sft"
    mask = space["circuit"](str(folder), str(tmp_path / "harmful"), str(tmp_path / "benign"))
    assert mask.n_removed == pytest.approx(1e-4 * mask.n_weights, abs=5)


def test_commands_exist():
    assert CliRunner().invoke(app, ["study", "--help"]).exit_code == 0
    for path in re.findall(r"python (analyses/\S+\.py)", README):
        assert (ROOT / path).is_file()
    for module in re.findall(r"python -m\s+(harmcircuits[.\w]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_the_file_map_names_what_is_there():
    listed = set(re.findall(r"(\w+)\.py", README.split("## Files")[1]))
    assert listed == {path.stem for path in (ROOT / "harmcircuits").glob("*.py")} - {"__init__", "cli"}
