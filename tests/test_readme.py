"""The README is short and true: its code prints what it shows, its claims and commands are ours.

Would catch: an example that no longer works or prints something else, a verdict typed in, a figure
that the results page does not have, a link to nowhere, a room that is gone.
"""

import re
from itertools import pairwise

import pytest
import six_findings
from pages import README, ROOT, blocks, text_of

TEXT = README.read_text(encoding="utf-8")
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def test_the_code_prints_what_is_shown(capsys):
    """Words exactly, figures within a tenth; what a masked model says is another matter."""
    (code,), (shown,) = blocks(TEXT, "python"), blocks(TEXT, "text")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = shown.splitlines()
    assert len(printed) == len(expected)

    # Greedy words of a broken model turn on the last bit, so on the machine.
    says = [line for line in printed if " -> " in line]
    assert says[0] != says[1], "another answer under the mask"
    broken = printed.index(says[1])
    for number, (line, wanted) in enumerate(zip(printed, expected, strict=True)):
        if number == broken:
            line, wanted = (text.split(" -> ")[0] for text in (line, wanted))
        assert NUMBER.sub("#", line) == NUMBER.sub("#", wanted)
        assert figures(line) == pytest.approx(figures(wanted), rel=0.1, abs=2)


def figures(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def test_the_verdicts_are_those_that_the_rows_give():
    lines = ["| | claim | verdict | cases |", "|---|---|---|---|"]
    for result in six_findings.committed(six_findings.FINDINGS.values()):
        link = f"[{result.name}](docs/claims.md#{result.name.lower()})"
        lines.append(f"| {link} | {result.text} | **{result.outcome}** | {result.count} |")
    assert "\n".join(lines) in TEXT


def test_the_table_is_a_part_of_the_one_on_the_results_page():
    """Line by line, column by column; the names of lines may be shorter or longer."""
    here, there = (table_of(text) for text in (TEXT, text_of("results.md")))
    assert len(here) == 5
    names = {"published set difference": "published, same size"}
    for name, cells in here.items():
        whole = there[names.get(name, name)]
        assert cells.items() <= whole.items()


def table_of(text: str) -> dict[str, dict[str, str]]:
    """Line -> column -> cell, of the table of masks on `sft`."""
    lines = text.split("| mask on `sft` |")[1].split("\n\n")[0].splitlines()
    columns = cells_of(lines[0])
    return {
        cells[0].strip("*"): dict(zip(columns, cells[1:], strict=True))
        for cells in map(cells_of, lines[2:])
    }


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_tests_command_is_one_line():
    """`.ci/run` takes it from this file."""
    assert len(re.findall(r"^pip install -e .*pytest.*$", TEXT, flags=re.M)) == 1


def test_every_room_is_named_in_order():
    """Each room imports only from those before it."""
    where = TEXT.split("## Where things are")[1].split("\n## ")[0]
    rooms = {path.parent.name for path in (ROOT / "harmcircuits").glob("*/__init__.py")}
    named = [name for name in re.findall(r"(\w+)/`", where) if name in rooms]
    assert set(named) == rooms
    order = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1]
    for above, below in pairwise(named):
        assert order.index(below) < order.index(above)
