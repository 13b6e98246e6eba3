"""The README and the pages of docs/, as tests read them: text, code blocks, tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
LOG = sorted((DOCS / "log").glob("*.md"))  # earlier results, by date: outside the navigation


def text_of(path: Path | str) -> str:
    """The text of a page, by its path or its name within docs/."""
    return (DOCS / path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page are linked to."""
    outside_code = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    names = set()
    for heading in re.findall(r"^#+ (.*)$", outside_code, flags=re.M):
        anchor = re.search(r"\{ #([\w-]+) \}$", heading)
        words = re.sub(r"[^\w\s-]", "", heading.lower())
        names.add(anchor[1] if anchor else re.sub(r"[\s-]+", "-", words.strip()))
    return names
