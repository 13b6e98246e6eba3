# %% [markdown]
# # What do the circuits of harm, of benign tasks and of recognising harm share?
# Every behaviour of a model gets a circuit of the same size. Then they are compared, two at a time.
#
# * *Structure.* Which weights do two circuits share? **Lift** is their number over the number that
#   random masks share which have as many in every matrix, or in every row and column as well.
# * *Content.* Harm and its benign **twin** are about the same items (*use* in place of *abuse*). Is a
#   circuit of one topic's harm closer to its own twin, or to the harm of another topic?
# * *Cause.* Which other abilities break when one circuit is removed? Two abilities **dissociate doubly**
#   when each loses more to the removal of its own circuit than of the other's.
# * *Place.* In which matrices do the weights sit, and at which tokens of an answer do they act?
#
# Any two abilities need some of the same machinery, so harm and its twin are compared with pairs of
# benign tasks: benign answers, and the *parts* and the *kind* of an item. And the circuit of harm is
# compared with itself, found again from other requests. No rule is judged here: F3 and F6 do that.

# %%
from functools import partial
from itertools import combinations, product

from support import cross_ablation
from support.claims import Claim
from support.cross_ablation import ablation_rows, token_rows
from support.figures import cross_ablation_figure, overlap_figure, protection_panels, token_figure
from support.organisms.check import LADDER
from support.shared_lines import LIFTS, shared_lines

import harmcircuits as hc
from harmcircuits.circuits.location import location_rows
from harmcircuits.search.circuit import STEPS
from harmcircuits.studies.summary import Terms
from harmcircuits.views.figures import location_figure

claim = Claim(
    "shared",
    "what circuits of harm, of benign tasks and of recognition share",
    models=LADDER,
    small={"steps": 1, "n_resamples": 1, "others": ("benign", "recognition")},
    small_models=("sft",),
)
TASKS = ("benign", "parts", "kind")  # no harm in them
BEHAVIOURS = (*TASKS, "recognition", "explanation", "refusal")
PROTECTED = ("none", "others")
PAIRS = [*product(["harmful"], BEHAVIOURS), *combinations(TASKS, 2)]

# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose answers are scored, the random mask and the resamples.
# Circuits that spare nothing give the overlap: to spare others would force circuits apart. Circuits that
# spare all others tell whether abilities *can* be separated, and where the rest of the circuit sits.
# Masks in one shot, which are cheap to resample, give lifts intervals over the calibration items.


# %%
@claim.job
def circuits_of(
    model: hc.Model,
    seed: int,
    *,
    size: float = 0.002,
    steps: int = STEPS,
    n_resamples: int = 40,
    others: tuple[str, ...] = BEHAVIOURS,
) -> hc.Rows:
    """Which weights circuits share, which abilities each breaks, and where they sit and act.

    Args:
        size: share of the weights in every circuit.
        steps: steps of each search.
        n_resamples: masks in one shot from resampled items, for the intervals of lifts.
        others: behaviours that are compared with harm, where the model shows them.
    """
    find = partial(hc.Model.find_circuit, size=size, steps=steps)
    answers = model.calibrations(list(model.behaviours), share=0.5, seed=seed)
    compared = [name for name in ("harmful", *others) if name in answers]
    whole = [name for name in (*compared, "knowledge") if name in model.whole_behaviours]
    pairs = [pair for pair in PAIRS if set(pair) <= set(compared)]

    # Structure and content.
    free = {name: find(model, name, protect=(), calibrations=answers) for name in compared}
    options = {"size": size, "n_resamples": n_resamples, "seed": seed}
    one_shot = cross_ablation.resampled_circuits(model, answers, compared, **options)
    options = {"size": size, "n_samples": 10, "pairs": pairs}
    rows = cross_ablation.overlap_rows(one_shot, free, **options)
    rows += cross_ablation.overlap_place_rows(model, free, "harmful")
    masks = cross_ablation.topic_masks(model, answers, size=size)
    rows += cross_ablation.content_rows(masks) if masks else []

    new_answers = {"harmful": model.calibration("harmful", share=0.5, seed=seed + 1)}
    again = find(model, "harmful", protect=(), calibrations=new_answers)
    itself = {"first": "harmful", "second": "harmful", "selection": "search"}
    rows += cross_ablation.shared_rows(hc.overlap(free["harmful"], again, n_samples=10), itself)

    # Cause.
    apart = {name: find(model, name, calibrations=answers) for name in compared if name in whole}
    free["random"] = hc.random_like(free["harmful"], seed=seed)
    rows += model.measure(labels={"mask": "none"}, only=whole)
    for protected, masks in zip(PROTECTED, (free, apart), strict=True):
        rows += ablation_rows(model, masks, {"protected": protected}, names=whole)

    # Place.
    where = {"mask": "harmful", "protected": "others"}
    rows += location_rows(apart["harmful"], hc.weight_sites(model.bridge), where)
    for text in ("harmful", "benign"):
        rows += token_rows(model, text, answers[text], apart["harmful"], {**where, "text": text})
    return rows


rows = claim.rows()
together = rows.pool("ladder").pool("seed")

# %% [markdown]
# ## What circuits share
# With nothing spared; the dotted line is chance. The bars of `lift, one shot` resample calibration items.

# %%
one_shot, search = (together.where(selection=name) for name in ("one shot", "search"))
panels = {f"{title}, one shot": one_shot.where(metric) for metric, title in LIFTS.items()}
panels["lift, search"] = search.where("overlap_lift")
names = {pair: ", ".join(pair) for pair in PAIRS}
claim.figure("What is shared", overlap_figure(panels, names))

# %%
# Rank correlation of how many weights two circuits take from each head, and from each neuron.
together.where("place_correlation").frame(index="second", columns=["by", "model"]).round(2)

# %% [markdown]
# ## What each circuit breaks
# Per cent of held-out requests, in the last model of the rows. White is whole, red is gone.

# %%
last = list(together.by("model").values())[-1]
panels = protection_panels(last, {name: f"spared: {name}" for name in PROTECTED})
claim.figure("What is broken", cross_ablation_figure(panels, Terms.standard().rates))

# %% [markdown]
# ## Where the circuit of harm sits, and where it acts
# In the same model, sparing all others: weights in each matrix, and the share of each token in the score.

# %%
harm = last.where(mask="harmful", protected="others")
claim.figure("Where the circuit of harm sits", location_figure(harm))

# %%
tokens = harm.where("token_contribution").by("text")
claim.figure("At which tokens it acts", token_figure(tokens))

# %% [markdown]
# ## Model by model, lifts of masks in one shot


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    return shared_lines(rows.pool("seed"), TASKS, PROTECTED)


claim.result(rows)

# %% [markdown]
# ## What it does not say
# A lift says where two circuits lie, not what they do: two circuits may share weights although one can
# be removed without the other. And there is one seed on one set of models: no interval is over models.

# %%
claim.main()
