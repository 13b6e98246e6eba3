"""The table of few weights, with its repetitions, and the tables and figures of its log."""

from functools import partial

import few_weights
from blocks import Blocks, committed, markdown
from few_weights import CLOSER, ENDS, FILE_BEHAVIOURS, TITLES, Outcome, targets
from pandas import DataFrame
from support.figures import cross_ablation_figure, heatmaps

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

FIRST_MODEL = "qwen2.5-coder-0.5b-instruct"  # the one that is also drawn
LARGER_MODEL = "qwen2.5-coder-1.5b-instruct"
# Whose committed rows are by a judge that could not read 5 or 6 of 24 answers: what ends is undecided.
HALF_READ = ("language",)


def rows_of(model: str = FIRST_MODEL) -> Rows:
    """The committed rows of a model."""
    return committed("few_weights").where(model=model)


def answer(model: str) -> str:
    """How many behaviours hang on few weights, and which; and the table of all."""
    rows = rows_of(model)
    names = targets(rows)
    sparse = [TITLES[name] for name in names if few_weights.hangs(rows, name)]
    count = f"{len(sparse)} of {len(names)} by the rule"
    return f"**{count}: {', '.join(sparse) or 'none'}.**\n\n{markdown(few_weights.table(rows))}"


def searches(target: str) -> dict[str, Rows]:
    """The searches for a behaviour: the first, and those that repeat it in another way."""
    first = rows_of().where(target=target)
    halves = committed("few_weights_halves").where(target=target)
    rows = {"first search": first, "second half": halves.where(half="second")}
    rows["bfloat16"] = Rows()
    if not first.where(dtype="bfloat16"):  # else the first one is in bfloat16 itself
        rows["bfloat16"] = halves.where(half="first")
    rows["1.5B"] = rows_of(LARGER_MODEL).where(target=target)
    return {name: search for name, search in rows.items() if search}


def best(rows: Rows, target: str) -> Outcome:
    """The outcome of the smallest mask that ends a behaviour, else of the one that leaves least."""
    outcomes = few_weights.outcomes(rows, target).values()
    return few_weights.smallest(rows, target) or min(outcomes, key=lambda mask: mask.rate)


def repeats() -> DataFrame:
    """A line for each behaviour: what the best mask of each search leaves, and how many end it."""
    lines = []
    for target in targets(rows_of()):
        outcomes = {name: best(rows, target) for name, rows in searches(target).items()}
        line = {"behaviour": TITLES[target], "no mask": f"{unpruned_rate(target):.0%}"}
        for name in ("first search", "second half", "bfloat16", "1.5B"):
            line[name] = DASH
            if name in outcomes:
                line[name] = f"{title_of(outcomes[name], target)}, {outcomes[name]}"
        first, *others = [outcome.verdict != "does not end" for outcome in outcomes.values()]
        line["repeats?"] = f"{sum(others)} of {len(others)}" if first and others else DASH
        lines.append(line)
    return DataFrame(lines)


def title_of(outcome: Outcome, target: str) -> str:
    """The verdict on a mask, as far as the judge of the committed rows can give one."""
    is_open = target in HALF_READ and outcome.verdict != "does not end"
    return "undecided" if is_open else ENDS[outcome.verdict]


def unpruned_rate(target: str) -> float:
    """The share of answers of the first model that show a behaviour without any mask."""
    return few_weights.unpruned_rate(rows_of(), target)


def draw_doses() -> Picture:
    """The answers that show each behaviour, at every dose of the smaller mask's weights."""
    cells = Rows()
    for target in targets(rows_of()):
        rates = rows_of().where(f"{target}_rate", target=target)
        doses = rates.where(mask=CLOSER) + rates.where(mask="none")
        for row in sorted(doses, key=lambda row: row.labels["dose"]):
            cells += [row.labelled(behaviour=TITLES[target])]
    return heatmaps({"answers that show it": cells}, x="dose", y="behaviour")


def draw_others() -> Picture:
    """The rate of every behaviour under the mask of each."""
    names = [target for target in targets(rows_of()) if target not in FILE_BEHAVIOURS]
    rates = {f"{name}_rate": TITLES[name] for name in names}
    cells = rows_of().where(mask="none")
    for target in names:
        masked = rows_of().where(target=target, mask=CLOSER, dose=0.0)
        cells += [row.labelled(mask=TITLES[target]) for row in masked]
    cells = Rows(row for row in cells if row.metric in rates)
    return cross_ablation_figure({"answers that show it": cells}, rates)


BLOCKS: Blocks = {"few weights, repeated": repeats}
LOG: Blocks = {
    "few weights": partial(answer, FIRST_MODEL),
    "few weights, larger model": partial(answer, LARGER_MODEL),
    "few weights, smaller model": partial(answer, "smollm2-135m-instruct"),
    "halves": lambda: few_weights.table_of_halves(committed("few_weights_halves")),
}
PICTURES = {"few_weights_doses.svg": draw_doses, "few_weights_others.svg": draw_others}
