"""Every generated block of a page, and every sentence that quotes a figure, is that of committed rows.

Would catch: a figure or verdict typed in, rows of another mask, study or prefill, a block that no
command writes, an analysis left out of the pages.
"""

import re

import claims_page
import pytest
import real_models_page
import study_page
from blocks import committed, fenced, with_blocks
from pages import PAGES, README, ROOT, text_of
from six_findings import FINDINGS
from write_pages import PAGES as WRITTEN

from harmcircuits.measurements import Measurement
from harmcircuits.studies.summary import held_out_lines

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in WRITTEN}
BLOCKS = [(page, name) for page, blocks in WRITTEN.items() for name in blocks]


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_a_block_is_what_its_generator_writes(page, name):
    assert fenced(name, WRITTEN[page][name]()) in TEXTS[page]


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_every_marked_block_has_a_generator(path):
    names = re.findall(r"<!-- ([^/].*) -->", path.read_text(encoding="utf-8"))
    assert sorted(names) == sorted(WRITTEN.get(path.relative_to(ROOT).as_posix(), ()))


@pytest.mark.parametrize("page", WRITTEN)
def test_the_verdicts_in_tables_are_those_of_the_rows(page):
    assert claims_page.with_verdicts(TEXTS[page]) == TEXTS[page]


def test_every_verdict_is_in_the_readme_and_in_the_list_of_analyses():
    for name, script in FINDINGS.items():
        claim = claims_page.result(name)
        link = f"[{name}](docs/claims.md#{name.lower()})"
        line = f"| {link} | {claim.text} | **{claim.outcome}** | {claim.count} |"
        assert line in TEXTS["README.md"]
        (line,) = re.findall(rf"^\| `{script}\.py`.*$", TEXTS["analyses/README.md"], flags=re.M)
        assert f"| {claim.outcome}, {claim.count} |" in line


def test_the_command_sets_right_what_is_wrong():
    text = TEXTS["docs/claims.md"]
    wrong = text.replace("| **holds** |", "| **fails** |").replace("0.05% [", "0.06% [")
    assert wrong != text
    assert claims_page.with_verdicts(with_blocks(wrong, claims_page.CLAIMS)) == text


@pytest.mark.parametrize("name", FINDINGS)
def test_three_ladders_are_committed(name):
    assert set(claims_page.result(name).cases["ladder"]) == {"shipped", "seed1", "seed2"}


def words_of(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def test_the_results_page_quotes_losses_of_the_study():
    lines = held_out_lines(study_page.ROWS, study_page.study_terms())
    text = words_of(TEXTS["docs/results.md"])

    def mean(line: str, metric: str) -> float:
        return lines[line].one(metric).mean

    alone, search = (
        mean(line, "benign_kl") for line in ("search, only benign protected", "search")
    )
    assert f"KL on benign answers {alone:.3f}, with all protected {search:.3f})" in text
    predicted = mean("search", "predicted_loss_change")
    rise = mean("search", "measured_loss_change")
    assert f"falls by {-predicted:.2f}; it rises by {rise:.2f}" in text
    unpruned = mean("unpruned", "harm_nll")
    one_shot, opposite = (
        mean(line, "harm_nll") - unpruned for line in ("one shot, same size", "opposite sign")
    )
    n_opposite = round(mean("opposite sign", "weights_removed"))
    quote = f"raise it by {one_shot:.2f} nats, and {n_opposite} of the opposite sign by"
    assert f"{quote} {opposite:.2f}" in text


def real_row(title: str, metric: str) -> Measurement:
    row = real_models_page.row_of(real_models_page.SMALL[title], metric)
    assert row is not None, f"{title} has no {metric}"
    return row


@pytest.mark.parametrize("title", real_models_page.BARS)
def test_a_bar_of_the_picture_is_all_answers_of_one_mask(title):
    rows = [real_row(title, metric) for metric in real_models_page.ANSWERS.values()]
    assert sum(row.mean for row in rows) == pytest.approx(1)
    assert {row.n for row in rows} == {37}


def test_pages_quote_rows_of_the_real_model():
    rows = committed("real_ends").where(beginning="scored")
    text = words_of(TEXTS["README.md"])
    n_removed = rows.one("n_removed", mask="search").mean
    refusals = {mask: rows.one("harm_refusal_rate", mask=mask).mean for mask in ("search", "none")}
    assert f"{n_removed:,.0f} of 357,826,560 weights" in text
    assert f"refuse {100 * refusals['search']:.0f} % of harmful" in text
    assert f"({100 * refusals['none']:.0f} before)" in text

    titles = ("search, within the budget", "unpruned")
    within, without = (f"{real_row(title, 'harm_valid_rate').mean:.0%}" for title in titles)
    quote = f"{within} stay harmful within the budget".replace("%", " %")
    assert quote in words_of(text_of("real_models.md"))
    assert within == without, "the page says: as without a mask"

    text = words_of(text_of("claims.md"))
    quotes = {"harm_nll": "harm {} nats", "benign_nll": "benign {} nats"}
    quotes["prefilled_nll"] = "with the same prefill {}"
    for metric, quote in quotes.items():
        published, none = (rows.one(metric, mask=mask).mean for mask in ("published", "none"))
        assert quote.format(f"{published - none:+.2f}") in text
