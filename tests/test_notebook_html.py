"""How values show themselves in a notebook: a small table and picture, and bars that stay in place.

Would catch: a text that is taken for HTML, a request that is shown, a script or a host in what is
displayed, a colour that only a white page can carry, a picture that reads whole weights, a table
that grows with what it holds, bars that are printed again at each step.
"""

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import random_batch, small_model
from nbclient import NotebookClient

from harmcircuits import progress
from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import by_place
from harmcircuits.display import heat_strip, interval_mark, number_text, settings_text, two_bars
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.measurements import SHOWN_ROWS, Measurement, Rows

HOSTILE = "<script>alert('x')</script>&lt;"


class Outline(HTMLParser):
    """The elements of a piece of HTML and its text as a reader sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("rect", "circle", "line") or not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements close in order"

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def shown(value) -> Outline:
    outline = Outline(value._repr_html_())
    assert not outline.open, "every element is closed"
    return outline


def small_mask(settings=()) -> WeightMask:
    shapes = {"blocks.0.attn.q.weight": (4, 5), "blocks.1.attn.q.weight": (4, 5), "odd": (3,)}
    removed = {"blocks.1.attn.q.weight": torch.arange(5), "odd": torch.tensor([2])}
    return WeightMask(removed, shapes, Source("m", "by hand", dict(settings)))


@pytest.fixture(scope="module")
def values() -> list:
    model = small_model("sft")
    scores = random_scores(model.bridge)
    mask = top_fraction(scores, 0.01, within="model")
    rows = model.measure(only="benign")
    behaviour = model.behaviours["harmful"]
    calibration = Calibration(behaviour.prompts("heldout"), [random_batch()], 40, "harmful")
    return [model, scores, mask, overlap(mask, mask), rows, rows[0], calibration, behaviour]


def test_every_value_has_a_table_and_asks_nothing(values):
    for value in values:
        outline = shown(value)
        assert "table" in outline.tags
        html = value._repr_html_()
        assert type(value).__name__ in html or isinstance(value, Rows)
        assert not {"script", "style", "link", "iframe", "img"} & set(outline.tags)
        assert "http" not in html and "url(" not in html
        assert not re.search(r"background(-color)?:\s*(#fff|white)", html)
        assert not re.search(r'(fill|color)[:=]"?(#000|black|white)', html)
        assert len(html) < 40_000


def test_requests_are_not_shown(values):
    model = values[0]
    written = " ".join(value._repr_html_() for value in values)
    for example in model.behaviours["harmful"].prompts("heldout"):
        assert example.prompt not in written


def test_hostile_text_is_shown_as_text():
    labels = {"mask": HOSTILE, HOSTILE: "a"}
    rows = Rows([Measurement.exact(HOSTILE, labels, 1), Measurement.exact("b", {}, 2)])
    for value in (rows, rows[0], small_mask({HOSTILE: HOSTILE})):
        outline = shown(value)
        assert "script" not in outline.tags
        assert HOSTILE in outline.text.replace("…", "")
    picture = Outline(heat_strip({(0, HOSTILE): 1.0}, {(0, HOSTILE): HOSTILE}))
    assert picture.texts.count(HOSTILE) == 2 and "script" not in picture.tags


# Masks and scores


def fills(html: str) -> list[float]:
    """How strongly the cells of a heat strip are coloured, line by line."""
    return [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', html)]


def test_a_mask_s_picture_is_the_share_of_each_matrix():
    html = small_mask()._repr_html_()
    assert fills(html) == [0.0, 1.0], "matrices that have no place are left out"
    outline = Outline(html)
    assert "layer 1 attn.q: 5 of 20, 25%" in outline.texts
    assert "6 of 43 weights" in outline.text


def test_places_are_in_the_order_of_a_block():
    values = {"blocks.1.mlp.in.weight": 1, "blocks.0.attn.q.weight": 2, "blocks.0.x.weight": 3}
    expected = [(0, "attn.q"), (1, "mlp.in"), (0, "x")]
    assert list(by_place(values | {"a.b.c": 4})) == expected


def test_a_mask_of_a_large_model_is_shown_at_once():
    """A billion weights: as a dense tensor of bools they are a gigabyte."""
    shapes = {f"blocks.{layer}.mlp.in.weight": (8192, 4096) for layer in range(32)}
    removed = {name: torch.arange(1000) for name in shapes}
    mask = WeightMask(removed, shapes, Source("m", "by hand"))
    start = time.perf_counter()
    html = mask._repr_html_()
    assert time.perf_counter() - start < 0.5
    assert len(fills(html)) == 32


def test_an_empty_mask_and_no_rows_are_shown():
    assert "0 of" in shown(small_mask() - small_mask()).text
    assert shown(Rows()).text == "0 rows"


# Rows


def test_rows_say_once_what_they_share_and_are_cut():
    n = SHOWN_ROWS + 5
    labels = [{"split": "heldout", "size": number} for number in range(n)]
    rows = Rows(Measurement("a_rate", of_row, 0.5, 0.25, 0.75, 8) for of_row in labels)
    outline = shown(rows)
    assert outline.tags.count("tr") == SHOWN_ROWS + 1
    assert outline.text.count("heldout") == 1
    assert "50% [25%, 75%]" in outline.text
    assert "and 5 more" in outline.text


def test_a_label_that_some_rows_lack_is_a_column():
    rows = Rows([Measurement.exact("a", {"mask": "x"}, 1), Measurement.exact("a", {}, 2)])
    assert "mask" in shown(rows).texts


def test_marks_stand_where_the_figures_are():
    html = interval_mark(0.25, 0.5, 1.0, (0.0, 1.0))
    x = [float(value) for value in re.findall(r'(?:x1|x2|cx)="([\d.]+)"', html)]
    start, end, low, high, mean = x
    assert (low - start) / (end - start) == pytest.approx(0.25, abs=0.01)
    assert (mean - start) / (end - start) == pytest.approx(0.5, abs=0.01)
    assert high == end


def test_bars_of_two_masks_lie_over_each_other_by_what_they_share():
    html = two_bars(30, 20, 10)
    widths = [
        float(value) for value in re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', html)
    ]
    assert widths == pytest.approx([300 * 30 / 40, 300 * 20 / 40, 300 * 10 / 40], abs=0.1)


def test_numbers_of_any_size_are_readable():
    assert [number_text(value) for value in (0, 12.0, 98304, 1234.5, 1e-7)] == [
        "0",
        "12",
        "98,304",
        "1,234",
        "1e-07",
    ]
    assert number_text(float("nan")) == "nan" and number_text(float("inf")) == "inf"
    assert settings_text({"a": "x" * 90}) == f"a {'x' * 40}…"


# Bars


# A package that is empty but for its path: its own would load torch, which takes seconds.
CELL = f"""
import sys, types, warnings
warnings.simplefilter("error")
package = sys.modules["harmcircuits"] = types.ModuleType("harmcircuits")
package.__path__ = [{str(Path(progress.__file__).parent)!r}]
from harmcircuits.progress import progress_bar
with progress_bar() as bars:
    for step in bars.track(range(30), description="<b>steps"):
        pass
    other = bars.add_task("others", total=4)
    bars.advance(other)
    bars.update(other, advance=2)
"""


def test_a_notebook_has_one_output_of_bars_drawn_in_place():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data", "no warning, nothing printed"
    outline = Outline(output.data["text/html"])
    assert "b" not in outline.tags and "<b>steps 30/30" in outline.text
    assert "others 3/4" in outline.text
    assert output.data["text/plain"].startswith("<b>steps 30/30")
