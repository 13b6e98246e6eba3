# %% [markdown]
# # F3. Is harm separate from benign capability?
# We remove a circuit of harm and test the abilities that the model should keep: benign answers, and
# facts. Each answer is compared with the unpruned model's answer to the same request.
#
# A search can spare abilities, and then the search itself makes a part of the separation. So we
# find the circuit three times: sparing nothing, benign answers, and all other abilities. An ability
# that survives a circuit that spares nothing is separate in the model itself.
#
# *Controls.* Random weights, as many in every matrix. And the same search for knowledge, and for
# harm's **twin**: benign requests about the same items (*use* in place of *abuse*). If the twin's
# circuit, too, cost benign answers nothing, the size would break nothing, and sparing mean nothing.
#
# The second question is which weights two circuits have in common. Their **lift** is the number of
# weights that they share, over the number that random masks share with as many weights in every
# matrix. Any two abilities share some machinery, so harm and its twin are compared with pairs of
# benign tasks: benign answers, and the two questions of fact about an item, its *parts* and its
# *kind*.

# %%
from itertools import product

from support.claims import Claim
from support.cross_ablation import change_rows, overlap_rows, resampled_circuits
from support.curves import KEPT_NLL, KEPT_RATE, outcomes_of
from support.figures import cross_ablation_figure, overlap_figure, protection_panels

import harmcircuits as hc
from harmcircuits.search.circuit import STEPS
from harmcircuits.studies.summary import Roles
from harmcircuits.views.tables import DASH

claim = Claim(
    "F3",
    "distinct: harm is separate from benign capability",
    models=("sft",),
    small={"steps": 2, "n_resamples": 2},
)
HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"
# The abilities that each circuit spares, by the label `protected`.
PROTECTED: dict[str, dict] = {
    "none": {"harmful": (), "benign": (), "knowledge": (), "parts": (), "kind": ()},
    "twin": {"harmful": "benign", "benign": "harmful"},
    "others": {"harmful": "others", "benign": "others"},
}
TITLES = {"none": "nothing", "twin": "its twin", "others": "all others"}
TASKS = ("benign", "parts", "kind")
F6_ABILITIES = ("recognition", "explanation", "refusal")  # spared here, measured in F6
REFERENCE = [("benign", "parts"), ("benign", "kind"), ("parts", "kind")]

# %% [markdown]
# ## The rule, fixed before any run
# A circuit *separates* when (a) it leaves at most half of the unpruned harm, by an interval below
# that under random weights; (b) utility is kept: benign answers, knowledge where the model has it,
# and the loss on benign answers; and (c) the twin's circuit under the same protection costs benign
# answers more, by intervals. The *effect* is there in a model and seed when a circuit that protects
# benign answers, the paper's condition, halves harm and keeps utility. *With controls* it is there
# when circuits separate that protect nothing, and that protect benign answers, and when harm shares
# no more with its twin than benign tasks do among themselves, by intervals, under either null:
# random masks with as many weights in every matrix, and with as many in every row and column.
#
# Amended. Before the first run with the search: the search (it was in rounds) and the size, from
# 0.6 % to 0.2 % of the weights. On 30 November 2026, after seeing all earlier rows: utility was
# kept if the ends of intervals, the widest of three seeds, stayed within 5 points, so that one item
# of 64 decided a model; now *kept* means the same as in every claim (`support/claims.py`). Seeds
# were pooled, and the worst model decided. Only the first of the two nulls was read. Lifts are
# read, then and now, from masks in one shot, which alone have intervals over the calibration items.
# On 7 December 2026 the effect took the place of "in part", which a circuit that protects all others
# could show as well.

# %%
HALF = 0.5
NULLS = {"per matrix": "overlap_lift", "per row and column": "overlap_lift_marginal"}


@claim.effect
def is_distinct(rows: hc.Rows) -> bool:
    return is_halved(rows, "twin") and is_kept(rows.where(protected="twin", mask="harmful"))


@claim.rule()
def is_borne_out(rows: hc.Rows) -> bool:
    is_separate = separates(rows, "none") and separates(rows, "twin")
    return is_separate and all(is_apart(rows, null) for null in NULLS)


def is_apart(rows: hc.Rows, null: str) -> bool:
    twin, tasks = lifts(rows, null)
    return bool(tasks) and twin.low <= max(row.high for row in tasks)


def separates(rows: hc.Rows, protected: str) -> bool:
    pruned = rows.where(protected=protected)
    harm, random = pruned.one(HARM, mask="harmful"), pruned.one(HARM, mask="random")
    is_gone = is_halved(rows, protected) and harm.high < random.low
    twin, benign = pruned.one(BENIGN, mask="benign"), pruned.one(BENIGN, mask="harmful")
    return is_gone and twin.high < benign.low and is_kept(pruned.where(mask="harmful"))


def is_halved(rows: hc.Rows, protected: str) -> bool:
    unpruned = rows.one(HARM, mask="none")
    return rows.one(HARM, protected=protected, mask="harmful").mean <= HALF * unpruned.mean


def is_kept(pruned: hc.Rows) -> bool:
    changes = pruned.where(f"{BENIGN}_change") + pruned.where("knowledge_rate_change")
    is_able = all(change.mean >= -KEPT_RATE for change in changes)
    return is_able and pruned.one("benign_nll_change").mean <= KEPT_NLL


def lifts(rows: hc.Rows, null: str) -> tuple[hc.Measurement, hc.Rows]:
    """The lift of harm and its twin, and of pairs of benign tasks, if the model has them."""
    by_pair = rows.where(NULLS[null], selection="one shot").by("first", "second")
    tasks = hc.Rows(by_pair[pair].one() for pair in REFERENCE if pair in by_pair)
    return by_pair["harmful", "benign"].one(), tasks


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose answers are scored, the random masks, the resamples.


# %%
@claim.job
def circuits_of(
    model: hc.Model, seed: int, *, size: float = 0.002, steps: int = STEPS, n_resamples: int = 40
) -> hc.Rows:
    """What each circuit breaks, and which weights the circuits share.

    Args:
        size: share of the weights in every circuit.
        steps: steps of each search.
        n_resamples: masks in one shot from resampled items, for the intervals of lifts.
    """
    tasks = [name for name in ("parts", "kind") if name in model.behaviours]
    answers = model.calibrations([*model.whole_behaviours, *tasks], share=0.5, seed=seed)
    whole = outcomes_of(model, [name for name in answers if name not in (*tasks, *F6_ABILITIES)])

    rows = hc.Rows()
    for outcomes in whole.values():
        rows += outcomes.rows({"mask": "none"})
    circuits: dict[str, dict[str, hc.WeightMask]] = {}
    for protected in PROTECTED:
        masks = circuits_under(protected, model, answers, size=size, steps=steps)
        circuits[protected] = masks
        random = hc.random_like(masks["harmful"], seed=seed)
        rows += change_rows(model, {**masks, "random": random}, whole, {"protected": protected})

    free = circuits["none"]
    compared = [name for name in ("harmful", *TASKS) if name in free]
    options = {"size": size, "n_resamples": n_resamples, "seed": seed}
    one_shot = resampled_circuits(model, answers, compared, **options)
    return rows + overlap_rows(one_shot, free, size=size, n_samples=10)


def circuits_under(protected: str, model: hc.Model, answers: dict, **options) -> dict:
    """The circuit of each ability under one protection."""
    masks = {}
    for name, protect in PROTECTED[protected].items():
        if name in answers:
            options |= {"protect": protect, "calibrations": answers}
            masks[name] = model.find_circuit(name, **options)
    return masks


rows = claim.rows()

# %% [markdown]
# ## What each circuit breaks
# Per cent of held-out requests, mean over seeds, on the first model of the rows. White is whole,
# red is gone. A circuit of harm alone has one red cell in its line.

# %%
first = next(iter(rows.by("ladder", "model").values())).pool("seed")
titles = {protected: f"spared: {names}" for protected, names in TITLES.items()}
panels = protection_panels(first, titles)
claim.figure("What is broken", cross_ablation_figure(panels, Roles.standard().rates))

# %% [markdown]
# ## What circuits share
# With nothing spared. The dotted line is chance. The bars of masks in one shot resample the
# calibration items; the bars of the search count weights only (Wilson).

# %%
panels = {name: first.where("overlap_lift", selection=name) for name in ("one shot", "search")}
pairs = {pair: ", ".join(pair) for pair in [*product(["harmful"], TASKS), *REFERENCE]}
claim.figure("What is shared", overlap_figure(panels, pairs))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    seeds = list(rows.by("seed").values())
    rows, numbers = rows.pool("seed"), {}
    for protected, title in TITLES.items():
        n_separate = sum(separates(seed, protected) for seed in seeds)
        harm = rows.one(HARM, protected=protected, mask="harmful")
        numbers[f"protecting {title}: harm left"] = f"{harm:.0%}"
        numbers[f"protecting {title}: separates"] = f"{n_separate} of {len(seeds)}"
    for null in NULLS:
        twin, tasks = lifts(rows, null)
        task_lifts = ", ".join(f"{row.mean:.1f}" for row in tasks)
        numbers[f"lift of harm and its twin, {null}"] = f"{twin:.1f}"
        numbers[f"lifts of pairs of benign tasks, {null}"] = task_lifts or DASH
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# A lift says where two circuits lie, not what they do: two circuits may share weights although one
# can be removed without the other, which the first part tests. And the organism has only three
# benign tasks.

# %%
claim.main()
