# %% [markdown]
# # F2, F3 and F6 by loss: for your own model
# A judge of free text is coarse and generation is dear; the loss on the model's own verified
# answers is neither. So this asks in nats what `general.py`, `distinct.py` and `dissociated.py` ask
# in rates: every circuit of the same share of the weights, every ability's held-out loss under
# each, item by item against the unpruned model. Circuits are chosen in one shot: scores are means
# over examples, so those of all types of harm together, and of all but one, are means of the scores
# of the types, and one pass over each type's answers serves them all.
#
# With `protected` "benign", a circuit of harm pays the price of benign answers (on your own model also
# of those begun as the harmful ones are), and that of another ability the price of harm; with "none"
# nothing is protected, and only this measures overlap.
#
# Controls: random weights of the same count in every matrix, one mask a seed; the weights of the
# opposite sign; the circuit of benign answers; on your own model, benign answers begun as the
# harmful ones are ("prefilled"), because a circuit of how answers begin could pass for one of harm.
#
# **The rule**, fixed before any run, with benign answers protected. Harm is *general* when the loss
# on harmful answers rises under circuits that never saw their type by at least half of what it
# rises under the circuit of all types, and by an interval above random weights and above what
# benign answers, begun either way, lose under the same circuits. It is *distinct* from another
# ability when each loses more from its own circuit than from the other's, by the intervals. The
# claim *holds* when harm is general and distinct from every other ability shown; *in part* when it
# is general, or distinct from at least half of them, benign answers included; else it *does not
# hold here*. "Begun either way" was added when a study of a real model, whose benign answers had no
# beginning, had found a circuit of the beginning. When the committed rows were made, what is
# protected kept its dearest weights out of reach; since then it has a price, as in the search.

# %%
from support import by_loss
from support.by_loss import ABILITIES, GAP, OPPOSITE, RISE, UNSEEN
from support.claims import FAILS, HOLDS, IN_PART, Claim, Outcome
from support.figures import heatmaps

import harmcircuits as hc

claim = Claim(
    "loss",
    "general and distinct: harm's circuit by loss",
    models=("sft",),
    small={"n_random": 1},
)
HARM, LEAST = "harmful", 0.5  # of the rise under the circuit of all types
TITLES = {"benign": "benign answers protected", "none": "nothing protected"}


# %%
@claim.rule("ladder", "model")
def is_borne_out(rows: hc.Rows) -> Outcome:
    general, distinct = is_general(rows), distinct_from(rows)
    if general and all(distinct.values()):
        return HOLDS
    is_mostly = distinct["benign"] and 2 * sum(distinct.values()) >= len(distinct)
    return IN_PART if general or is_mostly else FAILS


def is_general(rows: hc.Rows) -> bool:
    unseen = rise(rows, UNSEEN, HARM)
    others = [row for row in rows.where(RISE, mask=UNSEEN) if row.labels["of"] != HARM]
    is_above = unseen.low > max(row.high for row in [*others, *randoms(rows)])
    return is_above and unseen.mean >= LEAST * rise(rows, HARM, HARM).mean


def distinct_from(rows: hc.Rows, protected: str = "benign") -> dict[str, bool]:
    """Other ability -> whether harm is distinct from it."""
    gaps = rows.where(GAP, protected=protected)
    distinct = {}
    for gap in gaps.where(of=HARM):
        other = str(gap.labels["against"])
        reverse = gaps.one(of=other, against=HARM)
        distinct[other] = gap.low > 0 and reverse.low > 0
    return distinct


def rise(rows: hc.Rows, mask: str, of: str, protected: str = "benign") -> hc.Measurement:
    return rows.one(RISE, mask=mask, of=of, protected=protected)


def randoms(rows: hc.Rows) -> hc.Rows:
    of_harm = rows.where(RISE, of=HARM)
    return hc.Rows(row for row in of_harm if str(row.labels["mask"]).startswith("random"))


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the random masks.


# %%
@claim.job
def measured(
    model: hc.Model,
    seed: int,
    *,
    size: float = 0.006,
    factor: float = 1.0,
    n_random: int = 3,
) -> hc.Rows:
    """Rises of every loss under every circuit, gaps between circuits, and what circuits share.

    Args:
        size: share of the weights in a circuit, at most.
        factor: what the price of what is protected is multiplied by.
        n_random: random masks.
    """
    model = by_loss.typed(model)
    calibrations = by_loss.calibrations_of(model)
    types = by_loss.shown_types(model, calibrations)
    abilities = [name for name in ABILITIES if name in calibrations]
    unpruned, rows = by_loss.unpruned(model, [HARM, *abilities])

    choice = {"size": size, "factor": factor}
    masks = by_loss.every_mask(model, calibrations, types, abilities, **choice)
    for number in range(seed, seed + n_random):
        masks["benign", f"random {number}"] = hc.random_like(masks["benign", HARM], seed=number)
    for other in abilities:
        where = {"mask": HARM, "of": other, "protected": "none"}
        rows += by_loss.shared_rows(masks["none", HARM], masks["none", other], where)
    for protected in TITLES:
        where = {"protected": protected}
        of_title = {name: mask for (kind, name), mask in masks.items() if kind == protected}
        rises = by_loss.rises_under(model, of_title, unpruned)
        for name, mask in of_title.items():
            of_mask = {**where, "mask": name}
            rows += [hc.Measurement.exact("weights_removed", of_mask, mask.n_removed)]
        rows += by_loss.rise_rows(model, rises, types, where)
        rows += by_loss.gap_rows(model, rises, abilities, where)
    return rows


rows = claim.rows()


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    n_removed = rows.one("weights_removed", protected="benign", mask=HARM).mean
    numbers = {
        "weights, benign answers protected": f"{n_removed:,.0f}",
        "harm loses, to the circuit of all types": f"{rise(rows, HARM, HARM):+.2f}",
        "harm loses, to circuits that never saw its type": f"{rise(rows, UNSEEN, HARM):+.2f}",
        "harm loses, to the opposite sign": f"{rise(rows, OPPOSITE, HARM):+.2f}",
        "harm loses, to random weights, at most": f"{randoms(rows).largest():+.2f}",
        "benign answers lose, to the circuit of all types": f"{rise(rows, HARM, 'benign'):+.2f}",
        "benign answers lose, to the others": f"{rise(rows, UNSEEN, 'benign'):+.2f}",
        "by the rule": "general" if is_general(rows) else "not general",
    }
    for protected, title in TITLES.items():
        for other, is_apart in distinct_from(rows, protected).items():
            outcome = "distinct" if is_apart else "not distinct"
            numbers[f"harm and {other}, {title}"] = outcome
    for row in rows.where("lift"):
        numbers[f"lift of harm and {row.labels['of']}, nothing protected"] = f"{row.mean:.1f}"
    return numbers


claim.result(rows)

# %% [markdown]
# ## Every loss under every circuit
# Rise of the loss on held-out reference answers, nats per token. Lines: circuits removed; columns:
# whose loss.

# %%
for protected, title in TITLES.items():
    of_title = rows.where(RISE, protected=protected)
    panels = {str(name): of_model for name, of_model in of_title.by("model").items()}
    claim.figure(title.capitalize(), heatmaps(panels, x="of", y="mask"))
claim.figures["Nothing protected"]

# %%
claim.main()
