"""The page of a study, opened from disk in a browser without a network.

Would catch: an error on the console, a page that scrolls sideways on a phone or clips a table on a
laptop, a section that is empty, a table that the keyboard does not reach, a dark page with dark
text, a mask that cannot be downloaded.
"""

from dataclasses import replace

import pytest

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.studies.study_page import write_study_page

pytestmark = pytest.mark.slow

OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CLIPPED = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1)"
SHORTEST = "Math.min(...[...document.querySelectorAll('section')].map(e => e.innerText.length))"
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
MISSING = {"shipped": 1, "own": 2, "no mask": 3}  # sentences in place of what cannot be shown


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory):
    """Name -> page: of a shipped model, the same as of a reader's own, and without a mask."""
    run = finished.run
    own = replace(run, model=replace(run.model, is_invented=False))
    folder = tmp_path_factory.mktemp("pages")
    for name, shown in {"shipped": run, "own": own, "no mask": replace(run, chosen=None)}.items():
        write_study_page(shown, folder / f"{name}.html")
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
