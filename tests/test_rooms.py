"""Rooms of numbers load no model library. Would catch TransformerLens behind an annotation."""

import subprocess
import sys

ROOMS = ("circuits", "measurements", "prompts", "storage", "display")


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
