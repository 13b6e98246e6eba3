"""Examples in docstrings stand as code in the reference, not as nested quotations."""

import re

import griffe

# From a prompt to the next blank line; prompts and their output.
EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n\s*\n|\Z)", flags=re.DOTALL | re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences every doctest of a docstring before it is read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Fence the examples of one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match) -> str:
    """An example between fences, as far indented as it is."""
    indent = example[1]
    return f"{indent}```pycon\n{example[0].rstrip()}\n{indent}```"
