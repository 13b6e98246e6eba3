"""How values show themselves: in one short line, and in a notebook as a small table and picture.

Would catch: a repr that prints tensors, a text that is taken for HTML, a request that is shown, a
script or a host in what is displayed, a picture that reads whole weights.
"""

import re
from html import unescape

import pytest
import torch
from helpers import random_batch, small_model

from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import Source
from harmcircuits.display import (
    heat_strip,
    listed,
    number_text,
    plural,
    settings_text,
    share,
)
from harmcircuits.measurements import SHOWN_ROWS, Measurement, Rows
from harmcircuits.search.attribution import random_scores

HOSTILE = "<script>alert('x')</script>&lt;"


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
    empty = [mask - mask, Rows()]
    return [model, scores, mask, overlap(mask, mask), rows, rows[0], *empty, calibration, behaviour]


def test_every_value_shows_itself_in_one_line_and_a_table(values):
    requests = values[-1].prompts("heldout")
    for value in values:
        text, html = repr(value), value._repr_html_()
        assert text.startswith(f"{type(value).__name__}("), "it says what it is"
        assert "\n" not in text and "tensor(" not in text and len(text) <= 200
        assert "<table" in html and not re.search("<(script|style|link|iframe|img)", html)
        assert "http" not in html and "url(" not in html and len(html) < 40_000
        assert not any(example.prompt in text + html for example in requests), "may be harmful"


def test_hostile_text_is_shown_as_text():
    labels = {"mask": HOSTILE, HOSTILE: "a"}
    rows = Rows([Measurement.exact(HOSTILE, labels, 1), Measurement.exact("b", {}, 2)])
    for value in (rows, rows[0], small_mask({HOSTILE: HOSTILE})):
        html = value._repr_html_()
        assert "<script" not in html and HOSTILE in unescape(html).replace("…", "")
    picture = heat_strip({(0, HOSTILE): 1.0}, {(0, HOSTILE): HOSTILE})
    assert "<script" not in picture and unescape(picture).count(HOSTILE) == 2


def fills(html: str) -> list[float]:
    """How strongly the cells of a heat strip are coloured, line by line."""
    return [float(value) for value in re.findall(r"rgba\(208,84,63,([\d.]+)\)", html)]


def test_a_mask_s_picture_is_the_share_of_each_matrix():
    html = small_mask()._repr_html_()
    assert fills(html) == [0.0, 1.0], "matrices that have no place are left out"
    assert "layer 1 attn.q: 5 of 20, 25%" in html and "6 of 43 weights" in html


def test_a_mask_of_a_large_model_is_shown_at_once():
    """A billion weights: as a dense tensor of bools they are a gigabyte."""
    shapes = {f"blocks.{layer}.mlp.in.weight": (8192, 4096) for layer in range(32)}
    removed = {name: torch.arange(1000) for name in shapes}
    mask = WeightMask(removed, shapes, Source("m", "by hand"))
    assert len(fills(mask._repr_html_())) == 32


def test_rows_say_once_what_they_share_and_are_cut():
    n = SHOWN_ROWS + 5
    labels = [{"split": "heldout", "size": number} for number in range(n)]
    rows = Rows(Measurement("a_rate", of_row, 0.5, 0.25, 0.75, 8) for of_row in labels)
    html = rows._repr_html_()
    assert html.count("<tr") == SHOWN_ROWS + 1
    assert html.count("heldout") == 1
    assert "50% [25%, 75%]" in html and "and 5 more" in html


def test_numbers_and_lists_of_any_size_are_readable():
    numbers = (0, 12.0, 98304, 1234.5, 1e-7)
    assert list(map(number_text, numbers)) == ["0", "12", "98,304", "1,234", "1e-07"]
    shares = {0: "0%", 1: "100%", 0.344: "34%", 0.0601: "6.01%", 0.0000123: "0.0012%"}
    assert {part: share(part) for part in shares} == shares
    assert (plural(1, "mask"), plural(1200, "weight")) == ("1 mask", "1,200 weights")
    assert settings_text({"a": "x" * 90}) == f"a {'x' * 40}…"
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, 8", "one more is written out"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
