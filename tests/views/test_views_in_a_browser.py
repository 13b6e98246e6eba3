"""Views saved as pages, opened from disk in a browser without a network.

Would catch: an error on the console, a menu that switches nothing, a token without its value on
hovering, a page that scrolls sideways on a phone, a dark page with a white view, a still that stays
where scripts run, and is gone where they do not.
"""

import pytest
import torch

from harmcircuits.views.circuitsvis import (
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)
from harmcircuits.views.stills import with_still

pytestmark = pytest.mark.slow

WORDS = ["<bos>", "tell", "me", "sure"]
SQUARE = torch.eye(4)[None]
VIEWS = {
    "tokens": lambda: coloured_tokens(WORDS, torch.tensor([0.0, 0.5, -2.0, 1.0])),
    "attention": lambda: attention_pairs(WORDS, SQUARE, SQUARE, [(0, 1)]),
    "neurons": lambda: activated_tokens(
        WORDS, torch.ones(2, 4), torch.zeros(2, 4), [(0, 1), (1, 2)]
    ),
    "gained": lambda: gained_tokens(WORDS, torch.eye(4) - 0.25, WORDS, k=2),
}
OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def opened(browser):
    """opened(path, width, scheme) -> the page, and what its console complains of."""
    contexts = []

    def open_(path, width=1280, scheme="light", **options):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True, **options)
        contexts.append(context)
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(path.as_uri())
        return page, errors

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_view_is_drawn_and_fits(opened, tmp_path, name, width):
    VIEWS[name]().save(tmp_path / "view.html")
    page, errors = opened(tmp_path / "view.html", width)
    page.locator("[id^=circuits-vis] *").first.wait_for()
    assert not errors
    assert page.evaluate(OVERFLOWING) == 0


def test_a_menu_switches_the_position(opened, tmp_path):
    view = VIEWS["gained"]()
    view.save(tmp_path / "view.html")
    page, errors = opened(tmp_path / "view.html")
    menu = page.locator("select").nth(1)
    first, second = view.props["firstDimensionLabels"][:2]
    assert menu.locator("option:checked").inner_text() == first
    before = page.locator("[id^=circuits-vis]").inner_text()
    menu.select_option(label=second)
    assert menu.locator("option:checked").inner_text() == second
    assert page.locator("[id^=circuits-vis]").inner_text() != before
    assert not errors


def test_a_token_is_hovered(opened, tmp_path):
    VIEWS["tokens"]().save(tmp_path / "view.html")
    page, _ = opened(tmp_path / "view.html")
    page.get_by_text("me", exact=True).first.hover()
    page.get_by_text("-2").first.wait_for()


def test_a_view_is_dark_on_a_dark_page(opened, tmp_path):
    VIEWS["neurons"]().save(tmp_path / "view.html")
    page, _ = opened(tmp_path / "view.html", scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 20)"
    assert "invert" in page.evaluate("getComputedStyle(document.querySelector('.drawn')).filter")


def written(path, html: str):
    """What a notebook holds, as a page."""
    path.write_text(f"<!doctype html><meta charset=utf-8>{html}", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("are_run", [True, False])
def test_a_still_stands_where_scripts_are_not_run(opened, tmp_path, are_run, name):
    path = written(tmp_path / "output.html", VIEWS[name]()._repr_html_())
    page, errors = opened(path, java_script_enabled=are_run)
    assert not errors
    stills = page.locator("img[src^='data:image/png']")
    assert stills.count() == (0 if are_run else 1)
    if are_run:
        page.locator("[id^=circuits-vis] *").first.wait_for()
    else:
        assert stills.bounding_box()["height"] > 20
        assert not page.locator("[id^=live]").is_visible()


def test_a_still_stands_where_the_library_cannot_be_fetched(opened, tmp_path):
    html = with_still("<p>drawn</p>", "Plotly", VIEWS["tokens"]()._still, "tokens")
    page, _ = opened(written(tmp_path / "output.html", html))
    assert page.locator("img").count() == 1
    assert page.get_by_text("drawn").count() == 0
