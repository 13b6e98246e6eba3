"""One HTML file and its parts.

Would catch: text that is taken for HTML, a page without one of its parts, a table or figure that the
keyboard does not reach.
"""

import pytest

from harmcircuits.views import page
from harmcircuits.views.figures import comparison_figure

HOSTILE = '<b>"a" & b</b>'
ESCAPED = "&lt;b&gt;&#34;a&#34; &amp; b&lt;/b&gt;"
TABLE = page.table([HOSTILE], [[f"{HOSTILE}\n{HOSTILE}"]], style="figures", label=HOSTILE)
FIGURE = page.plot(comparison_figure({}, {}), label=HOSTILE)
PARTS = {
    "section": (page.section(HOSTILE, HOSTILE, "<i>content</i>"), 2),
    "paragraphs": (page.paragraphs(f"{HOSTILE}\n{HOSTILE}"), 2),
    "key_figures": (page.key_figures([(HOSTILE, HOSTILE, HOSTILE)]), 3),
    "missing": (page.missing(HOSTILE), 1),
    "download": (page.download(HOSTILE, b"\x01\x02", HOSTILE), 2),
    "table": (TABLE, 4),
    "plot": (FIGURE, 1),
    "visual": (page.visual("<i>content</i>", label=HOSTILE), 1),
}


@pytest.mark.parametrize("name", PARTS)
def test_texts_are_escaped(name):
    html, n_texts = PARTS[name]
    assert HOSTILE not in html and html.count(ESCAPED) == n_texts


def test_content_is_html_files_are_within_the_page_and_the_keyboard_reaches_it():
    for name in ("table", "plot", "visual"):
        assert 'tabindex="0"' in PARTS[name][0]
    assert "<i>content</i>" in PARTS["section"][0] and "<i>content</i>" in PARTS["visual"][0]
    assert 'href="data:application/octet-stream;base64,AQI="' in PARTS["download"][0]
