# %% [markdown]
# # The picture of the page "How to read a report"
# `python docs/_site/report_still.py REPORT CHROMIUM` opens the `report.html` that `harmcircuits study --out DIR`
# writes, hides what the page does not explain, draws six numbered arrows, and saves what the browser shows
# as `docs/figures/report.png` (`pip install -e '.[browser]'`).

# %%
import sys
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "figures" / "report.png"
WIDTH = 1000  # pixels
N_COLOURS = 64
HIDDEN = """
  nav, #the-circuit, #can-the-scores-be-trusted, #how-to-cite, section > p:not(.missing),
  #what-goes-and-what-stays > :not(h2, .plot), #examples > :not(h2, .answers) { display: none }
  body { position: relative; margin: 1rem auto; padding-left: 4rem }
  h2 { margin-top: 1.6rem }
  #what-goes-and-what-stays .plot { margin-top: 1.2rem }
  .arrows { position: absolute; inset: 0; width: 100%; height: 100% }
"""


class Arrow(NamedTuple):
    """Where the tip is, as shares of an element's width and height; the tail, in pixels from the tip."""

    element: str
    x: float
    y: float
    tail_x: int
    tail_y: int


ARROWS = (
    Arrow(".headline", 0.0, 0.5, -30, 0),
    Arrow(".verdict", 0.0, 0.5, -30, 0),
    Arrow("#what-goes-and-what-stays .plot", 0.113, 0.75, 0, -228),
    Arrow("#the-trade-off .plot", 0.169, 0.74, 34, -60),
    Arrow("div.answers", 0.8, 0.155, 40, 0),
    Arrow("#can-the-judge-be-trusted .missing", 0.0, 0.5, -30, 0),
)
DRAW = """arrows => {
  const answers = [...document.querySelectorAll("#examples > h3")].find(h => h.innerText == "What the model says");
  answers.classList.add("answers"); answers.nextElementSibling.nextElementSibling.classList.add("answers");
  const body = document.body.getBoundingClientRect();
  let drawn = "";
  arrows.forEach(([element, x, y, tail_x, tail_y], number) => {
    const box = document.querySelector(element).getBoundingClientRect();
    const tip = [box.x - body.x + x * box.width, box.y - body.y + y * box.height];
    const tail = [tip[0] + tail_x, tip[1] + tail_y];
    drawn += `<line x1="${tail[0]}" y1="${tail[1]}" x2="${tip[0]}" y2="${tip[1]}" stroke="#1f5fa8"
      stroke-width="2.5" marker-end="url(#head)"/><circle cx="${tail[0]}" cy="${tail[1]}" r="12" fill="#1f5fa8"/>
      <text x="${tail[0]}" y="${tail[1] + 5}" fill="#fff" font-size="15" text-anchor="middle">${number + 1}</text>`;
  });
  document.body.insertAdjacentHTML("beforeend", `<svg class="arrows"><marker id="head" orient="auto"
    markerWidth="9" markerHeight="9" refX="9" refY="4" markerUnits="userSpaceOnUse">
    <path d="M0 0 L9 4 L0 8 z" fill="#1f5fa8"/></marker>${drawn}</svg>`);
}"""


# %%
def main(report: str, chromium: str) -> None:
    """Save the picture."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = {"width": WIDTH, "height": 100}
        page = browser.new_page(viewport=view, device_scale_factor=1.5, color_scheme="light")
        page.goto(Path(report).resolve().as_uri())
        page.add_style_tag(content=HIDDEN)
        page.evaluate(DRAW, ARROWS)
        picture = Image.open(BytesIO(page.screenshot(full_page=True)))
        browser.close()
    picture.quantize(N_COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
