"""Rooms import only from those below them, and numbers need no model.

Would catch: an import that points up, a file outside the rooms, TransformerLens behind an annotation.
"""

import subprocess
import sys

from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import harmcircuits

ROOMS = ("circuits", "measurements", "prompts", "storage", "display")


def test_no_room_imports_from_one_above_it():
    configure()
    assert lint_imports(
        config_filename="pyproject.toml", is_debug_mode=False, show_timings=False, verbose=False
    )


def test_what_handles_numbers_only_loads_no_model_library():
    code = f"""
import pkgutil, sys, importlib
for name in {ROOMS}:
    room = importlib.import_module("harmcircuits." + name)
    for module in pkgutil.iter_modules(getattr(room, "__path__", [])):
        importlib.import_module(f"harmcircuits.{{name}}.{{module.name}}")
print(sorted({{"transformer_lens", "transformers"}} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there_and_there_are_about_forty():
    names = set(harmcircuits.__all__)
    assert names <= set(dir(harmcircuits))
    assert all(getattr(harmcircuits, name) is not None for name in names)
    assert 35 <= len(names) <= 45
