# %% [markdown]
# # What the rows of "Which behaviours hang on few weights?" say
# `python docs/_site/few_weights_page.py` applies the rule of `analyses/few_weights.py` to the committed rows,
# writes the answer and the table between `<!-- NAME -->` and `<!-- /NAME -->` of `docs/few_weights.md`, and
# draws its two figures.

# %%
from pathlib import Path

from few_weights import CLOSER, CONTROLS, KEPT, OPPOSITE, RANDOM, ROWS, hangs, masks_of, outcome
from support.figures import cross_ablation_figure, profiles
from support.markdown import between, markdown_table

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "few_weights.md"
FIGURES = ROOT / "docs" / "figures"
TITLES = {
    "identity": "its name or maker",
    "fact": "the capital of France",
    "licence": "a licence by heart",
    "language": "the language asked in",
    "fence": "code between marks",
    "loud": "capitals on demand",
}
ENDS = {"within budget": "yes", "at a cost": "at a cost", "does not end": "no"}
HEAD = (
    "behaviour",
    "before",
    "weights",
    "left",
    "newly broken",
    "kept rates fall by",
    "ends",
    *CONTROLS,
)


def targets(rows: Rows) -> list[str]:
    """The behaviours that were searched for, in the order of the analysis."""
    return [name for name in KEPT if rows.where(target=name)]


def answer(rows: Rows) -> str:
    """How many behaviours hang on few weights, and which."""
    few = [TITLES[name] for name in targets(rows) if hangs(rows, name)]
    return (
        f"**{len(few)} of {len(targets(rows))} hang on few weights: {', '.join(few) or 'none'}.**"
    )


def main_table(rows: Rows) -> str:
    """A line for each behaviour and mask; the controls beside the largest."""
    body = []
    for target in targets(rows):
        before = rows.one(f"{target}_rate", target=target, mask="none").mean
        masks = [mask for mask in masks_of(rows, target) if mask not in CONTROLS]
        outcomes = [outcome(rows, target, mask) for mask in masks]
        largest_first = sorted(outcomes, key=lambda of_mask: -of_mask.n_removed)
        for number, of_mask in enumerate(largest_first):
            beside = [DASH, DASH]
            if not number:
                beside = [f"{outcome(rows, target, name).left:.0%}" for name in (RANDOM, OPPOSITE)]
            line = [
                TITLES[target],
                f"{before:.0%}",
                f"{of_mask.n_removed:,}",
                f"{of_mask.left:.0%}",
            ]
            line += [
                f"{max(0.0, of_mask.newly_broken):.0%}",
                f"{max(0.0, of_mask.kept_falls_by):.0%}",
            ]
            body.append([*line, ENDS[of_mask.verdict], *beside])
    return markdown_table(HEAD, body)


def with_results(page: str, rows: Rows) -> str:
    """The page with what the rows say."""
    return between(page, "few weights", answer(rows), main_table(rows))


def draw_doses(rows: Rows) -> Picture:
    """The answers that show each behaviour, at every dose of the smaller mask's weights."""
    curves = {}
    for target in targets(rows):
        of_rate = rows.where(f"{target}_rate", target=target)
        whole = of_rate.where(mask="none")
        others = of_rate.where(mask=CLOSER)
        curves[TITLES[target]] = Rows(sorted([*others, *whole], key=lambda row: row.labels["dose"]))
    return profiles({"answers that show it": curves}, x="dose")


def draw_others(rows: Rows) -> Picture:
    """What is left of every behaviour under the mask of each."""
    rates = {f"{name}_rate": TITLES[name] for name in targets(rows)}
    cells = Rows(row.labelled(mask="none") for row in rows.where(mask="none"))
    for target in targets(rows):
        of_mask = rows.where(target=target, mask=CLOSER, dose=0.0)
        cells += [row.labelled(mask=TITLES[target]) for row in of_mask]
    shown = Rows(row for row in cells if row.metric in rates)
    return cross_ablation_figure({"answers that show it": shown}, rates)


if __name__ == "__main__":
    measured = Rows.read(ROWS)
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    draw_doses(measured).save(FIGURES / "few_weights_doses.svg")
    draw_others(measured).save(FIGURES / "few_weights_others.svg")
