"""The page of a study, and views saved as pages, opened from disk in a browser without a network.

Would catch: an error on the console, a page that scrolls sideways on a phone or clips a table on a
laptop, a section that is empty, a table that the keyboard does not reach, a dark page with dark text
or a white view, a mask that cannot be downloaded, a token without its value on hovering.
"""

from dataclasses import replace

import pytest
import torch

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.studies.study_page import write_study_page
from harmcircuits.views.circuitsvis import (
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)

pytestmark = pytest.mark.slow

OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CLIPPED = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1)"
SHORTEST = "Math.min(...[...document.querySelectorAll('section')].map(e => e.innerText.length))"
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
MISSING = {"shipped": 1, "own": 2, "no mask": 3}  # sentences in place of what cannot be shown
WORDS = ["<bos>", "tell", "me", "sure"]
SQUARE = torch.eye(4)[None]
VIEWS = {
    "tokens": coloured_tokens(WORDS, torch.tensor([0.0, 0.5, -2.0, 1.0])),
    "attention": attention_pairs(WORDS, SQUARE, SQUARE, [(0, 1)]),
    "neurons": activated_tokens(WORDS, torch.ones(2, 4), torch.zeros(2, 4), [(0, 1), (1, 2)]),
    "gained": gained_tokens(WORDS, torch.eye(4) - 0.25, WORDS, k=2),
}


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory):
    """Name -> page: of a shipped model, the same as of a reader's own, and without a mask."""
    run = finished.run
    own = replace(run, model=replace(run.model, is_invented=False))
    folder = tmp_path_factory.mktemp("pages")
    for name, shown in {"shipped": run, "own": own, "no mask": replace(run, choice=None)}.items():
        write_study_page(shown, folder / f"{name}.html")
    for name, view in VIEWS.items():
        view.save(folder / f"{name}.html")
    return folder


@pytest.fixture
def open_page(browser, pages):
    """open_page("shipped", 390, "dark") -> the page; at the end its console must hold no error."""
    contexts, errors = [], []

    def open_(name: str, width: int, scheme: str = "light"):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_load_state()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


@pytest.mark.parametrize("name", MISSING)
def test_it_fits_and_every_section_has_content_or_says_why_not(open_page, name):
    assert open_page(name, 390).evaluate(OVERFLOWING) == 0
    page = open_page(name, 1280)
    assert page.evaluate(OVERFLOWING) == 0
    assert page.evaluate(f"{CLIPPED}.length") == 0, "a table or figure is clipped"
    assert page.locator("section").count() == 7
    assert page.evaluate(SHORTEST) > 60
    assert page.locator(".missing").count() == MISSING[name]


def test_the_dark_page_is_dark_and_the_keyboard_reaches_every_table(open_page):
    page = open_page("shipped", 390, "dark")
    assert page.evaluate(COLOURS) == ["rgb(20, 20, 20)", "rgb(236, 238, 241)"]
    names = page.evaluate("[...document.querySelectorAll('.wide')].map(e => e.ariaLabel)")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.ariaLabel"))
    assert all(names) and set(names) <= reached


def test_the_mask_is_downloaded(open_page, tmp_path):
    page = open_page("shipped", 1280)
    with page.expect_download() as download:
        page.get_by_text("Download the mask").click()
    download.value.save_as(tmp_path / "circuit.safetensors")
    assert WeightMask.load(tmp_path / "circuit.safetensors").n_removed > 0


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_drawn_and_fits(open_page, name):
    page = open_page(name, 390, "dark")
    page.locator("[id^=circuits-vis] *").first.wait_for()
    assert page.evaluate(OVERFLOWING) == 0
    assert "invert" in page.evaluate("getComputedStyle(document.querySelector('.drawn')).filter")
    if name == "tokens":
        page.get_by_text("me", exact=True).first.hover()
        page.get_by_text("-2").first.wait_for()
