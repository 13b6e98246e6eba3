"""The README is short and true: its code prints what it shows, its figures and commands are ours.

Would catch: an example that no longer works or prints something else, a figure that no row has, a README
that grows. Its table is held to the rows by `test_written_pages`, its links by `test_docs`.
"""

import os
import re
from functools import partial
from itertools import pairwise

import pytest
from blocks import committed
from pages import README, ROOT, blocks

import harmcircuits as hc

TEXT = README.read_text(encoding="utf-8")
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
LONGEST = 110
# A sentence's figure and its row: <!-- 268: FILE METRIC LABEL=VALUE ... -->
SOURCE = re.compile(r"<!-- ([\d,.]+%?): (\w+) (\w+) ([^>]*) -->")
NO_PROSE = (
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"<!-- findings -->.*<!-- /findings -->", re.DOTALL),  # written from rows
    re.compile(r"<.*?>", re.DOTALL),
    re.compile(r"!\[[^]]*\]|\]\([^)]*\)|`[^`]*`"),
    re.compile(r"arXiv [\d.]+|et al\.\s\d{4}|Python [\d.]+|TransformerLens [\d.]+"),
)
# The real model of the first example: a folder.
QWEN = os.environ.get("HARMCIRCUITS_QWEN", "")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= LONGEST


@pytest.mark.slow
@pytest.mark.skipif(not QWEN, reason="HARMCIRCUITS_QWEN names no folder of the real model")
def test_the_real_model_prints_what_is_shown(monkeypatch, tmp_path, capsys):
    really_open = partial(hc.open_model, cache=tmp_path)
    monkeypatch.setattr(hc, "open_model", lambda _, **options: really_open(QWEN, **options))
    exec(compile(blocks(TEXT, "python")[0], "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks(TEXT, "text")[0]


def test_the_toy_model_prints_what_is_shown(capsys):
    """Words exactly, figures within a tenth."""
    exec(compile(blocks(TEXT, "python")[1], "README.md", "exec"), {"hc": hc})
    printed = capsys.readouterr().out
    expected = blocks(TEXT, "text")[1]
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    assert figures(printed) == pytest.approx(figures(expected), rel=0.1, abs=2)


def figures(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_every_figure_in_a_sentence_names_its_row():
    prose = TEXT
    for pattern in NO_PROSE:
        prose = pattern.sub("", prose)
    in_prose = set(re.findall(r"(?<![\w.-])\d[\d,.]*\d%?|(?<![\w.-])\d+%?(?![\w-])", prose))
    assert in_prose == {source[0] for source in SOURCE.findall(TEXT)}


@pytest.mark.parametrize("source", SOURCE.findall(TEXT), ids=lambda source: source[0])
def test_the_row_of_a_figure_has_it(source):
    figure, file, metric, labels = source
    values = dict(label.split("=", 1) for label in labels.split())
    rows = hc.Rows(
        row
        for row in committed(file).where(metric)
        if all(str(row.labels.get(name)) == value for name, value in values.items())
    )
    assert figure in (f"{rows.one().mean:,.0f}", f"{rows.one().mean:.0%}")


def test_the_tests_command_is_one_line():
    """`.ci/run` takes it from this file."""
    assert len(re.findall(r"^pip install -e .*pytest.*$", TEXT, flags=re.M)) == 1


def test_every_room_is_named_in_order():
    """In the map for contributors; each room imports only from earlier ones."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    where = text.split("Rooms, from the ground up")[1].split("```")[0]
    rooms = {path.parent.name for path in (ROOT / "harmcircuits").glob("*/__init__.py")}
    rooms_in_order = [name for name in re.findall(r"(\w+)/`", where) if name in rooms]
    assert set(rooms_in_order) == rooms
    order = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1]
    for below, above in pairwise(rooms_in_order):
        assert order.index(above) < order.index(below)
