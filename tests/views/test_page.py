"""One HTML file and its parts.

Would catch: text that is taken for HTML, a page without one of its parts, a script that is brought
twice.
"""

from plotly.graph_objects import Bar, Figure

from harmcircuits.views.page import (
    contents,
    download,
    headline,
    missing,
    paragraphs,
    plot,
    section,
    table,
    write_page,
)


def test_texts_are_escaped():
    assert "<p>a &lt; b</p>" in section("x", "a < b", "<i>content</i>")
    assert "<h2>x &amp; y</h2>" in section("x & y", "", "")
    assert "<i>content</i>" in section("x", "", "<i>content</i>"), "content is HTML"
    assert paragraphs("a < b\nc").count("<p") == 2
    assert "a &lt; b" in paragraphs("a < b\nc")
    assert '<th scope="col">&lt;b&gt;</th>' in table(["<b>"], [])


def test_what_follows_a_line_break_in_a_cell_is_small():
    html = table(["mask", "harm"], [["a", "77.0\n63.0 – <88.0"]], style="figures")
    assert 'class="figures"' in html
    assert "<td>a</td><td>77.0<small>63.0 – &lt;88.0</small></td>" in html


def test_links_lead_to_their_sections():
    part = section("Can it be trusted?", "", "")
    assert 'id="can-it-be-trusted"' in part
    assert 'href="#can-it-be-trusted"' in contents(["Can it be trusted?"])


def test_headline_reasons_and_files_are_escaped():
    assert "<dd>0 &lt; 1<small>&amp;</small></dd>" in headline([("harm", "0 < 1", "&")])
    assert '<p class="missing">a &lt; b</p>' in missing("a < b")
    assert 'download="a.bin" href="data:application/octet-stream;base64,AQI="' in download(
        "a.bin", b"\x01\x02", "file"
    )


def test_tables_and_figures_are_named_and_reached_by_keyboard():
    figure = Figure(Bar(x=[1], y=[2]))
    for html in (table(["a"], [], label='"rates"'), plot(figure, label='"rates"')):
        assert 'tabindex="0"' in html
        assert 'aria-label="&#34;rates&#34;"' in html


def test_a_page_holds_its_parts_in_order(tmp_path):
    path = tmp_path / "page.html"
    parts = [section("first", "", ""), section("second", "", "")]
    write_page(path, "<title>", parts, script="<script>here()</script>")
    html = path.read_text(encoding="utf-8")
    assert "<title>&lt;title&gt;</title>" in html
    assert html.index("first") < html.index("second")
    assert html.count("<script>here()</script>") == 1


def test_only_the_first_figure_brings_the_plotting_script():
    figure = Figure(Bar(x=[1], y=[2]))
    assert len(plot(figure, first=True)) > 1_000_000
    assert len(plot(figure)) < 20_000
