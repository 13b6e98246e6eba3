# %% [markdown]
# # F6. Do recognising, explaining and refusing harm come apart from producing it?
# A model that answers a harmful request can also tell that it is harmful, say why, and refuse. We
# find a circuit of each of these four abilities, all of one size, and remove one at a time. What the
# model still does is measured on items that no search has seen.
#
# Two abilities **dissociate doubly** when each loses more to the removal of its own circuit than of
# the other's, by 95 % intervals. An ability is compared only with itself, under two masks, so it does
# not matter that one is harder than the other. The dissociation is *clean* when, besides, neither
# loses more than ten points to the other's circuit, and *graded* otherwise.
#
# Every circuit is found twice. One that spares nothing shows whether abilities come apart by
# themselves; one that spares all others, whether they can be taken apart.
#
# *Controls.* Random weights, as many in every matrix. The circuit of refusal: without it a model
# should still produce harm, and do so when it is asked plainly, with no beginning of an answer
# written for it. And recognition is read in another way, which a bias to say yes does not move: by
# the *pairs*, of a harmful request and its twin, in which the former has the higher odds of yes.

# %%
from dataclasses import replace
from functools import partial

from support.claims import FAILS, HOLDS, IN_PART, Claim, Outcome
from support.cross_ablation import ablation_rows, circuits_both_ways
from support.dissociation import OUTCOMES, SPARED, dissociations_from
from support.figures import cross_ablation_figure

import harmcircuits as hc
from harmcircuits.studies.summary import Terms

claim = Claim(
    "F6",
    "dissociated: recognition, explanation and refusal survive",
    models=("sft", "dpo"),
    small={"steps": 1},
)
METRICS = {behaviour.name: behaviour.metric for behaviour in Terms.standard().behaviours}
PRUNED = ("harmful", "recognition", "explanation", "refusal")
PROTECTED = {"none": "nothing", "others": "all others"}
PLAIN = "plain_harm_rate"
RATES = {
    **Terms.standard().rates,
    "recognition_pair_accuracy": "recognises pairs",
    PLAIN: "plain harm",
}

# %% [markdown]
# ## The rule, fixed before any run
# It counts pairs: generation with each other ability shown, in every model and seed. The claim
# *holds* when with all others protected every pair is a clean double dissociation, and with nothing
# protected at least a graded one. It *holds in part* when with all others protected at least half of
# the pairs are at least graded; else it *does not hold here*. Where random masks cost any of these
# abilities more than ten points (mean over seeds), a fall says nothing of circuits, and the claim
# does not hold.
#
# The rule stands as it was. What changed before this run is the search (it was in rounds) and with
# it the size, from 0.6 % to 0.2 % of the weights.


# %%
@claim.outcome
@claim.rule()
def is_borne_out(rows: hc.Rows) -> Outcome:
    outcomes: dict[str, list[str]] = {"none": [], "others": []}
    for labels, test in dissociations_from("harmful", rows, METRICS):
        outcomes[str(labels["protected"])].append(test.outcome)
    free, apart = outcomes["none"], outcomes["others"]

    n_double = sum("double" in outcome for outcome in apart)  # clean or graded
    if not apart or n_double < len(apart) / 2 or random_cost(rows).mean > SPARED:
        return FAILS
    is_apart_unspared = all("double" in outcome for outcome in free)
    return HOLDS if set(apart) == {"clean double"} and is_apart_unspared else IN_PART


def random_cost(rows: hc.Rows) -> hc.Measurement:
    """The most that random masks cost one of the abilities in a model, mean over seeds."""
    costs = hc.Rows()
    for metric in [METRICS[name] for name in PRUNED]:
        for of_model in rows.where(metric).pool("seed").by("ladder", "model").values():
            unpruned = of_model.one(mask="none")
            for random in of_model.where(mask="random"):
                costs += [hc.Measurement.difference("cost", {}, unpruned, random)]
    return max(costs, key=lambda cost: cost.mean)


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose verified answers are scored, and the random masks.


# %%
@claim.job
def circuits_of(model: hc.Model, seed: int, *, size: float = 0.002, steps: int = 10) -> hc.Rows:
    """Every ability under the circuit of each.

    Args:
        size: share of the weights in every circuit.
        steps: steps of each search.
    """
    answers = model.calibrations(share=0.5, seed=seed)
    shown = [name for name in PRUNED if name in answers]
    find = partial(hc.Model.find_circuit, steps=steps)
    circuits = circuits_both_ways(model, answers, shown, size=size, find=find)

    # Harm asked for with no beginning of an answer: what refusal prevents.
    metrics = {"rate": PLAIN, "nll": "plain_harm_nll"}
    plain = replace(model.behaviours["harmful"], name=PLAIN, prefill="", metrics=metrics)
    model = model.with_behaviours(plain)
    measured = [*answers, PLAIN]
    rows = model.measure(labels={"mask": "none"}, only=measured)
    for protected, masks in circuits.items():
        masks["random"] = hc.random_like(masks["harmful"], seed=seed)
        rows += ablation_rows(model, masks, {"protected": protected}, only=measured)
    return rows


rows = claim.rows()

# %% [markdown]
# ## What each circuit breaks
# Per cent of held-out requests, mean over seeds, in the last model of the rows. White is whole, red
# is gone. Where abilities come apart, a circuit has a red cell only at its own.

# %%
last = list(rows.pool("seed").by("ladder", "model").values())[-1]
panels = {}
for protected, spared in PROTECTED.items():
    panels[f"spared: {spared}"] = last.where(mask="none") + last.where(protected=protected)
columns = {metric: title for metric, title in RATES.items() if last.where(metric)}
claim.figure("What is broken", cross_ablation_figure(panels, columns))

# %% [markdown]
# ## Generation against each other ability
# *Gap*: an ability's rate under the other's circuit, minus that under its own. *Cost*: its unpruned
# rate, minus that under the other's circuit. Generation is the first ability. Means over seeds; the
# key numbers count pairs in every seed.

# %%
tested = hc.Rows()
for labels, test in dissociations_from("harmful", rows, METRICS):
    tested += test.rows(labels)
tested.pool("seed").frame(index=["ladder", "model", "protected", "second"], columns="metric").round(
    2
)


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    pooled, numbers = rows.pool("seed"), {}
    for protected, spared in PROTECTED.items():
        without = pooled.where(mask="harmful", protected=protected)
        for metric, title in RATES.items():
            for row in without.where(metric):
                numbers[f"sparing {spared}: {title}"] = f"{row.mean:.0%}"
        of_spared = rows.where(mask="none") + rows.where(protected=protected)
        tests = dissociations_from("harmful", of_spared, METRICS)
        found = [test.outcome for _, test in tests]
        for outcome in OUTCOMES:
            numbers[f"sparing {spared}: pairs, {outcome}"] = (
                f"{found.count(outcome)} of {len(found)}"
            )
    for without in pooled.where(PLAIN, mask="refusal", protected="others"):
        unpruned = pooled.one(PLAIN, mask="none")
        numbers["plain harm, without the circuit of refusal"] = (
            f"{unpruned.mean:.0%} to {without:.0%}"
        )
    numbers["the most that random weights cost an ability"] = f"{random_cost(rows):.0%}"
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# Abilities that come apart at one size need not be independent: a larger circuit may cost both. And
# recognition is asked for: that a model answers does not show that it sees harm while it writes.

# %%
claim.main()
