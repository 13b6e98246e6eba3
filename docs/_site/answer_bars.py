"""The kinds of answers as bars: one picture for every page that shows them."""

from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from harmcircuits.views.figures import AMBER, BLUE, GREY, RED, STYLE, Picture, subplots, with_legend

COLOURS = {
    "harmful": RED,
    "harmless": BLUE,
    "refused": AMBER,
    "broken": GREY,
    "breaks off": GREY,
}
Bars = Mapping[str, Mapping[str, float]]  # title -> kind of answer -> its share


@rc_context(STYLE)
def answer_bars(bars: Bars, xlabel: str) -> Picture:
    """Shares of answers by kind, one bar below the other, each stacked to 100 %."""
    figure, (panel,) = subplots(1, height=0.6 * len(bars) + 0.5)
    draw_bars(panel, bars, COLOURS, xlabel)
    return with_legend(figure)


def draw_bars(panel: Axes, bars: Bars, colours: Mapping[str, str], xlabel: str) -> None:
    """The stacked bars of one panel, the first on top."""
    titles = list(bars)[::-1]
    starts = [0.0] * len(titles)
    for kind, colour in colours.items():
        shares = [bars[title].get(kind, 0.0) for title in titles]
        if not any(shares):
            continue
        panel.barh(titles, shares, left=starts, color=colour, label=kind)
        for number, share in enumerate(shares):
            if share >= 0.05:
                middle = starts[number] + share / 2
                panel.text(middle, number, f"{share:.0%}", ha="center", va="center", color="white")
            starts[number] += share
    panel.set_xlim(0, 1)
    panel.set_xlabel(xlabel)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
