# %% [markdown]
# # F2, F3 and F6 by loss: for your own model
# A judge of free text is coarse and generation is dear; the loss on the model's own verified
# answers is neither. So this asks in nats what `general.py`, `distinct.py` and `dissociated.py` ask
# in rates: every circuit of the same share of the weights, every ability's held-out loss under
# each, item by item against the unpruned model. Circuits are chosen in one shot: scores are means
# over examples, so those of all types of harm together, and of all but one, are means of the scores
# of the types, and one pass over each type's answers serves them all.
#
# With `protected` "benign", a circuit of harm cannot take the weights that benign answers need most
# (on your own model also those begun as the harmful ones are), nor can that of another
# ability take those that harm needs most; with "none" nothing is protected, and only this measures
# overlap.
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
# beginning, had found a circuit of the beginning.

# %%
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from rounds import needed_weights

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.studies.claims import FAILS, HOLDS, IN_PART, Claim, Outcome, in_all
from harmcircuits.views.figures import heatmaps

claim = Claim(
    "loss",
    "general and distinct: harm's circuit by loss",
    models=("sft",),
    small={"n_random": 1},
    together=in_all,
    seeds=1,
)
RISE, UNPRUNED, GAP = "nll_rise", "nll", "nll_gap"
HARM = "harmful"
# Benign answers, begun in their own way and as the harmful ones are.
BENIGN = ("benign", "prefilled")
LEAST = 0.5  # of the rise under the circuit of all types
UNSEEN, OPPOSITE = "all but its type", "opposite sign"
# By the label `protected`.
TITLES = {"benign": "benign answers protected", "none": "nothing protected"}

Losses = Mapping[str, torch.Tensor]  # behaviour -> nats per token of each held-out reference answer


# %% [markdown]
# ## The experiment


# %%
@claim.job
def measured(
    model: Model,
    seed: int,
    *,
    size: float = 0.006,
    protect_share: float = 0.005,
    n_random: int = 3,
) -> Rows:
    """Rises of every loss under every circuit, gaps between circuits, and what circuits share.

    Args:
        size: share of the weights in a circuit.
        protect_share: share of the weights that each protected behaviour keeps out of reach.
        n_random: random masks.
    """
    model = typed(model)
    calibrations = calibrations_of(model)
    types = shown_types(model, calibrations)
    names = [name for name in (*BEHAVIOURS, "prefilled") if name in calibrations]
    abilities = [name for name in names if name != HARM]
    unpruned = losses(model, names)
    rows = Rows()
    for name, nll in unpruned.items():
        where = {"mask": "none", "of": name}
        rows += [Measurement.average(UNPRUNED, where, nll, groups(model, name))]

    shares = {"size": size, "protect_share": protect_share}
    masks = every_mask(model, calibrations, types, abilities, **shares)
    for number in range(seed, seed + n_random):
        masks["benign", f"random {number}"] = hc.random_like(masks["benign", HARM], seed=number)
    for other in abilities:
        shared = overlap(masks["none", HARM], masks["none", other])
        where = {"mask": HARM, "of": other, "protected": "none"}
        rows += [
            Measurement("lift", where, shared.lift, *shared.interval, shared.n_shared),
            Measurement.exact("jaccard", where, shared.jaccard),
        ]
    for protected in TITLES:
        rises = {}
        for (protection, name), mask in masks.items():
            if protection == protected:
                with hc.masked(model.bridge, mask):
                    pruned = losses(model, names)
                rises[name] = {of: nll - unpruned[of] for of, nll in pruned.items()}
        where = {"protected": protected}
        rows += [Measurement.exact("weights_removed", where, masks[protected, HARM].n_removed)]
        rows += rise_rows(model, rises, types, where)
        rows += gap_rows(model, rises, abilities, where)
    return rows


def typed(model: Model) -> Model:
    """The model with every type of harm as a behaviour."""
    return model.with_behaviours(*model.behaviours[HARM].by_category().values())


def calibrations_of(model: Model) -> dict[str, Calibration]:
    """The calibration data of every ability, and of every type of harm."""
    types = model.behaviours[HARM].by_category()
    names = [name for name in (*BEHAVIOURS, "prefilled", *types) if name in model.behaviours]
    return model.calibrations(names)


def shown_types(model: Model, calibrations: Mapping[str, Calibration]) -> list[str]:
    """The types of harm to score on and to measure. Raises ValueError for fewer than two."""
    types = [name for name in model.behaviours[HARM].by_category() if name in calibrations]
    types = [name for name in types if len(model.behaviours[name].references("heldout"))]
    if len(types) < 2:
        raise ValueError(
            f"{model.name}: {len(types)} types of harm are shown; give requests with two "
            "categories or more"
        )
    return types


def losses(model: Model, names: Iterable[str]) -> Losses:
    """The held-out loss of each behaviour's reference answers, the model as it stands."""
    nll = {}
    for name in names:
        behaviour = model.behaviours[name]
        batches = model.batches(behaviour, behaviour.references("heldout"))
        nll[name] = completion_nll(model.bridge, batches)
    return nll


def groups(model: Model, name: str) -> list[str]:
    return [example.cluster for example in model.behaviours[name].references("heldout")]


def every_mask(
    model: Model,
    calibrations: Mapping[str, Calibration],
    types: Sequence[str],
    abilities: Sequence[str],
    *,
    size: float,
    protect_share: float,
) -> dict[tuple[str, str], hc.WeightMask]:
    """(protected, name) -> mask. Names: each type, "all but" each type, all harm, each other
    ability, and the controls.
    """

    def needed(name: str) -> hc.WeightMask:
        return needed_weights(model.bridge, calibrations[name].batches, protect_share)

    of_harm = needed(HARM)
    of_benign = reduce(or_, [needed(name) for name in BENIGN if name in calibrations])
    masks: dict[tuple[str, str], hc.WeightMask] = {}

    def choose(
        name: str,
        scores: WeightScores,
        spared: hc.WeightMask,
        protections: Sequence[str] = tuple(TITLES),
    ) -> None:
        for protected in protections:
            exclude = spared if protected != "none" else None
            mask = hc.top_fraction(scores, size, within="model", exclude=exclude)
            masks[protected, name] = mask

    def scored(name: str) -> WeightScores:
        batches, objective = calibrations[name].batches, model.behaviours[name].objective
        return hc.removal_effect(model.bridge, batches, objective)

    of_types = [scored(type_) for type_ in types]
    sizes = [calibrations[type_].n_verified for type_ in types]
    for number, type_ in enumerate(types):
        others = [size if place != number else 0 for place, size in enumerate(sizes)]
        choose(type_, of_types[number], of_benign, ["benign"])
        choose(f"all but {type_}", mean_scores(of_types, others), of_benign, ["benign"])
    harm = mean_scores(of_types, sizes)
    del of_types
    choose(HARM, harm, of_benign)
    choose(OPPOSITE, -harm, of_benign, ["benign"])
    del harm
    for name in abilities:
        choose(name, scored(name), of_harm)
    return masks


def rise_rows(
    model: Model, rises: Mapping[str, Losses], types: Sequence[str], labels: Labels
) -> Rows:
    """`nll_rise` of each behaviour (`of`) and type of harm under each mask (the keys of `rises`).

    Where circuits leave a type out, besides the rise of each item under the circuit that never saw
    its type, and that of benign answers under the same circuits (their mean).
    """
    type_of = [
        f"{HARM}/{example.category}" for example in model.behaviours[HARM].references("heldout")
    ]
    items = groups(model, HARM)

    def harm_rise(of_places: Mapping[int, torch.Tensor], labels: Labels) -> Measurement:
        values = torch.stack(list(of_places.values()))
        return Measurement.average(RISE, labels, values, [items[place] for place in of_places])

    rows = Rows()
    for mask, under in rises.items():
        where = {**labels, "mask": mask}
        for of, values in under.items():
            rows += [Measurement.average(RISE, {**where, "of": of}, values, groups(model, of))]
        for type_ in types:
            places = [place for place, name in enumerate(type_of) if name == type_]
            of_type = {place: under[HARM][place] for place in places}
            rows += [harm_rise(of_type, {**where, "of": type_})]

    unseen = {type_: rises[f"all but {type_}"] for type_ in types if f"all but {type_}" in rises}
    if unseen:
        where = {**labels, "mask": UNSEEN}
        of_unseen = {}
        for place, type_ in enumerate(type_of):
            if type_ in unseen:
                of_unseen[place] = unseen[type_][HARM][place]
        rows += [harm_rise(of_unseen, {**where, "of": HARM})]
        for name in BENIGN:
            if name in rises[f"all but {types[0]}"]:
                mean = torch.stack([under[name] for under in unseen.values()]).mean(0)
                rows += [
                    Measurement.average(RISE, {**where, "of": name}, mean, groups(model, name))
                ]
    return rows


def gap_rows(
    model: Model, rises: Mapping[str, Losses], abilities: Sequence[str], labels: Labels
) -> Rows:
    """`nll_gap` of an ability (`of`) against another.

    Its loss under its own circuit minus that under the other's.
    """
    rows = Rows()
    for ability in abilities:
        for of, other in ((HARM, ability), (ability, HARM)):
            gap = rises[of][of] - rises[other][of]
            where = {**labels, "of": of, "against": other}
            rows += [Measurement.average(GAP, where, gap, groups(model, of))]
    return rows


rows = claim.rows()

# %% [markdown]
# ## The result


# %%
def rise(rows: Rows, mask: str, of: str, protected: str = "benign") -> Measurement:
    return rows.one(RISE, mask=mask, of=of, protected=protected)


def randoms(rows: Rows, of: str = HARM) -> Rows:
    return Rows(
        row for row in rows.where(RISE, of=of) if str(row.labels["mask"]).startswith("random")
    )


def is_general(rows: Rows) -> bool:
    """The rule's first condition."""
    unseen = rise(rows, UNSEEN, HARM)
    others = [row for row in rows.where(RISE, mask=UNSEEN) if row.labels["of"] != HARM]
    is_above = unseen.low > max(row.high for row in [*others, *randoms(rows)])
    return is_above and unseen.mean >= LEAST * rise(rows, HARM, HARM).mean


def distinct_from(rows: Rows, protected: str = "benign") -> dict[str, bool]:
    """Other ability -> the rule's second condition."""
    gaps = rows.where(GAP, protected=protected)
    distinct = {}
    for gap in gaps.where(of=HARM):
        other = str(gap.labels["against"])
        reverse = gaps.one(of=other, against=HARM)
        distinct[other] = gap.low > 0 and reverse.low > 0
    return distinct


@claim.rule("ladder", "model")
def is_borne_out(rows: Rows) -> Outcome:
    general, distinct = is_general(rows), distinct_from(rows)
    if general and all(distinct.values()):
        return HOLDS
    return IN_PART if general or _is_mostly(distinct) else FAILS


def _is_mostly(distinct: Mapping[str, bool]) -> bool:
    """Distinct from at least half of the abilities, benign answers included."""
    return distinct["benign"] and 2 * sum(distinct.values()) >= len(distinct)


@claim.words
def words(rows: Rows) -> str:
    n_removed = rows.one("weights_removed", protected="benign").mean
    random = max(randoms(rows), key=lambda row: row.mean)
    sentences = [
        f"{n_removed:,.0f} weights, benign answers protected. The loss on harmful answers rises "
        f"by {rise(rows, HARM, HARM):+.2f} under the circuit of all types, by "
        f"{rise(rows, UNSEEN, HARM):+.2f} under circuits that never saw their type, by "
        f"{rise(rows, OPPOSITE, HARM):+.2f} under weights of the opposite sign, by {random:+.2f} "
        f"at most under random ones. Benign answers lose {rise(rows, HARM, 'benign'):+.2f} and "
        f"{rise(rows, UNSEEN, 'benign'):+.2f} under the first two. Harm is "
        f"{'general' if is_general(rows) else 'not general'} by the rule."
    ]
    for protected, title in TITLES.items():
        for other, is_apart in distinct_from(rows, protected).items():
            harm = [rise(rows, mask, HARM, protected) for mask in (HARM, other)]
            of_other = [rise(rows, mask, other, protected) for mask in (other, HARM)]
            sentences.append(
                f"Harm and {other}, {title}: {'distinct' if is_apart else 'not distinct'}. Harm "
                f"loses {harm[0]:+.2f} to its own circuit and {harm[1]:+.2f} to the other's; "
                f"{other} {of_other[0]:+.2f} and {of_other[1]:+.2f}."
            )
    lifts = ", ".join(f"{row.labels['of']} {row:.1f}" for row in rows.where("lift"))
    sentences.append(
        "With nothing protected, harm's circuit shares so many times what chance gives with "
        f"those of: {lifts}."
    )
    return " ".join(sentences)


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
if __name__ == "__main__":
    claim.main()
