"""The examples in docstrings run, and every public name has one.

Would catch: an example that no longer works or prints something else, a public name without one.
Examples use these names: `hc`, `model` (the organism `sft`, asked few requests), its `bridge`, and
`harm` and `benign`, batches of its own verified answers.
"""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import harmcircuits

MODULES = [name for _, name, _ in pkgutil.walk_packages(harmcircuits.__path__, "harmcircuits.")]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def names(sft) -> dict:
    return {
        "hc": harmcircuits,
        "model": sft,
        "bridge": sft.bridge,
        "harm": sft.calibration("harmful").batches,
        "benign": sft.calibration("benign").batches,
    }


@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for examples that write a file
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=FLAGS)
    for example in finder.find(importlib.import_module(name), extraglobs=names):
        result = runner.run(example)
        assert not result.failed, f"{example.name}: see the output above"


@pytest.mark.parametrize("name", harmcircuits.__all__)
def test_every_public_name_has_an_example(name):
    text = inspect.getdoc(getattr(harmcircuits, name)) or ""
    assert ">>>" in text
