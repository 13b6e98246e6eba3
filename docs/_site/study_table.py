# %% [markdown]
# # The tables of the study on `sft`
# `harmcircuits study --out DIR` on the shipped `sft` measures what the README and the results page
# show. Its `DIR/rows.jsonl` is kept as `rows/study_sft.jsonl`, and `python docs/_site/study_table.py`
# writes the tables of both pages from it; a test holds them to the rows.

# %%
from collections.abc import Mapping
from pathlib import Path

from harmcircuits.measurements import Rows
from harmcircuits.studies.summary import Roles, held_out_lines
from harmcircuits.views.tables import figure_text, size_text

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "analyses" / "rows" / "study_sft.jsonl"
START = "| mask on `sft` |"
BOLD = "search"

# %% [markdown]
# ## What each page shows
# Lines of the study, by the name that a page gives them, and titles of columns.

# %%
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
IN_SHORT = {
    "unpruned": "none",
    "search": "search",
    "published, same size": "published set difference",
    "random": "random ({seeds} seeds)",
    "benign twin": "benign twin",
}
LOSSES = ["harm NLL", "benign NLL"]
RATES = ["harm", "broken", "benign", "recognises", "explains", "knows", "refuses"]
RATES_IN_SHORT = ["harm", "broken", "benign", "explains", "refuses"]
PAGES = {
    ROOT / "README.md": (IN_SHORT, RATES_IN_SHORT),
    ROOT / "docs" / "results.md": (LINES, RATES),
}


# %%
def terms_of(rows: Rows) -> Roles:
    """What the rows of a study are called, with what its search protected."""
    # The first is the operating point; the circuit that protects benign answers alone follows.
    chosen = rows.where("harm_valid_rate", mask="circuit", split="heldout", selection="search")[0]
    return Roles.standard(str(chosen.labels["protected"]).split(", "))


def table(rows: Rows, names: Mapping[str, str], rates: list[str]) -> str:
    """The held-out figures as Markdown.

    Args:
        rows: of the study.
        names: line of the study -> its name on the page.
        rates: titles of the rates, in order.
    """
    terms = terms_of(rows)
    lines = held_out_lines(rows, terms)
    metrics = {title: metric for metric, title in {**terms.rates, **terms.losses}.items()}
    seeds = len(rows.where("weights_removed", mask="random", split="heldout").by("seed"))

    columns = [*rates, *LOSSES]
    written = [" ".join([START, "weights |", *(f"{title} |" for title in columns)])]
    written.append("|---" * (len(columns) + 2) + "|")
    for line, name in names.items():
        cells = [name.format(seeds=seeds), size_text(lines[line])]
        for title in columns:
            is_rate = title in rates
            cells.append(figure_text(lines[line], metrics[title], is_rate=is_rate))
        if line == BOLD:
            cells[0], cells[2] = f"**{cells[0]}**", f"**{cells[2]}**"
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def with_table(text: str, written: str) -> str:
    """A page with this table in place of its own."""
    before, rest = text.split(START)
    _, after = rest.split("\n\n", 1)
    return f"{before}{written}\n\n{after}"


# %%
def main() -> None:
    rows = Rows.read(ROWS)
    for page, (names, rates) in PAGES.items():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_table(text, table(rows, names, rates)), encoding="utf-8")


if __name__ == "__main__":
    main()
