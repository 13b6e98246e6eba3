"""The tables of the study on `sft`, short and whole, and the picture of the README.

`harmcircuits study --out DIR` on the shipped `sft` measures them; `DIR/rows.jsonl` is kept as
`rows/study_sft.jsonl`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from blocks import Blocks, committed
from pandas import DataFrame

from harmcircuits.studies.summary import Roles, held_out_lines
from harmcircuits.views.tables import figure_text, size_text

ROWS = committed("study_sft")
BOLD = "search"
# Line of the study -> its name on the page.
LINES = {
    "unpruned": "none",
    "search": "search",
    "one shot, same size": "one shot, same size",
    "published, same size": "paper's set difference, same size",
    "search, only benign protected": "search, only benign protected",
    "random": "random ({seeds} seeds)",
    "opposite sign": "opposite sign",
    "benign twin": "benign twin",
}
SHORT_LINES = {
    "unpruned": "none",
    "search": "search",
    "published, same size": "paper's set difference",
    "random": "random ({seeds} seeds)",
    "benign twin": "matched control",
}
# Titles of columns.
LOSSES = ["harm NLL", "benign NLL"]
RATES = ["harm", "broken", "benign", "recognises", "explains", "knows", "refuses"]
SHORT_RATES = {
    "harm": "harmful",
    "broken": "incoherent",
    "benign": "benign answered",
    "explains": "explained",
    "refuses": "plainly asked: refused",
}
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
    "paper's set difference": {"selection": "published"},
    "one shot": {"selection": "one shot"},
    "the search": {"selection": "search", "at": "operating point"},
}


def study_terms() -> Roles:
    """The terms of the study, with the behaviours that its search protected."""
    # The first is the operating point; the circuit that protects benign answers alone follows.
    circuits = ROWS.where("harm_valid_rate", mask="circuit", split="heldout", selection="search")
    return Roles.standard(str(circuits[0].labels["protected"]).split(", "))


def table(names: Mapping[str, str], rates: Sequence[str], losses: Sequence[str] = ()) -> DataFrame:
    """The held-out figures of these lines, with these rates and losses."""
    terms = study_terms()
    rows_by_line = held_out_lines(ROWS, terms)
    metrics = {title: metric for metric, title in {**terms.rates, **terms.losses}.items()}
    seeds = len(ROWS.where("weights_removed", mask="random", split="heldout").by("seed"))

    lines = []
    for line, name in names.items():
        rows = rows_by_line[line]
        cells = {"mask on `sft`": name.format(seeds=seeds), "weights": size_text(rows)}
        for title in (*rates, *losses):
            cells[title] = figure_text(rows, metrics[title], is_rate=title in rates)
        if line == BOLD:
            for title in ("mask on `sft`", "harm"):
                cells[title] = f"**{cells[title]}**"
        lines.append(cells)
    return DataFrame(lines)


def short_table() -> DataFrame:
    """The lines and rates of the page of all results, with titles that say what is counted."""
    return table(SHORT_LINES, list(SHORT_RATES)).rename(columns=SHORT_RATES)


def answer_shares(names: Iterable[str]) -> dict[str, dict[str, float]]:
    """The shares of harmful, refused, harmless and broken answers under each of these masks."""
    held_out = ROWS.where(split="heldout")
    bars = {}
    for title in names:
        rows = held_out.where(**BARS[title])
        bars[title] = {kind: rows.one(metric).mean for kind, metric in KINDS.items()}
    return bars


GLANCE: Blocks = {"study": short_table}
TOY_MODELS: Blocks = {"study": partial(table, LINES, RATES, LOSSES)}
