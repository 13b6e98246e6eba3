"""What a wheel holds and says: its types, its pages, its models.

Would catch: a wheel without `py.typed`, so that a reader's type checker sees nothing; without the
templates of pages or the shipped models; a classifier that no registry knows.
"""

import subprocess
import sys
import tomllib
import zipfile

import pytest
from pages import ROOT

SHIPPED = (
    "harmcircuits/py.typed",
    "harmcircuits/views/page.html",
    "harmcircuits/views/parts.html",
    "harmcircuits/organisms/weights/sft/config.json",
)


def test_what_ships_is_there():
    assert [name for name in SHIPPED if not (ROOT / name).is_file()] == []


def test_classifiers_are_known_and_say_that_it_is_typed():
    known = pytest.importorskip("trove_classifiers", reason="pip install trove-classifiers")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["classifiers"]) <= known.classifiers
    assert "Typing :: Typed" in project["classifiers"]


@pytest.mark.slow
def test_the_wheel_holds_it(tmp_path):
    pytest.importorskip("hatchling", reason="pip install hatchling, which builds offline then")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert set(SHIPPED) <= set(zipfile.ZipFile(wheel).namelist())
