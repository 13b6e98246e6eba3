"""Rooms import only from those below them, and numbers need no model.

Would catch: an import that points up, a file outside the rooms, TransformerLens behind an annotation.
"""

import subprocess
import sys

import pytest
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import harmcircuits

ROOMS = ("circuits", "measurements", "prompts", "storage", "display")


def test_no_room_imports_from_one_above_it():
    configure()
    assert lint_imports(
        config_filename="pyproject.toml", is_debug_mode=False, show_timings=False, verbose=False
    )


@pytest.mark.parametrize("name", ["harmcircuits", *(f"harmcircuits.{room}" for room in ROOMS)])
def test_what_handles_numbers_only_loads_no_model_library(name):
    code = f"""
import pkgutil, sys, importlib
room = importlib.import_module({name!r})
if {name!r} != "harmcircuits":
    for module in pkgutil.iter_modules(getattr(room, "__path__", [])):
        importlib.import_module({name!r} + "." + module.name)
print(sorted({{"transformer_lens", "transformers"}} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there_and_there_are_about_forty():
    names = [name for name in harmcircuits.__all__]
    for name in names:
        assert getattr(harmcircuits, name) is not None
        assert name in dir(harmcircuits)
    assert 35 <= len(names) <= 45
