"""The tables of the README and of the results page are those of the committed study.

Would catch: a figure that was typed, a line or a column of another mask, rows of another study, a
sentence whose figure the rows do not have.
"""

import pytest
import study_table
from pages import text_of

from harmcircuits.measurements import Rows
from harmcircuits.studies.summary import held_out_lines

ROWS = Rows.read(study_table.ROWS)


@pytest.mark.parametrize("page", study_table.PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_table_of_the_rows(page):
    text = page.read_text(encoding="utf-8")
    written = study_table.table(ROWS, *study_table.PAGES[page])
    assert written in text
    assert study_table.with_table(text, written) == text, "the command changes nothing"


def test_what_the_results_page_says_of_losses_is_in_the_rows():
    lines = held_out_lines(ROWS, study_table.terms_of(ROWS))
    text = " ".join(text_of("results.md").split())

    def of(line: str, metric: str) -> float:
        return lines[line].one(metric).mean

    alone = "search, only benign protected"
    kl = (of(alone, "benign_kl"), of("search", "benign_kl"))
    assert f"(KL {kl[0]:.3f} instead of {kl[1]:.3f})" in text
    predicted, measured = (
        of("search", f"{kind}_loss_change") for kind in ("predicted", "measured")
    )
    assert f"falls by {-predicted:.2f}; it rises by {measured:.2f}" in text
    rises = []
    for line in ("one shot, same size", "opposite sign"):
        rises.append(of(line, "harm_nll") - of("unpruned", "harm_nll"))
    n_opposite = round(of("opposite sign", "weights_removed"))
    assert (
        f"raise it by {rises[0]:.2f} nats, and {n_opposite} of the opposite sign by {rises[1]:.2f}"
        in text
    )
