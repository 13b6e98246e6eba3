"""Every generated block of a page, and every sentence that quotes a figure, is that of committed rows.

Would catch: a figure or verdict typed in, rows of another mask, study or prefill, a block that no
command writes, an analysis left out of the pages.
"""

import re

import claims_page
import few_weights_page
import pytest
import real_models_page
import study_page
from blocks import committed, fenced
from pages import PAGES, README, ROOT, text_of
from six_findings import FINDINGS
from write_pages import PAGES as WRITTEN
from write_pages import page_text

from harmcircuits.measurements import Measurement
from harmcircuits.studies.summary import held_out_lines

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in WRITTEN}
BLOCKS = [(page, name) for page, blocks in WRITTEN.items() for name in blocks]


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_a_block_is_what_its_generator_writes(page, name):
    assert fenced(name, WRITTEN[page][name]()) in TEXTS[page]


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_every_marked_block_has_a_generator(path):
    names = re.findall(r"<!-- ([^/:]*) -->", path.read_text(encoding="utf-8"))
    assert sorted(names) == sorted(WRITTEN.get(path.relative_to(ROOT).as_posix(), ()))


@pytest.mark.parametrize("page", WRITTEN)
def test_the_verdicts_in_tables_are_those_of_the_rows(page):
    assert claims_page.with_verdicts(TEXTS[page]) == TEXTS[page]


def test_every_verdict_is_on_both_pages_and_in_the_list_of_analyses():
    for name, script in FINDINGS.items():
        claim = claims_page.result(name)
        for page in ("claims.md", "glance.md"):
            (line,) = re.findall(rf"^\| \[{name}\]\(.*$", TEXTS[f"docs/{page}"], flags=re.M)
            for count in (claim.effect, claim.with_controls):
                assert f"| {count.partition(' (')[0]} " in line
        (line,) = re.findall(rf"^\| `{script}\.py`.*$", TEXTS["analyses/README.md"], flags=re.M)
        assert f"| {claim.verdict} |" in line


@pytest.mark.parametrize(
    ("page", "right", "wrong"),
    [
        ("docs/claims.md", "| 2 of 3 (8", "| 3 of 3 (8"),
        ("docs/log/claims.md", "0.04% [", "0.06% ["),
        ("analyses/README.md", "training runs: 2 of 3", "training runs: 3 of 3"),
    ],
)
def test_the_command_sets_right_what_is_wrong(page, right, wrong):
    text = TEXTS[page]
    changed = text.replace(right, wrong)
    assert changed != text
    assert page_text(page, changed) == text


PARAGRAPHS = {
    "F1": "Effect in 3 of 3, with controls in 3 of 3.",
    "F2": "Effect in 3 of 3, with controls undecided.",
    "F3": "Effect in 3 of 3, with controls in none of 3.",
    "F4": "Effect in none of 3, with controls in none of 3.",
    "F5": "Effect in 2 of 3 (8 of 12 fine-tunings), with controls in none of 3 (3 of 12).",
    "F6": "Effect in none of 3 (4 of 18 cases), with controls in none of 3 (2 of 18).",
    "attacks": "Effect in 2 of 3 (5 of 6 cases), with controls in 1 of 3 (4 of 6).",
}


@pytest.mark.parametrize("name", FINDINGS)
def test_the_paragraph_of_a_claim_says_its_counts_and_that_the_models_are_toys(name):
    text = words_of(TEXTS["docs/claims.md"])
    section = text.split(f"{{ #{name.lower()} }}")[1].split(" ## ")[0]
    assert re.match(r" On three (toy models|training runs of a toy model)", section)
    assert PARAGRAPHS[name] in section
    claim = claims_page.result(name)
    counts = f"{claim.effect}, {claim.with_controls}"
    for count in re.findall(r"\w+(?= of)|undecided", counts):
        assert count in PARAGRAPHS[name].lower()


@pytest.mark.parametrize("name", FINDINGS)
def test_three_ladders_are_committed(name):
    assert set(claims_page.result(name).cases["ladder"]) == {"shipped", "seed1", "seed2"}


def words_of(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def test_the_log_of_toy_models_quotes_losses_of_the_study():
    lines = held_out_lines(study_page.ROWS, study_page.study_terms())
    text = words_of(TEXTS["docs/log/toy_models.md"])

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


def per_cent(row: Measurement) -> str:
    return f"{100 * row.mean:.0f}"


READ = [mask for mask in real_models_page.MASKS if real_models_page.shares(mask)]


@pytest.mark.parametrize("mask", READ)
def test_a_bar_of_the_picture_is_all_answers_of_one_mask(mask):
    rows = real_models_page.shares(mask).values()
    assert sum(row.mean for row in rows) == pytest.approx(1)
    assert {row.n for row in rows} == {25}


def test_the_page_of_real_models_quotes_rows():
    text = words_of(text_of("real_models.md"))
    harmful = {mask: per_cent(real_models_page.shares(mask)["harmful"]) for mask in READ}
    masks = iter(harmful.values())
    none, random, first, published, none_again, second, published_again = masks
    assert none == none_again == random and first == second
    assert f"from {none} to {first} %**" in text
    assert f"(to {published} and {published_again} %)" in text
    refused = []
    for name in real_models_page.SEARCHES.values():
        rows = committed(name).where(mask="search", beginning="scored")
        refused.append(per_cent(rows.one("harm_refusal_rate")))
    assert f"({refused[0]}, {refused[1]} and {refused[2]} %)" in text

    names = {"qwen_main": "search, factor 0.5", "qwen_preferred": "one shot, factor 0.5"}
    losses = []
    for name, mask in names.items():
        rows = committed(name).where(mask=mask, split="heldout")
        rise = next(iter(rows.where("harm_nll_change"))).mean
        left = per_cent(next(iter(rows.where("harm_valid_rate"))))
        losses.append((f"{rise:.2f}", left))
    (search, left), (one_shot, left_by_one_shot) = losses
    assert f"by {search} nats and left {left} % harmful" in text
    assert f"by {one_shot} and left {left_by_one_shot} %" in text

    rows = committed("qwen_attacks").where("harm_valid_rate")
    prefill = rows.one(mask="preferred, factor 1", attack="prefill", step=0)
    ablated = rows.one(mask="preferred, factor 1", attack="prefill + refusal ablation", step=0)
    trained = rows.one(mask="preferred, factor 1, then free", attack="plain", step=15)
    assert f"left {per_cent(prefill)} % of prefilled answers harmful" in text
    assert f"With the weights of refusal removed too, {per_cent(ablated)} % were harmful" in text
    quote = "after [fifteen steps of harmful training](log/real_models.md#attacked)"
    assert f"{quote} {per_cent(trained)} % were, plainly asked" in text


def test_the_count_of_few_weights_is_that_of_its_rows():
    text = words_of(text_of("few_weights.md"))
    verdicts = {}
    for target in few_weights_page.targets(few_weights_page.rows_of()):
        searches = few_weights_page.searches(target)
        searches.pop("1.5B", None)
        verdicts[target] = {
            few_weights_page.best(rows, target).verdict for rows in searches.values()
        }
    groups = {
        "always": [name for name, found in verdicts.items() if found == {"within budget"}],
        "never": [name for name, found in verdicts.items() if found == {"does not end"}],
        "at a cost": [name for name, found in verdicts.items() if "at a cost" in found],
    }
    assert groups["always"] == ["language", "products", "lorem"]
    assert groups["at a cost"] == ["fact"] and len(groups["never"]) == 5
    assert "**Three of twelve end in every search on this model**: products" in text
    assert "five behaviours never ended" in text


def both_draws(metric: str, mask: str, **labels) -> str:
    """A rate under a mask in each of two draws of the real model, in %."""
    draws = [committed(file) for file in ("real_ends", "real_ends_second")]
    rates = [rows.one(metric, mask=mask, **labels).mean for rows in draws]
    return " and ".join(f"{100 * rate:.0f}" for rate in rates)


def test_the_set_difference_on_the_real_model_is_that_of_its_rows():
    text = words_of(text_of("against_the_paper.md"))
    begun, plain = ({"kind": kind, "as": "harmful"} for kind in ("begun", "plain"))
    scored = {"beginning": "scored"}
    assert both_draws("read_rate", "none", **begun) == "92 and 92"
    assert f"from 92 to {both_draws('read_rate', 'published', **begun)} % if prefilled" in text
    assert f"(our search: {both_draws('read_rate', 'search', **begun)} %)" in text
    before, after = (both_draws("read_rate", mask, **plain) for mask in ("none", "published"))
    assert (before, after) == ("28 and 24", "4 and 0")
    assert "from 28 to 4 and from 24 to 0 % if plainly asked" in text
    assert both_draws("benign_valid_rate", "none", **scored) == "87 and 87"
    benign = both_draws("benign_valid_rate", "published", **scored)
    assert f"Answered benign requests fall from 87 to {benign} %" in text
    borderline = [
        both_draws("borderline_valid_rate", mask, **scored) for mask in ("none", "published")
    ]
    assert borderline == ["67 and 70", "27 and 37"]
    assert "borderline ones from 67 to 27 and from 70 to 37 %" in text
    nothing = both_draws("read_rate", "published", kind="begun", **{"as": "nothing"})
    assert f"{nothing} % of the prefilled answers [break off]" in text
    kept = [
        both_draws(f"{name}_valid_rate", "search", **scored) for name in ("benign", "borderline")
    ]
    assert f"rise to {kept[0]} %, answered borderline ones to {kept[1]} %" in text
    rows = committed("real_ends").where(beginning="scored")
    published, none = (rows.one("prefilled_nll", mask=mask).mean for mask in ("published", "none"))
    assert f"rises by {published - none:.2f} nats" in text
    assert f"{rows.one('n_removed', mask='published').mean:,.0f} and 9,298 weights" in text
