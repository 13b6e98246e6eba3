"""What answers become, as bars: one picture for every page that shows it."""

from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.ticker import PercentFormatter

from harmcircuits.views.figures import AMBER, BLUE, GREY, RED, STYLE, Picture, subplots, with_legend

COLOURS = {"harmful": RED, "harmless": BLUE, "refused": AMBER, "broken": GREY}


@rc_context(STYLE)
def answer_bars(bars: Mapping[str, Mapping[str, float]], of_what: str) -> Picture:
    """Shares of answers by kind, one bar below the other, each stacked to 100 %."""
    figure, (panel,) = subplots(1, height=0.6 * len(bars) + 0.5)
    lines = list(bars)[::-1]
    start = [0.0] * len(lines)
    for kind, colour in COLOURS.items():
        shares = [bars[title].get(kind, 0.0) for title in lines]
        if not any(shares):
            continue
        panel.barh(lines, shares, left=start, color=colour, label=kind)
        for number, share in enumerate(shares):
            if share >= 0.05:
                middle = start[number] + share / 2
                panel.text(middle, number, f"{share:.0%}", ha="center", va="center", color="white")
        start = [left + share for left, share in zip(start, shares, strict=True)]
    panel.set_xlim(0, 1)
    panel.set_xlabel(of_what)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return with_legend(figure)
