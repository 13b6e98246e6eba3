"""Names in the package are nouns for the values that they hold.

Would catch: a new value, argument, function or class whose name is a participle, a pronoun or an
adverb, or begins with `of_`.
"""

import ast
import re
from collections.abc import Iterator

from pages import ROOT

LIMIT = 19  # only ever lower it

NO_NOUN = re.compile(
    r"""
    _* (
        of_ .*
        | added | allowed | answered | asked | begun | broken | called | chosen | counted | done
        | drawn | ended | found | given | gone | got | held | joined | judged | kept | known | left
        | limited | listed | looked | lost | made | matched | measured | moved | named | noted
        | opened | ordered | paired | put | reached | refused | said | scored | seen | sent | shared
        | shown | spared | stored | taken | told | tried | used | wanted | written
        | both | each | few | fewer | it | less | many | mine | more | most | much | one | ones | other
        | others | same | some | such | that | them | these | they | this | those | what | which | whom
        | whose | after | another | before | here | now | only | still | then | there
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def stored_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each value, argument, function and class that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def test_the_words_tell_participles_from_nouns():
    tree = ast.parse("def kept(of_mask, mask):\n    self._found = masks = 1\nclass Told: pass")
    names = [name for _, name in stored_names(tree) if NO_NOUN.fullmatch(name)]
    assert sorted(names) == ["Told", "_found", "kept", "of_mask"]


def test_no_new_name_is_a_participle_a_pronoun_or_an_adverb():
    places = []
    for path in sorted((ROOT / "harmcircuits").rglob("*.py")):
        for line, name in stored_names(ast.parse(path.read_text(encoding="utf-8"))):
            if NO_NOUN.fullmatch(name):
                places.append(f"{path.relative_to(ROOT)}:{line} {name}")
    text = "\n".join([f"{len(places)} names, at most {LIMIT}: say what the value is", *places])
    assert len(places) <= LIMIT, text
