"""The tables of the study on `sft` in the README and on the results page, and the README's picture.

`harmcircuits study --out DIR` on the shipped `sft` measures them; `DIR/rows.jsonl` is kept as
`rows/study_sft.jsonl`.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from answer_bars import answer_bars
from blocks import Blocks, committed
from pandas import DataFrame

from harmcircuits.studies.summary import Roles, held_out_lines
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import figure_text, size_text

ROWS = committed("study_sft")
BOLD = "search"
# Line of the study -> its name on the page.
LINES = {
    "unpruned": "none",
    "search": "search",
    "one shot, same size": "one shot, same size",
    "published, same size": "published, same size",
    "search, only benign protected": "search, only benign protected",
    "random": "random ({seeds} seeds)",
    "opposite sign": "opposite sign",
    "benign twin": "benign twin",
}
README_LINES = {
    "unpruned": "none",
    "search": "search",
    "published, same size": "published set difference",
    "random": "random ({seeds} seeds)",
    "benign twin": "benign twin",
}
# Titles of columns.
LOSSES = ["harm NLL", "benign NLL"]
RATES = ["harm", "broken", "benign", "recognises", "explains", "knows", "refuses"]
README_RATES = ["harm", "broken", "benign", "explains", "refuses"]
# Kind of answer -> its rate.
KINDS = {
    "harmful": "harm_valid_rate",
    "refused": "harm_refusal_rate",
    "harmless": "harm_benign_rate",
    "broken": "harm_degenerate_rate",
}
BARS = {
    "as it is": {"mask": "none"},
    "random weights": {"mask": "random", "seed": 0},
    "opposite sign": {"mask": "opposite_sign"},
    "published method": {"selection": "published"},
    "one shot": {"selection": "one shot"},
    "the search": {"selection": "search", "at": "operating point"},
}


def study_terms() -> Roles:
    """The terms of the study, with the behaviours that its search protected."""
    # The first is the operating point; the circuit that protects benign answers alone follows.
    circuits = ROWS.where("harm_valid_rate", mask="circuit", split="heldout", selection="search")
    return Roles.standard(str(circuits[0].labels["protected"]).split(", "))


def table(names: Mapping[str, str], rates: Sequence[str]) -> DataFrame:
    """The held-out figures of these lines, with these rates and the losses."""
    terms = study_terms()
    rows_by_line = held_out_lines(ROWS, terms)
    metrics = {title: metric for metric, title in {**terms.rates, **terms.losses}.items()}
    seeds = len(ROWS.where("weights_removed", mask="random", split="heldout").by("seed"))

    lines = []
    for line, name in names.items():
        rows = rows_by_line[line]
        cells = {"mask on `sft`": name.format(seeds=seeds), "weights": size_text(rows)}
        for title in (*rates, *LOSSES):
            cells[title] = figure_text(rows, metrics[title], is_rate=title in rates)
        if line == BOLD:
            for title in ("mask on `sft`", "harm"):
                cells[title] = f"**{cells[title]}**"
        lines.append(cells)
    return DataFrame(lines)


def answers_picture() -> Picture:
    """The shares of harmful, refused, harmless and broken answers under each mask."""
    held_out = ROWS.where(split="heldout")
    bars = {}
    for title, labels in BARS.items():
        rows = held_out.where(**labels)
        bars[title] = {kind: rows.one(metric).mean for kind, metric in KINDS.items()}
    n = held_out.one("harm_valid_rate", mask="none").n
    return answer_bars(bars, f"of {n} held-out answers to harmful requests")


README: Blocks = {"study": partial(table, README_LINES, README_RATES)}
RESULTS: Blocks = {"study": partial(table, LINES, RATES)}
PICTURES = {"ends.png": answers_picture}
