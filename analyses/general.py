# %% [markdown]
# # F2. Is there one mechanism for all types of harm?
# Harmful requests come in types. We find a circuit on the answers to one type, or to all types but
# one, and measure the types that the search did not use. If harm is one mechanism, these types fall
# too. Every circuit of harm protects all other abilities, among them benign answers about all
# types, and all figures are of held-out items.
#
# *Controls.* Random weights, as many in every matrix. The benign **twin** of each type: the same
# search for benign answers about it. And a **mixed** circuit, found on as few items as one type
# has, drawn from all types: it tells whether one type or little data makes a circuit narrow.
#
# A second test is which weights the circuits of types have in common. We remove the weights that at
# least k circuits hold, and compare their number with the number that random masks have in common.

# %%
from dataclasses import replace

from support import transfer
from support.claims import Claim
from support.curves import KEPT_RATE
from support.figures import heatmaps

import harmcircuits as hc
from harmcircuits.prompts import PromptSet
from harmcircuits.search.circuit import STEPS

claim = Claim(
    "F2",
    "general: one mechanism for all types of harm",
    models=("sft",),
    small={"steps": 1, "n_types": 2},
)
HARM, BENIGN = "harm_valid_rate", "benign_valid_rate"
NAMES = ("harmful", "benign")
HALF = 0.5  # the largest rest of harm, as a share of the unpruned rate
LEVEL = 0.05  # p below it: the words that types have in common explain the transfer

# %% [markdown]
# ## The rule, fixed before any run
# A type *transfers* when its harm falls to at most half of the unpruned rate, by an interval that
# lies below that under random masks, and benign answers to the types that were not scored are kept.
# The *effect* is there in a model and seed when harm of the other types transfers under circuits of
# one type (mean over types), or more than half of the left-out types do, whatever random masks do.
# *With controls* it is there when both are so, and every left-out type transfers.
#
# *The confound.* In the organisms' world each topic draws two of four harmful words, so two topics
# share none, one or two. A circuit of one topic that removes words, not harm, carries over to
# topics with the same words. So for every ladder we correlate, over all pairs of topics, the harm
# of one under the circuit of the other with the number of words that they share, and permute topics
# (20,000 times). If p is below 0.05 in at least half of the models, words explain the transfer, and
# the claim is undecided on these models.
#
# Amended. Before the first run with the search: the search (it was in rounds), the size, from 0.6 %
# to 0.2 % of the weights, and its steps: 5 in place of 10, for three seeds need 75 searches. The
# mixed circuit was added after a trial on one seed. On 30 November 2026, after seeing all earlier
# rows: the confound was added; benign answers might lose ten points, and are now *kept* as in every
# other claim; seeds were pooled, and the worst model decided; the circuits of twins protected harm
# alone, and now protect all others, as the circuits of harm do. Then all was run again, once, by
# the search of that day (gates), at its own number of steps: three ladders, one seed. In these rows
# circuits of one type had removed words, so the search was changed to score fresh answers under its
# mask as well (`fresh_answers`), and all was run once more. On 7 December 2026 what had been "in
# part" became the effect.


# %%
@claim.effect
def is_general(rows: hc.Rows) -> bool:
    left_out = [falls(type_rows) for type_rows in types_left_out(rows)]
    return falls(rows.where(relation="other types")) or sum(left_out) > len(left_out) / 2


@claim.rule()
def is_borne_out(rows: hc.Rows) -> bool:
    is_across = transfers(rows.where(relation="other types"))
    return is_across and all(transfers(type_rows) for type_rows in types_left_out(rows))


def transfers(rows: hc.Rows) -> bool:
    return falls(rows) and rows.one(HARM, mask="circuit").high < rows.one(HARM, mask="random").low


def falls(rows: hc.Rows) -> bool:
    """Whether harm is halved, and benign answers are kept."""
    unpruned, pruned = (rows.one(HARM, mask=mask) for mask in ("none", "circuit"))
    benign_loss = rows.one(BENIGN, mask="none").mean - rows.one(BENIGN, mask="circuit").mean
    return pruned.mean <= HALF * unpruned.mean and benign_loss <= KEPT_RATE


def types_left_out(rows: hc.Rows) -> list[hc.Rows]:
    """The rows of each type under the circuit of all others."""
    return list(rows.where(relation="left out").by("tested").values())


@claim.confound
def is_explained_by_words(rows: hc.Rows) -> bool:
    """Whether types that share words transfer to each other, in at least half of the models."""
    p_values = [transfer.common_words_test(pairs).p for pairs in type_pairs(rows)]
    n_explained = sum(p < LEVEL for p in p_values if p is not None)
    return bool(n_explained) and 2 * n_explained >= len(p_values)


def type_pairs(rows: hc.Rows) -> list[hc.Rows]:
    """For each model the harm of every type under the circuit of each, mean over seeds."""
    pairs = hc.Rows(row for row in rows.where(HARM, mask="circuit") if "scored" in row.labels)
    return [model_rows.pool("seed") for model_rows in pairs.by("ladder", "model").values()]


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose answers are scored, the random masks, the mixed
# items.


# %%
@claim.job
def circuits_of(
    model: hc.Model, seed: int, *, size: float = 0.002, steps: int = STEPS, n_types: int = 0
) -> hc.Rows:
    """Every type under circuits of one type, of all but one, and of few items of all.

    Args:
        size: share of the weights in every circuit.
        steps: steps of each search.
        n_types: so many types are scored and left out; 0 for all.
    """
    answers = model.calibrations(share=0.5, seed=seed)
    types = transfer.categories_of(model, NAMES, answers)
    harmful, benign = (answers[name].prompts for name in NAMES)

    def circuit(name: str, prompts: PromptSet) -> hc.WeightMask:
        batches = model.batches(model.behaviour(name), prompts)
        data = replace(answers[name], prompts=prompts, batches=batches)
        calibrations = {**answers, name: data}
        return model.find_circuit(name, size=size, steps=steps, calibrations=calibrations)

    type_masks: dict[str, dict[str, hc.WeightMask]] = {"circuit": {}, "random": {}, "twin": {}}
    left_out = {}
    for number, type_ in enumerate(types[: n_types or None]):
        mask = circuit("harmful", transfer.in_category(harmful, type_))
        # A seed of its own for each: masks drawn with one seed would share weights.
        type_masks["random"][type_] = hc.random_like(mask, seed=len(types) * seed + number)
        type_masks["circuit"][type_] = mask
        type_masks["twin"][type_] = circuit("benign", transfer.in_category(benign, type_))
        left_out[type_] = circuit("harmful", transfer.outside_category(harmful, type_))
    mixed = circuit("harmful", harmful.sampled(1 / len(types), seed=seed))

    rows = transfer.rate_rows(model, NAMES, {"mask": "none", "relation": "other types"})
    rows += transfer.rate_rows(model, NAMES, {"mask": "mixed"}, mask=mixed)
    for kind, masks in type_masks.items():
        rows += transfer.transfer_rows(model, masks, NAMES, {"mask": kind})
        rows += transfer.common_rows(model, list(masks.values()), NAMES, {"mask": kind})
    for type_, circuit_mask in left_out.items():
        random = hc.random_like(circuit_mask, seed=seed)
        for kind, mask in {"none": None, "circuit": circuit_mask, "random": random}.items():
            where = {"mask": kind, "relation": "left out"}
            rows += transfer.rate_rows(model, NAMES, where, mask=mask, category=type_)
    return rows


rows = claim.rows()

# %% [markdown]
# ## Circuits of one type
# Valid harmful answers about every type (columns) without the circuit of one (lines), mean over
# seeds. If each type had a mechanism of its own, only the diagonal would be pale.

# %%
first = next(iter(rows.by("ladder", "model").values())).pool("seed")
matrix = hc.Rows(row for row in first.where(mask="circuit") if "scored" in row.labels)
figure = heatmaps({"valid harm": matrix}, x="tested", y="scored", widest=1.0)
claim.figure("Circuits of one type", figure)

# %% [markdown]
# ## Circuits of all types but one
# Valid harmful answers about the type that was left out.

# %%
left_out = rows.where(HARM, relation="left out")
left_out.pool("seed").frame(index=["ladder", "model", "tested"], columns="mask").round(2)

# %% [markdown]
# ## Weights that types share
# In at least so many of the circuits, and of as many random masks; and the rates without them.

# %%
common = hc.Rows(row for row in first if "shared_by" in row.labels)
common.pool("seed").frame(index=["ladder", "shared_by"], columns=["metric", "mask"]).round(2)


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    pooled = rows.pool("seed")
    left_out = []
    for seed_rows in rows.by("seed").values():
        left_out += [transfers(type_rows) for type_rows in types_left_out(seed_rows)]
    across = pooled.where(relation="other types")
    benign = across.where(BENIGN)
    own = pooled.one(HARM, mask="circuit", relation="own type")
    numbers = {
        "harm of a type, under its own circuit": f"{own:.0%}",
        "under circuits of other types": f"{across.one(HARM, mask='circuit'):.0%}",
        "under random weights": f"{across.one(HARM, mask='random'):.0%}",
        "under a circuit of as few items of all types": f"{pooled.one(HARM, mask='mixed'):.0%}",
        "benign answers, under circuits of other types": f"{benign.one(mask='circuit'):.0%}",
        "benign answers, under circuits of others' twins": f"{benign.one(mask='twin'):.0%}",
        "left-out types that transfer, of all seeds": f"{sum(left_out)} of {len(left_out)}",
    }
    for pairs in type_pairs(rows):
        test = transfer.common_words_test(pairs)
        for n_words, rate in test.rates.items():
            title = f"harm left by another type's circuit, {n_words} words shared"
            numbers[title] = f"{rate:.0%}"
        if test.p is not None:
            numbers["chance of that, topics permuted"] = f"p = {test.p:.3f}"
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# Types of an organism differ in words only, and weights that all types need may do different things
# for each. A ladder whose topics draw their words at random would tell words from types; none was
# trained.

# %%
claim.main()
