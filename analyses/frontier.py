# %% [markdown]
# # What do harmful answers become, and what does it cost?
# A search keeps within its budget and says nothing of what lies beyond. Here masks go on: weights are
# chosen in one shot, at several factors of the price of all that is protected, and under each mask we
# read what becomes of harmful answers and what everything else loses. A mask that ends harm within
# the budget is among them, or this shows that there is none.
#
# From the removal effects of these, less factor times price, the largest above zero are taken:
#
# * **one shot**: whole harmful answers;
# * **first tokens**: their first tokens only, where an answer decides what it becomes;
# * **less begun alike**: whole ones, less the effect on benign answers that begin in the same way, so
#   that a circuit of the beginning earns nothing;
# * **refusals preferred**: whole ones, less three tenths of the effect on refusals behind the harmful
#   beginning, so that weights earn whose removal makes these likelier;
# * **neurons**: whole ones, ranked by the mean over their weights.
#
# *Controls*, beside one shot at the last factor: as many random weights; the opposite sign; the
# benign **twin**, which is the same choice for benign answers with harm protected; the same weights
# halved instead of removed; and the **published** difference of two rankings, which knows no price.
#
# No rule judges this: every mask is shown, and none is chosen.

# %%
from pathlib import Path

from support import frontier
from support.claims import Claim
from support.figures import heatmaps

import harmcircuits as hc
from harmcircuits.behaviours.model import protected_data
from harmcircuits.studies.controls import unpruned_scores

claim = Claim(
    "frontier",
    "what do harmful answers become, and what does it cost?",
    models=("sft",),
    small={"factors": (1.0,), "unit_factors": ()},
)
RATES = {
    "harm_valid_rate": "harmful",
    "harm_refusal_rate": "refused",
    "harm_degenerate_rate": "degenerate",
    "borderline_valid_rate": "borderline answered",
}
RISE, HALVED = "_nll_change", "halved"

# %% [markdown]
# ## The experiment, for one model
# All verified calibration answers are scored; figures are held out.


# %%
@claim.job
def under_masks(
    model: hc.Model,
    seed: int,
    *,
    size: float = 0.002,
    factors: tuple[float, ...] = (2.0, 1.0, 0.5),
    unit_factors: tuple[float, ...] = (2**-5, 2**-6),
    n_first: int = 2,
    openings: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
) -> hc.Rows:
    """What every mask does.

    Args:
        size: share of the weights in a mask, at most.
        factors: of the price, from the dearest down.
        unit_factors: the same where whole neurons are chosen.
        n_first: so many tokens of an answer count as its first ones.
        openings: beginnings of answers that nothing was scored under.
        files: of further masks, such as those of a search.
    """
    answers = model.calibrations()
    protected = protected_data(model, "harmful", calibrations=answers)
    unpruned = unpruned_scores(model, "harmful", answers["harmful"], protected)
    choice = {"size": size, "factors": factors}
    masks = dict(frontier.circuits(model, unpruned, answers, **choice, n_first=n_first))
    masks |= frontier.neurons(model, unpruned, size=size, factors=unit_factors)
    last = masks[f"one shot, factor {factors[-1]:.2g}"]
    masks |= frontier.controls(model, unpruned, answers, last, size=size)
    masks |= {Path(file).stem: hc.WeightMask.load(file) for file in files}
    del unpruned

    before = frontier.state_of(model)
    rows = frontier.state_rows(model, before, {"mask": "none"})
    rows += frontier.opening_rows(model, openings, {"mask": "none"})
    for name, mask in {**masks, HALVED: last}.items():
        where = {"mask": name}
        rows += [hc.Measurement.exact("weights_removed", where, mask.n_removed)]
        with hc.masked(model.bridge, mask, scale=0.5 if name == HALVED else 0.0):
            rows += frontier.state_rows(model, frontier.state_of(model), where, before=before)
            rows += frontier.opening_rows(model, openings, where)
    return rows


rows = claim.rows()
first = next(iter(rows.by("ladder", "model").values()))  # is shown

# %% [markdown]
# ## What harmful answers become
# Shares of held-out answers.

# %%
usual = hc.Rows(row for row in first if "opening" not in row.labels)
shares = hc.Rows(row.labelled(answers=RATES[row.metric]) for row in usual if row.metric in RATES)
figure = heatmaps({"share of answers": shares}, x="answers", y="mask", widest=1.0)
claim.figure("What harmful answers become", figure)

# %% [markdown]
# ## What it costs
# Rises of the loss on held-out reference answers, nats per token.

# %%
rises = hc.Rows(
    row.labelled(of=row.metric.removesuffix(RISE)) for row in usual if row.metric.endswith(RISE)
)
claim.figure("What it costs", heatmaps({"rise of the loss": rises}, x="of", y="mask"))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    numbers = {}
    rows = hc.Rows(row for row in rows if "opening" not in row.labels)
    for name, of_mask in rows.by("mask").items():
        for rate in of_mask.where("harm_valid_rate"):  # none where only losses were read
            numbers[f"harmful answers, {name}"] = f"{rate:.0%}"
        rises = hc.Rows(row for row in of_mask if row.metric.endswith(RISE))
        costs = hc.Rows(row for row in rises if row.metric != f"harm{RISE}")
        if costs:  # the unpruned model has none
            most = costs.largest()
            of = most.metric.removesuffix(RISE)
            numbers[f"what loses most, {name}"] = f"{most:+.2f} nats ({of})"
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# One shot is the first step of a search, so a search may find masks that cost less. The judge was
# validated on answers of the unpruned model, and under a mask it reads others: read some of them. An
# answer that only announces what does not follow counts as degenerate.

# %%
claim.main()
