# %% [markdown]
# # The picture of real models
# `python docs/_site/frontier_figure.py docs/figures/frontier.png` draws, from the committed rows of
# Qwen2.5-Coder-0.5B-Instruct, every mask whose answers were read: what it leaves of harm, and what it
# costs benign answers that begin in the same way.

# %%
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.ticker import PercentFormatter

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import (
    AMBER,
    BLUE,
    CHANCE_LINE,
    GREEN,
    GREY,
    RED,
    STYLE,
    Picture,
    interval_reach,
    subplots,
    with_legend,
)

ROWS = Path(__file__).parents[2] / "analyses" / "rows"
FILES = ("frontier", "qwen_preferred", "qwen_avoided", "qwen_main")
HARM, COST = "harm_valid_rate", "prefilled_nll_change"

# The beginning of a mask's name -> its family.
FAMILIES = {
    "one shot": "one shot",
    "token error": "one shot",
    "content": "one shot",
    "search": "search",
    "preferred": "refusals preferred",
    "avoided": "refusals preferred and avoided",
    "random": "random",
}
COLOURS = {
    "one shot": BLUE,
    "search": RED,
    "refusals preferred": GREEN,
    "refusals preferred and avoided": AMBER,
    "random": GREY,
}
BUDGET, WANTED = 0.05, 0.2  # nats per token; of the answers

Point = tuple[Measurement, Measurement]  # what stays harmful under a mask, and what it costs


# %%
def points() -> dict[str, list[Point]]:
    """Family -> its masks whose answers were read, with what they cost."""
    found: dict[str, list[Point]] = {}
    for name in FILES:
        rows = Rows.read(ROWS / f"{name}.jsonl")
        costs = {str(row.labels["mask"]): row for row in rows.where(COST)}
        for rate in rows.where(HARM):
            mask = str(rate.labels["mask"])
            family = family_of(mask)
            if family and mask in costs and "opening" not in rate.labels:
                found.setdefault(family, []).append((rate, costs[mask]))
    return found


def family_of(mask: str) -> str:
    """The family of a mask; empty for the controls that break everything."""
    for beginning, family in FAMILIES.items():
        if mask.startswith(beginning):
            return family
    return ""


@rc_context(STYLE)
def drawn(families: Mapping[str, Sequence[Point]]) -> Picture:
    """A point for every mask, with the interval of its answers, and what a mask should reach."""
    figure, (panel,) = subplots(1, height=6)
    asked = "asked for: below and left of this"
    panel.plot([0, BUDGET, BUDGET], [WANTED, WANTED, 0], ":", color=CHANCE_LINE, lw=2, label=asked)
    for family, pairs in families.items():
        rates, costs = zip(*pairs, strict=True)
        panel.errorbar(
            [cost.mean for cost in costs],
            [rate.mean for rate in rates],
            yerr=interval_reach(rates),
            color=COLOURS[family],
            label=family,
            fmt="o",
            markersize=7,
            elinewidth=1,
            capsize=2,
        )
    panel.set_xlabel("rise of the loss of benign answers begun in the same way, nats per token")
    panel.set_ylabel("held-out answers that stay harmful")
    panel.set_ylim(-0.02, 1.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return with_legend(figure)


if __name__ == "__main__":
    drawn(points()).save(sys.argv[1])  # .png, .svg or .pdf
