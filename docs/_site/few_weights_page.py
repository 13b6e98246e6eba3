"""The blocks and figures of "Which behaviours hang on few weights?", by the rule of the analysis."""

from functools import partial

import few_weights
from blocks import Blocks, committed, markdown
from few_weights import CLOSER, FILE_BEHAVIOURS, TITLES, targets
from support.figures import cross_ablation_figure, heatmaps

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture

FIRST_MODEL = "qwen2.5-coder-0.5b-instruct"  # the one that is also drawn


def rows_of(model: str = FIRST_MODEL) -> Rows:
    """The committed rows of a model."""
    return committed("few_weights").where(model=model)


def answer(model: str) -> str:
    """How many behaviours hang on few weights, and which; and the table of all."""
    rows = rows_of(model)
    names = targets(rows)
    sparse = [TITLES[name] for name in names if few_weights.hangs(rows, name)]
    count = f"{len(sparse)} of {len(names)} hang on few weights"
    return f"**{count}: {', '.join(sparse) or 'none'}.**\n\n{markdown(few_weights.table(rows))}"


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


BLOCKS: Blocks = {
    "few weights": partial(answer, FIRST_MODEL),
    "few weights, larger model": partial(answer, "qwen2.5-coder-1.5b-instruct"),
    "few weights, smaller model": partial(answer, "smollm2-135m-instruct"),
    "halves": lambda: few_weights.table_of_halves(committed("few_weights_halves")),
}
PICTURES = {"few_weights_doses.svg": draw_doses, "few_weights_others.svg": draw_others}
