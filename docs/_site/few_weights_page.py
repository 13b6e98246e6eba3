# %% [markdown]
# # What the rows of "Which behaviours hang on few weights?" say
# `python docs/_site/few_weights_page.py` applies the rule of `analyses/few_weights.py` to the committed rows,
# writes the answer and the table between `<!-- NAME -->` and `<!-- /NAME -->` of `docs/few_weights.md`, and
# draws its two figures.

# %%
from pathlib import Path

from few_weights import (
    CLOSER,
    HALVES_ROWS,
    OF_FILES,
    ROWS,
    TITLES,
    hangs,
    table,
    table_of_halves,
    targets,
)
from support.figures import cross_ablation_figure, heatmaps
from support.markdown import between, frame_markdown

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "few_weights.md"
FIGURES = ROOT / "docs" / "figures"
# Place on the page -> the model whose rows stand there; the first one is also drawn.
MODELS = {
    "few weights": "qwen2.5-coder-0.5b-instruct",
    "few weights, larger model": "qwen2.5-coder-1.5b-instruct",
    "few weights, smaller model": "smollm2-135m-instruct",
}


def answer(rows: Rows) -> str:
    """How many behaviours hang on few weights, and which."""
    few = [TITLES[name] for name in targets(rows) if hangs(rows, name)]
    return (
        f"**{len(few)} of {len(targets(rows))} hang on few weights: {', '.join(few) or 'none'}.**"
    )


def with_results(page: str, rows: Rows) -> str:
    """The page with what the rows say of every model."""
    for place, model in MODELS.items():
        of_model = rows.where(model=model)
        page = between(page, place, answer(of_model), frame_markdown(table(of_model)))
    return between(page, "halves", frame_markdown(table_of_halves(Rows.read(HALVES_ROWS))))


def draw_doses(rows: Rows) -> Picture:
    """The answers that show each behaviour, at every dose of the smaller mask's weights."""
    cells = Rows()
    for target in targets(rows):
        of_rate = rows.where(f"{target}_rate", target=target)
        of_doses = of_rate.where(mask=CLOSER) + of_rate.where(mask="none")
        of_doses = sorted(of_doses, key=lambda row: row.labels["dose"])
        cells += [row.labelled(behaviour=TITLES[target]) for row in of_doses]
    return heatmaps({"answers that show it": cells}, x="dose", y="behaviour")


def draw_others(rows: Rows) -> Picture:
    """What is left of every behaviour under the mask of each."""
    drawn = [target for target in targets(rows) if target not in OF_FILES]
    rates = {f"{name}_rate": TITLES[name] for name in drawn}
    cells = Rows(row.labelled(mask="none") for row in rows.where(mask="none"))
    for target in drawn:
        of_mask = rows.where(target=target, mask=CLOSER, dose=0.0)
        cells += [row.labelled(mask=TITLES[target]) for row in of_mask]
    shown = Rows(row for row in cells if row.metric in rates)
    return cross_ablation_figure({"answers that show it": shown}, rates)


if __name__ == "__main__":
    measured = Rows.read(ROWS)
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    measured = measured.where(model=MODELS["few weights"])
    draw_doses(measured).save(FIGURES / "few_weights_doses.svg")
    draw_others(measured).save(FIGURES / "few_weights_others.svg")
