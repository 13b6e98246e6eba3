"""The README is short and true: its code prints what it shows, its claims and commands are ours.

Would catch: an example that no longer works or prints something else, a room that is gone. Its
tables are held to the rows by `test_written_pages`, its links by `test_docs`.
"""

import re
from itertools import pairwise

import pytest
from pages import README, ROOT, blocks

TEXT = README.read_text(encoding="utf-8")
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def test_the_code_prints_what_is_shown(capsys):
    """Words exactly, figures within a tenth, but for the answer of a masked model."""
    (code,), (output,) = blocks(TEXT, "python"), blocks(TEXT, "text")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = output.splitlines()
    assert len(printed) == len(expected)

    # Greedy words of an incoherent model turn on the last bit, so on the machine.
    says = [line for line in printed if " -> " in line]
    assert says[0] != says[1], "another answer under the mask"
    incoherent = printed.index(says[1])
    for number, (line, quote) in enumerate(zip(printed, expected, strict=True)):
        if number == incoherent:
            line, quote = (text.split(" -> ")[0] for text in (line, quote))
        assert NUMBER.sub("#", line) == NUMBER.sub("#", quote)
        assert figures(line) == pytest.approx(figures(quote), rel=0.1, abs=2)


def figures(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def test_the_tests_command_is_one_line():
    """`.ci/run` takes it from this file."""
    assert len(re.findall(r"^pip install -e .*pytest.*$", TEXT, flags=re.M)) == 1


def test_every_room_is_named_in_order():
    """Each room imports only from earlier ones."""
    where = TEXT.split("## Where things are")[1].split("\n## ")[0]
    rooms = {path.parent.name for path in (ROOT / "harmcircuits").glob("*/__init__.py")}
    rooms_in_order = [name for name in re.findall(r"(\w+)/`", where) if name in rooms]
    assert set(rooms_in_order) == rooms
    order = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1]
    for above, below in pairwise(rooms_in_order):
        assert order.index(below) < order.index(above)
