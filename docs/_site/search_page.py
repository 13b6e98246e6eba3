"""The log of the search: what answers become by each aim, before and since its dead zone."""

from functools import partial
from statistics import fmean

import claims_page
import ends
from blocks import Blocks, committed
from pandas import DataFrame

from harmcircuits.measurements import Rows

AIMS = ("ends", "ends, fresh ladders", "ends, never taught to refuse")
METRICS = {"harmful": "harm_valid_rate", "broken": "harm_degenerate_rate"}


def aims_table(name: str) -> DataFrame:
    """A table of the aims of a search, without the worst size of each."""
    return ends.TABLES[name](committed("ends")).drop(columns="worst")


def mean_of(rows: Rows) -> float:
    """The mean of one rate over the masks of the models that refuse."""
    rates = []
    for row in rows:
        if row.labels["model"] in ends.MODELS and row.labels["size"] in ends.SIZES:
            rates.append(row.mean)
    return fmean(rates)


def dead_zone_table() -> DataFrame:
    """The mean answers by each aim over the shipped models that refuse, before and since."""
    since = committed("ends_dead_zone")
    before = committed("ends").where(engine="gates", ladder="shipped")
    lines = []
    for aim in ends.AIMS:
        line = {"aim": aim}
        for title, metric in METRICS.items():
            for when, rows in (("before", before), ("since", since)):
                line[f"{title}, {when}"] = f"{mean_of(rows.where(metric, aim=aim)):.0%}"
        lines.append(line)
    return DataFrame(lines)


BLOCKS: Blocks = {
    **{name: partial(aims_table, name) for name in AIMS},
    "dead zone": dead_zone_table,
    **claims_page.SEARCH,
}
