# %% [markdown]
# # The pictures of the guide "Look at a circuit"
# `python docs/_site/look_pictures.py CHROMIUM` runs the code of `docs/guides/look.md` and saves its pictures
# into `docs/figures/`, each view as a browser draws it (`pip install -e '.[browser]'`).

# %%
import re
import sys
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[1]
GUIDE, FIGURES = DOCS / "guides" / "look.md", DOCS / "figures"
WIDTH = 900  # pixels
# A name in the guide's code -> its picture.
VIEWS = {
    "tokens": "look_tokens",
    "scored": "look_scored",
    "gained": "look_gained",
    "attention": "look_attention",
    "activated": "look_neurons",
}


# %%
def guide_names(folder: Path) -> dict:
    """The names that the guide's code defines, run in a folder."""
    space: dict = {}
    with chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.S | re.M):
            exec(block, space)
    return space


def main(chromium: str) -> None:
    """Save the six pictures."""
    with TemporaryDirectory() as temporary, sync_playwright() as play:
        folder = Path(temporary)
        space = guide_names(folder)
        space["figure"].save(FIGURES / "look_map.png")
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 100}, device_scale_factor=1.5)
        for name, picture in VIEWS.items():
            space[name].save(folder / f"{name}.html")
            page.goto((folder / f"{name}.html").as_uri())
            page.add_style_tag(content="h1 { display: none }")
            page.wait_for_timeout(500)
            page.screenshot(path=FIGURES / f"{picture}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
