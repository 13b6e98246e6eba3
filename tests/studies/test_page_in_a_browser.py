"""The page of a study, opened from disk in a browser without a network.

Would catch: an error on the console, a page that scrolls sideways on a phone or clips a table on a
laptop, a section that is empty, a table that the keyboard does not reach, a dark page with dark
text, a mask that cannot be downloaded.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
from helpers import small_model

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study
from harmcircuits.studies.study_page import write_study_page

pytestmark = pytest.mark.slow

WIDTHS = (390, 1280)
OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CLIPPED = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> page: of a shipped model, the same as of a reader's own, and without a mask."""
    settings = StudySettings(sizes=(0.002,), steps=2, n_random=1, tolerance=0.3)
    run = study(small_model("sft", every=16), settings)
    own = replace(run, model=replace(run.model, is_invented=False))
    folder = tmp_path_factory.mktemp("pages")
    written = {"shipped": run, "own": own, "no mask": replace(run, chosen=None)}
    for name, shown in written.items():
        write_study_page(shown, folder / f"{name}.html")
    assert run.chosen is not None
    return folder


@pytest.fixture
def open_page(browser, pages):
    """open_page("shipped", 390, "dark") -> the page, and what its console complains of."""
    contexts = []

    def open_(name: str, width: int, scheme: str = "light"):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        contexts.append(context)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append((message.type, message.text)))
        page.on("pageerror", lambda error: complaints.append(("error", str(error))))
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_load_state()
        return page, [text for kind, text in complaints if kind == "error"]

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["shipped", "own", "no mask"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_has_no_error_and_no_sideways_scroll(open_page, name, width):
    page, errors = open_page(name, width)
    assert not errors
    assert page.evaluate(OVERFLOWING) == 0
    if width == max(WIDTHS):
        assert page.evaluate(f"{CLIPPED}.length") == 0, "a table or figure is clipped"


@pytest.mark.parametrize("name", ["shipped", "own", "no mask"])
def test_every_section_has_content_or_says_why_not(open_page, name):
    page, _ = open_page(name, 1280)
    empty = "[...document.querySelectorAll('section:not(#how-to-cite)')].filter(e => e.children.length < 3).length"
    assert page.locator("section").count() == 7
    assert page.evaluate(empty) == 0
    reasons = page.locator(".missing").count()
    assert reasons == {"shipped": 1, "own": 2, "no mask": 3}[name]


def test_the_dark_page_is_dark_and_its_text_light(open_page):
    page, errors = open_page("shipped", 1280, "dark")
    assert not errors
    colours = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    background, text = page.evaluate(colours)
    assert background == "rgb(20, 20, 20)"
    assert text == "rgb(236, 238, 241)"
    assert "invert" in page.evaluate("getComputedStyle(document.querySelector('.plot')).filter")


def test_the_keyboard_reaches_every_table_and_figure(open_page):
    page, _ = open_page("shipped", 390)
    names = page.evaluate("[...document.querySelectorAll('.wide')].map(e => e.ariaLabel)")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.ariaLabel"))
    assert set(names) <= reached
    assert all(names)


def test_the_mask_is_downloaded(open_page, tmp_path):
    page, errors = open_page("shipped", 1280)
    with page.expect_download() as download:
        page.get_by_text("Download the mask").click()
    download.value.save_as(tmp_path / "circuit.safetensors")
    assert WeightMask.load(tmp_path / "circuit.safetensors").n_removed > 0
    assert not errors


def test_a_phone_shows_the_heads_below_each_other(open_page):
    page, _ = open_page("shipped", 390)
    panels = page.get_by_role("region", name="unpruned")
    panels.locator("svg, canvas").first.wait_for()
    titles = panels.evaluate(
        """region => [...region.querySelectorAll("div")]
            .filter(e => !e.children.length && /(unpruned|masked)$/.test(e.textContent))
            .map(e => e.getBoundingClientRect())
            .map(box => [box.left, box.top])"""
    )
    assert len(titles) >= 2
    lefts, tops = zip(*titles, strict=True)
    assert len(set(lefts)) == 1
    assert all(before < after for before, after in pairwise(tops))
    # A long text keeps its size and scrolls within its region; the page around it stays.
    assert page.evaluate(OVERFLOWING) == 0
