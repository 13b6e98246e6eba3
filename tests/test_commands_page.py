"""The page `docs/commands.md`: every command with its options, as the command line has them.

`PYTHONPATH=tests python tests/test_commands_page.py` writes it anew. Would catch: an option that the
page lacks or still has, another default, other words.
"""

import re

import typer
from pages import DOCS
from typer.main import get_command

from harmcircuits.cli import app
from harmcircuits.studies.models import CACHE

FILE = DOCS / "commands.md"
INTRODUCTION = """# Commands

Every command with its options and defaults. Written by `PYTHONPATH=tests python
tests/test_commands_page.py`; a test fails when it is out of date. `harmcircuits COMMAND --help` shows
the same in a terminal. How they belong together is said in [your own model](own_model.md).
"""


def page() -> str:
    parts = [INTRODUCTION]
    root = get_command(app)
    context = typer.Context(root, info_name="harmcircuits")
    for name, command in root.commands.items():
        parts.append(f"## harmcircuits {name}\n")
        parts.append(plain(command.help) + "\n")
        rows = []
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is None:  # an argument, which typer words by itself
                record = (parameter.make_metavar(context), parameter.help or "")
            rows.append(row(parameter, *record))
        parts.append(
            "| option | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def row(parameter, option: str, words: str) -> str:
    """A line of the table, from what typer says of an option."""
    default = ""
    match = re.search(r"\s*\[(required|default: .*)\]$", words, flags=re.S)
    if match:
        words = words[: match.start()]
        default = match[1].removeprefix("default: ")
    if default.startswith("(") and default.endswith(")"):
        default = default[1:-1]
    default = default.replace(str(CACHE), "the user's cache folder")
    is_switch = " / " in option  # on, and off: both names are shown
    name = option if is_switch else option.split(" ")[0].rstrip(",")
    return f"| `{name}` | {escaped(plain(default))} | {escaped(plain(words))} |"


def plain(text: str | None) -> str:
    return " ".join((text or "").split())


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;").replace("*", "\\*")


def test_the_page_is_up_to_date():
    assert FILE.read_text(encoding="utf-8") == page(), (
        "run PYTHONPATH=tests python tests/test_commands_page.py"
    )


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
