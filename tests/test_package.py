"""Would catch a wheel without `py.typed`, the stub of public names, the templates of pages, the style
of figures or the shipped models."""

import subprocess
import sys
import zipfile

import pytest
from pages import ROOT

SHIPPED = (
    "harmcircuits/py.typed",
    "harmcircuits/__init__.pyi",
    "harmcircuits/views/figures.mplstyle",
    "harmcircuits/views/page.html",
    "harmcircuits/views/parts.html",
    "harmcircuits/studies/study_page.html",
    "harmcircuits/organisms/weights/sft/config.json",
)


@pytest.mark.slow
def test_the_wheel_holds_it(tmp_path):
    pytest.importorskip("hatchling", reason="pip install hatchling, which builds offline then")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert set(SHIPPED) <= set(zipfile.ZipFile(wheel).namelist())
