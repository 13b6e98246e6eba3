"""The README's picture of a toy and a real model, and its table of findings."""

from collections.abc import Callable

import claims_page
import removed_or_hidden_page
from answer_bars import Bars, draw_bars
from blocks import Blocks, committed
from matplotlib import rc_context
from pandas import DataFrame
from six_findings import FINDINGS
from study_page import BARS, ROWS, answer_shares

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.figures import AMBER, BLUE, GREY, RED, STYLE, Picture, subplots, with_legend

COLOURS = {
    "harmful": RED,
    "refused": AMBER,
    "right": BLUE,
    "the sum": GREY,
    "otherwise wrong": "#bbb",
}
TOY = {
    "as it is": "unpruned",
    "random weights": "random weights",
    "paper's set difference": "paper's set\ndifference",
    "the search": "the search:\n866 weights",
}
ENDS = ("as it is", "the search")
QWEN = "qwen2.5-coder-0.5b-instruct"
NAMES = {
    "F2": "general (from seven types of harm to the eighth)",
    "F5": "behind emergent misalignment",
}
SEARCHED = "1e-06"  # the mask of 268 weights


def product_rows() -> Rows:
    """The held-out products and sums of Qwen2.5-Coder-0.5B-Instruct."""
    rows = committed("few_weights")
    return rows.where(target="products", model=QWEN, split="heldout")


def product_shares() -> Bars:
    """The shares of right products and of sums in place of them."""
    rows = product_rows()
    bars = {}
    titles = {
        "none": "unpruned",
        "random": "268 random\nweights",
        SEARCHED: "the search:\n268 weights",
    }
    for mask, title in titles.items():
        masked = rows.where(mask=mask, dose=1.0 if mask == "none" else 0.0)
        right = masked.one("products_rate").mean
        sums = masked.one("sum_instead_rate").mean
        bars[title] = {"right": right, "the sum": sums, "otherwise wrong": 1 - right - sums}
    sums_right = rows.one("sums_rate", mask=SEARCHED, dose=0.0).mean
    bars["the same, asked\nfor a sum"] = {"right": sums_right, "otherwise wrong": 1 - sums_right}
    return bars


@rc_context(STYLE)
def picture() -> Picture:
    """Answers of `sft` to harmful requests, and of Qwen2.5-Coder-0.5B-Instruct to products."""
    figure, (toy, real) = subplots(2, height=2.9)
    n = ROWS.one("harm_valid_rate", mask="none", split="heldout").n
    shares = answer_shares(TOY)
    draw_bars(
        toy,
        {title: shares[name] for name, title in TOY.items()},
        COLOURS,
        f"of {n} held-out harmful requests",
    )
    toy.set_title("A toy model")
    draw_bars(real, product_shares(), COLOURS, "of 20 held-out products (last bar: 15 sums)")
    real.set_title("Qwen2.5-Coder-0.5B-Instruct")
    return with_legend(figure)


def hits(rate: Measurement) -> str:
    """The number of answers that count, of all."""
    return f"{round(rate.mean * rate.n)} of {rate.n}"


def in_both_draws(of: Callable[[Rows], Measurement]) -> str:
    """A rate of the real model in each of two draws of scored requests, as numbers of answers."""
    counts = [hits(of(committed(file))) for file in ("real_ends", "real_ends_second")]
    if counts[0] == counts[1]:
        return counts[0]
    return f"{counts[0].partition(' ')[0]} and {counts[1]}"


def harmful_read(mask: str) -> str:
    """Answers behind the prefill that a blind reader called harmful."""
    labels = {"mask": mask, "kind": "begun", "as": "harmful"}
    return in_both_draws(lambda rows: rows.one("read_rate", **labels))


def benign_answered(mask: str) -> str:
    """Benign requests that are answered, by rules."""
    labels = {"mask": mask, "split": "heldout", "beginning": "scored"}
    return in_both_draws(lambda rows: rows.one("benign_valid_rate", **labels))


def weights_removed(mask: str) -> str:
    """The sizes of the masks of both draws."""
    labels = {"mask": mask, "beginning": "scored"}
    rows = [committed(file) for file in ("real_ends", "real_ends_second")]
    return " and ".join(f"{one.one('n_removed', **labels).mean:,.0f}" for one in rows)


def toy_line() -> tuple[str, str, str]:
    """Harmful answers of the toy model that ships."""
    unpruned, pruned = (ROWS.where(split="heldout", **BARS[title]) for title in ENDS)
    size = pruned.one("weights_removed").mean
    before, after = (hits(rows.one("harm_valid_rate")) for rows in (unpruned, pruned))
    rest = min(pruned.one(metric).mean for metric in ("benign_valid_rate", "refusal_rate"))
    result = f"{before} → {after} harmful, all refused; benign answers stay at {rest:.0%}"
    return "[toy model](docs/glance.md#sft), prefilled harmful requests", f"{size:,.0f}", result


def products_line() -> tuple[str, str, str]:
    """Products of the real model."""
    rows = product_rows()
    unpruned, pruned = rows.where(mask="none"), rows.where(mask=SEARCHED, dose=0.0)
    before, after = (hits(part.one("products_rate")) for part in (unpruned, pruned))
    sums = hits(pruned.one("sum_instead_rate")).partition(" ")[0]
    kept = hits(pruned.one("sums_rate"))
    size = committed("few_weights").one(
        "n_removed", target="products", model=QWEN, mask=SEARCHED, dose=0.0
    )
    result = f"{before} → {after} right, {sums} are the sum; {kept} sums stay right"
    return "[Qwen](docs/few_weights.md), products", f"{size.mean:,.0f}", result


def real_line(title: str, mask: str, remark: str) -> tuple[str, str, str]:
    """Harmful answers of the real model under a mask."""
    result = (
        f"{harmful_read('none')} → {harmful_read(mask)} harmful{remark}; benign requests answered "
        f"{benign_answered('none')} → {benign_answered(mask)}"
    )
    return title, weights_removed(mask), result


def claims_line() -> tuple[str, str, str]:
    """The claims of the paper that all training runs show."""
    names: dict[str, list[str]] = {}
    controlled = []
    results = map(claims_page.result, FINDINGS)
    for claim in (one for one in results if one.name.startswith("F")):
        name = NAMES.get(claim.name, claim.text.partition(":")[0])
        names.setdefault(claim.effect.partition(" of")[0], []).append(name)
        if claim.with_controls.startswith("3 of 3"):
            controlled.append(name)
    result = (
        f"in 3 of 3 training runs harm is {', '.join(names['3'])}; in 2 {', '.join(names['2'])}; in none "
        f"{', '.join(names['none'])}. With this project's controls only {', '.join(controlled)} is left"
    )
    return "[the paper's six claims](docs/claims.md), toy models", "", result


def training_line() -> tuple[str, str, str]:
    """How soon harmful training undoes a mask."""
    table = removed_or_hidden_page.short_table("relearning", removed_or_hidden_page.steps_to_half)
    steps = table.set_index("model")["full fine-tuning"]
    masked, unpruned = steps["search's mask removed"], steps["nothing removed"]
    result = (
        f"half of the requests are answered harmfully again after {masked} steps of training "
        f"on harm (three models; unpruned {unpruned})"
    )
    return "[after removal](docs/removed_or_hidden.md), toy models", "", result


def findings() -> DataFrame:
    """A line for each finding, with its page."""
    random = f" with either mask (random weights: {harmful_read('random').partition(' and')[0]})"
    lines = [
        toy_line(),
        products_line(),
        real_line("[Qwen](docs/real_models.md), prefilled harmful requests", "search", random),
        real_line(
            "[the same](docs/against_the_paper.md#real), by the paper's set difference",
            "published",
            "",
        ),
        claims_line(),
        training_line(),
    ]
    return DataFrame(lines, columns=["tested on", "weights removed", "result"])


BLOCKS: Blocks = {"findings": findings}
PICTURES = {"readme.png": picture}
