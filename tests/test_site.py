"""The site is whole: every page is in it, every public name in its reference; it builds offline.

Would catch: a page or a name that the site leaves out, a broken link between pages, a font or a
script that a page would load from elsewhere.
"""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from pages import DOCS, LOG, PAGES, ROOT

import harmcircuits as hc

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_once():
    navigation = Counter(re.findall(r"[\w/]+\.md\b", CONFIG.split("\nnav:")[1]))
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES if page not in LOG]
    assert navigation == Counter([*pages, "tour.md"])


def test_every_public_name_is_in_the_reference_once():
    names = Counter()
    for page in (DOCS / "reference").glob("*.md"):
        names.update(re.findall(r"^::: harmcircuits\.(?:\w+\.)?(\w+)$", page.read_text(), re.M))
    assert names == Counter(hc.__all__)


def test_the_list_of_the_reference_is_whole():
    text = (DOCS / "reference" / "index.md").read_text()
    assert sorted(re.findall(r"\[`(\w+)`\]\[harmcircuits", text)) == hc.__all__


@pytest.mark.slow
def test_it_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for path, text in pages.items():
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s>]*",
            text,
        )
        assert not [tag for tag in loaded if "canonical" not in tag], path
    for path in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()[\s\"']*(?:https?:)?//", path.read_text()), path

    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert not [entry for entry in index["docs"] if entry["location"].startswith("log/")]
