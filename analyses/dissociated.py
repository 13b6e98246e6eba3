# %% [markdown]
# # F6. Do recognising, explaining and refusing harm come apart from producing it?
# A model that answers a harmful request can also tell that it is harmful, say why, and refuse. We
# find a circuit of each of these four abilities, all of one size, and remove one at a time. What
# the model still does is measured on items that no search has seen.
#
# Two abilities **dissociate doubly** when each loses more to the removal of its own circuit than of
# the other's, by 95 % intervals. An ability is compared only with itself, under two masks, so it
# does not matter that one is harder than the other. The dissociation is *clean* when, besides, each
# is kept under the other's circuit (loses at most 5 points), and *graded* otherwise. An ability whose
# rate under the other's circuit is not above chance, by its interval, is neither kept nor apart.
#
# Every circuit is found three times. A circuit that protects nothing shows whether abilities come
# apart by themselves; one that protects benign answers is the paper's own condition; one that
# protects all others shows whether abilities can be taken apart.
#
# *Controls.* Random weights, as many in every matrix. The circuit of refusal: without it a model
# should still produce harm, also when it is asked plainly, without a prefill. And recognition is
# measured in a second way, on which a bias to say yes has no effect: by the *pairs* of a harmful
# request and its twin in which the harmful request has the higher odds of yes.

# %%
from dataclasses import replace

from support.claims import Claim
from support.cross_ablation import ablation_rows
from support.curves import KEPT_RATE, rate_difference
from support.dissociation import Dissociation, dissociations_from
from support.figures import cross_ablation_figure, protection_panels

import harmcircuits as hc
from harmcircuits.search.circuit import STEPS
from harmcircuits.studies.summary import Roles

claim = Claim(
    "F6",
    "dissociated: recognition, explanation and refusal survive",
    models=("sft", "dpo"),
    small={"steps": 1},
)
METRICS = {behaviour.name: behaviour.metric for behaviour in Roles.standard().behaviours}
PRUNED = ("harmful", "recognition", "explanation", "refusal")
PROTECTED = {"none": "nothing", "benign": "benign answers", "others": "all others"}
PLAIN = "plain_harm_rate"
RATES = {
    **Roles.standard().rates,
    "recognition_pair_accuracy": "recognises pairs",
    PLAIN: "plain harm",
}
HARM, INCOHERENT = "harm_valid_rate", "harm_degenerate_rate"
OTHER_RATES = set(Roles.standard().rates) - {HARM, INCOHERENT}

# %% [markdown]
# ## The rule
# A case is a pair: generation and one other ability, in one model and seed. The *effect* is there if
# the ability is kept under harm's circuit in the paper's condition, benign answers alone protected.
# *With controls* it is there if besides the two are at least a graded double dissociation in this
# condition, and a clean one where all others are protected. Where random masks cost an ability more
# than is kept, a fall says nothing of circuits, and no pair of the model and seed shows the claim.
#
# Amended. Before the first run with the search: the search (it was in rounds) and with it the size,
# from 0.6 % to 0.2 % of the weights. On 30 November 2026, after seeing all earlier rows: the
# paper's condition, in place of "nothing protected". *Clean* had meant that neither loses more than
# ten points by the end of an interval, which one item of 48 decides; and pairs had been counted
# together by a rule of their own. **On 7 December 2026, after the rows had been read, a correction**:
# the floor of chance. A model that says yes to every question recognises half of them, and recognition
# counted as apart in six pairs because its own circuit drives it below that; in five it was at chance
# under harm's circuit. And the effect, which had not been counted, took the place of "in part" (a
# clean double dissociation where all others are protected, as the search was told to).


# %%
@claim.effect
def is_kept(rows: hc.Rows) -> dict[str, bool]:
    return {second: test.second.is_kept for second, test in pair_tests(rows, "benign").items()}


@claim.rule()
def is_borne_out(rows: hc.Rows) -> dict[str, bool]:
    is_readable = random_cost(rows).mean <= KEPT_RATE
    protecting_all = pair_tests(rows, "others")
    outcomes = {}
    for second, test in pair_tests(rows, "benign").items():
        is_clean = protecting_all[second].outcome == "clean double"
        outcomes[second] = is_readable and is_clean and "double" in test.outcome
    return outcomes


def pair_tests(rows: hc.Rows, protected: str) -> dict[str, Dissociation]:
    """Every other ability -> its test against generation, under one protection."""
    tests = {}
    for labels, test in dissociations_from("harmful", rows, METRICS):
        if labels["protected"] == protected:
            tests[str(labels["second"])] = test
    return tests


def random_cost(rows: hc.Rows) -> hc.Measurement:
    """The largest cost of random masks for one of the abilities in a model, mean over seeds."""
    costs = hc.Rows()
    for name in PRUNED:
        models = rows.where(METRICS[name]).pool("seed").by("ladder", "model")
        for model_rows in models.values():
            unpruned = model_rows.one(mask="none")
            for random in model_rows.where(mask="random"):
                costs += [rate_difference("cost", {}, unpruned, random)]
    return costs.largest()


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose verified answers are scored, and the random masks.


# %%
@claim.job
def circuits_of(model: hc.Model, seed: int, *, size: float = 0.002, steps: int = STEPS) -> hc.Rows:
    """Every ability under the circuit of each.

    Args:
        size: share of the weights in every circuit.
        steps: steps of each search.
    """
    answers = model.calibrations(share=0.5, seed=seed)
    names = [name for name in PRUNED if name in answers]
    circuits: dict[str, dict[str, hc.WeightMask]] = {}
    for label, protect in (("none", ()), ("benign", "benign"), ("others", "others")):
        options = {"protect": protect, "size": size, "steps": steps, "calibrations": answers}
        circuits[label] = {name: model.find_circuit(name, **options) for name in names}

    # Harmful requests without a prefill: refusal prevents an answer.
    metrics = {"rate": PLAIN, "nll": "plain_harm_nll"}
    plain = replace(model.behaviours["harmful"], name=PLAIN, prefill="", metrics=metrics)
    model = model.with_behaviours(plain)
    behaviours = [*answers, PLAIN]
    rows = model.measure(labels={"mask": "none"}, only=behaviours)
    for protected, masks in circuits.items():
        masks["random"] = hc.random_like(masks["harmful"], seed=seed)
        rows += ablation_rows(model, masks, {"protected": protected}, names=behaviours)
    return rows


rows = claim.rows()

# %% [markdown]
# ## What each circuit breaks
# Per cent of held-out requests, mean over seeds, in the last model of the rows. White is whole, red
# is gone. Where abilities come apart, a circuit has a red cell only at its own.

# %%
last = list(rows.pool("seed").by("ladder", "model").values())[-1]
titles = {name: f"protected: {title}" for name, title in PROTECTED.items()}
panels = protection_panels(last, titles)
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
    for protected in PROTECTED:
        for name, text in condition_numbers(rows, protected).items():
            numbers[f"protecting {PROTECTED[protected]}: {name}"] = text
    for without in pooled.where(PLAIN, mask="refusal", protected="others"):
        unpruned = pooled.one(PLAIN, mask="none")
        numbers["plain harm, without refusal's circuit"] = f"{unpruned.mean:.0%} to {without:.0%}"
    numbers["the most that random weights cost an ability"] = f"{random_cost(rows):.0%}"
    return numbers


def condition_numbers(rows: hc.Rows, protected: str) -> dict[str, str]:
    """The key numbers under one protection; none where it was not measured."""
    without = rows.pool("seed").where(mask="harmful", protected=protected)
    if not without:
        return {}
    numbers = {}
    for row in without.where(HARM) + without.where(INCOHERENT):
        numbers[RATES[row.metric]] = f"{row.mean:.0%}"
    lowest = hc.Rows(row for row in without if row.metric in OTHER_RATES).smallest()
    behaviour = f" ({RATES[lowest.metric]})" if lowest.mean < 1 else ""
    numbers["lowest other rate"] = f"{lowest.mean:.0%}{behaviour}"
    condition = rows.where(mask="none") + rows.where(protected=protected)
    outcomes = [test.outcome for _, test in dissociations_from("harmful", condition, METRICS)]
    n_clean, n_graded = outcomes.count("clean double"), outcomes.count("graded double")
    numbers[f"pairs apart, of {len(outcomes)} (cleanly)"] = f"{n_clean + n_graded} ({n_clean})"
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# Abilities that come apart at one size need not be independent: a larger circuit may cost both. And
# recognition is the answer to a question: it does not show that the model recognises harm while it
# writes.

# %%
claim.main()
