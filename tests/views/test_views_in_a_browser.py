"""Views saved as pages, opened from disk in a browser without a network.

Would catch: an error on the console, a token without its value on hovering, a page that scrolls
sideways on a phone, a dark page with a white view.
"""

import pytest
import torch

from harmcircuits.views.circuitsvis import (
    activated_tokens,
    attention_pairs,
    coloured_tokens,
    gained_tokens,
)

pytestmark = pytest.mark.slow

WORDS = ["<bos>", "tell", "me", "sure"]
SQUARE = torch.eye(4)[None]
VIEWS = {
    "tokens": coloured_tokens(WORDS, torch.tensor([0.0, 0.5, -2.0, 1.0])),
    "attention": attention_pairs(WORDS, SQUARE, SQUARE, [(0, 1)]),
    "neurons": activated_tokens(WORDS, torch.ones(2, 4), torch.zeros(2, 4), [(0, 1), (1, 2)]),
    "gained": gained_tokens(WORDS, torch.eye(4) - 0.25, WORDS, k=2),
}
OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_drawn_and_fits(browser, tmp_path, name, scheme):
    VIEWS[name].save(tmp_path / "view.html")
    size = {"width": 390, "height": 900}
    page = browser.new_page(viewport=size, color_scheme=scheme, offline=True)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "view.html").as_uri())
    page.locator("[id^=circuits-vis] *").first.wait_for()
    assert not errors
    assert page.evaluate(OVERFLOWING) == 0
    shade = page.evaluate("getComputedStyle(document.querySelector('.drawn')).filter")
    assert ("invert" in shade) == (scheme == "dark")
    if name == "tokens":
        page.get_by_text("me", exact=True).first.hover()
        page.get_by_text("-2").first.wait_for()
    page.close()
