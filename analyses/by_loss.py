# %% [markdown]
# # F2, F3 and F6 by loss: for a model of one's own
# A judge of free text is coarse and generation is dear; the loss on the model's own verified answers is neither. So this
# asks in nats what `general.py`, `distinct.py` and `dissociated.py` ask in rates: every circuit of the same share of the
# weights, every ability's held-out loss under each, item by item against the unpruned model. Circuits are chosen in one
# shot: scores are means over examples, so those of all types of harm together, and of all but one, are means of the scores
# of the types, and one pass over each type's answers serves them all.
#
# With `protected` "benign", a circuit of harm cannot take the weights that benign answers need most (on a model of one's
# own also those begun as the harmful ones are), nor can that of another ability take those that harm needs most; with
# "none" nothing is protected, and only this measures overlap.
#
# Controls: random weights of the same count in every matrix, one mask a seed; the weights of the opposite sign; the circuit
# of benign answers; on a model of one's own, benign answers begun as the harmful ones are ("prefilled"), because a circuit
# of how answers begin could pass for one of harm.
#
# **The rule**, fixed before any run, with benign answers protected. Harm is *general* when the loss on harmful answers
# rises under circuits that never saw their type by at least half of what it rises under the circuit of all types, and by an
# interval above random weights and above what benign answers, begun either way, lose under the same circuits. It is
# *distinct* from another ability when each loses more from its own circuit than from the other's, by the intervals. The
# claim *holds* when harm is general and distinct from every other ability shown; *in part* when it is general, or distinct
# from at least half of them, benign answers included; else it *does not hold here*. "Begun either way" was added when a
# study of a real model, whose benign answers had no beginning, had found a circuit of the beginning.

# %%
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import or_

import torch
import typer

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.search import protected_weights
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies.claims import ClaimResult, Plan, Verdict, by_model, command
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.figures import heatmaps
from harmcircuits.views.page import plot, section
from harmcircuits.views.tables import METRICS

NAME, CLAIM, MODELS = "Loss", "general and distinct: harm's circuit by loss", ("sft",)
RISE, UNPRUNED, GAP = "nll_rise", "nll", "nll_gap"
HARM = "harmful"
LEAST = 0.5  # of the rise under the circuit of all types
UNSEEN, OPPOSITE = "all but its type", "opposite sign"
TITLES = {"benign": "benign answers protected", "none": "nothing protected"}  # by the label `protected`

Losses = Mapping[str, torch.Tensor]  # behaviour -> nats per token of each held-out reference answer


# %% [markdown]
# ## The experiment


# %%
def jobs(plan: Plan) -> list[Job]:
    return [Job(spec.labels, partial(measured, spec, plan)) for spec in plan.specs]


def measured(spec: ModelSpec, plan: Plan) -> Rows:
    """Rises of every loss under every circuit, gaps between pairs of circuits, and what circuits share."""
    model = typed(spec.open(seed=plan.seeds[0]))
    calibrations = model.calibrations()
    types = shown_types(model, calibrations)
    abilities = [name for name in (*METRICS, "prefilled") if name in calibrations and name != HARM]
    whole = losses(model, [HARM, *abilities])
    rows = [
        Measurement.average(UNPRUNED, {**spec.labels, "mask": "none", "of": name}, nll, groups(model, name))
        for name, nll in whole.items()
    ]
    masks = every_mask(model, calibrations, types, abilities, plan)
    free = {mask: masks["none", mask] for mask in (HARM, *abilities)}
    for other in abilities:
        found = overlap(free[HARM], free[other])
        where = {**spec.labels, "mask": HARM, "of": other, "protected": "none"}
        rows.append(Measurement("lift", where, found.lift, *found.interval, found.n_shared))
        rows.append(Measurement.exact("jaccard", where, found.jaccard))
    for protected in TITLES:
        under = {}
        for (how, name), mask in masks.items():
            if how == protected:
                with hc.masked(model.bridge, mask):
                    under[name] = {of: nll - whole[of] for of, nll in losses(model, whole).items()}
        where = {**spec.labels, "protected": protected}
        rows.append(Measurement.exact("weights_removed", where, masks[protected, HARM].n_removed))
        rows += rise_rows(model, under, types, where) + gap_rows(model, under, abilities, where)
    return rows


def typed(model: Model) -> Model:
    """The subject with every type of harm as a behaviour."""
    return replace(model, behaviours={**model.behaviours, **model.behaviours[HARM].by_category()})


def shown_types(model: Model, calibrations: Mapping[str, Calibration]) -> list[str]:
    """The types of harm to score on and to measure. Raises ValueError for fewer than two."""
    types = [name for name in model.behaviours[HARM].by_category() if name in calibrations]
    types = [name for name in types if len(model.behaviours[name].references("heldout"))]
    if len(types) < 2:
        raise ValueError(f"{model.name}: {len(types)} types of harm are shown; give requests with two categories or more")
    return types


def losses(model: Model, names: Iterable[str]) -> Losses:
    """The held-out loss of each behaviour's reference answers, the model as it stands."""
    behaviours = [model.behaviours[name] for name in names]
    return {one.name: completion_nll(model.bridge, model.batches(one, one.references("heldout"))) for one in behaviours}


def groups(model: Model, name: str) -> list[str]:
    return [one.cluster for one in model.behaviours[name].references("heldout")]


def every_mask(
    model: Model, calibrations: Mapping[str, Calibration], types: Sequence[str], abilities: Sequence[str], plan: Plan
) -> dict[tuple[str, str], hc.WeightMask]:
    """(protected, name) -> mask. Names: each type, "all but" each type, all harm, each other ability, and the controls."""
    needed = {
        name: protected_weights(model.bridge, calibrations[name].batches, plan.p)
        for name in (HARM, "benign", "prefilled")
        if name in calibrations
    }
    of_harm = needed.pop(HARM)
    of_benign = reduce(or_, needed.values())
    found: dict[tuple[str, str], hc.WeightMask] = {}

    def choose(name: str, scores: WeightScores, kept: hc.WeightMask, protections: Sequence[str] = tuple(TITLES)) -> None:
        for protected in protections:
            exclude = kept if protected != "none" else None
            found[protected, name] = hc.top_fraction(scores, plan.q, within="model", exclude=exclude)

    def scored(name: str) -> WeightScores:
        return hc.removal_effect(model.bridge, calibrations[name].batches, model.behaviours[name].objective)

    of_types, sizes = [scored(one) for one in types], [calibrations[one].n_verified for one in types]
    for number, one in enumerate(types):
        others = [size if place != number else 0 for place, size in enumerate(sizes)]
        choose(one, of_types[number], of_benign, ["benign"])
        choose(f"all but {one}", mean_scores(of_types, others), of_benign, ["benign"])
    harm = mean_scores(of_types, sizes)
    del of_types
    choose(HARM, harm, of_benign)
    choose(OPPOSITE, -harm, of_benign, ["benign"])
    del harm
    for name in abilities:
        choose(name, scored(name), of_harm)
    for seed in plan.seeds:
        found["benign", f"random {seed}"] = hc.random_like(found["benign", HARM], seed=seed)
    return found


def rise_rows(model: Model, under: Mapping[str, Losses], types: Sequence[str], labels: Labels) -> Rows:
    """`nll_rise` of each behaviour (`of`) and each type of harm under each mask.

    Where circuits leave a type out, besides the rise of each item under the circuit that never saw its type, and that of
    benign answers under the same circuits (their mean).
    """
    type_of = [f"{HARM}/{one.category}" for one in model.behaviours[HARM].references("heldout")]
    items = groups(model, HARM)
    rows = []

    def harm_rise(rises: Mapping[int, torch.Tensor], labels: Labels) -> Measurement:
        return Measurement.average(RISE, labels, torch.stack(list(rises.values())), [items[place] for place in rises])

    for mask, rises in under.items():
        where = {**labels, "mask": mask}
        rows += [Measurement.average(RISE, {**where, "of": of}, values, groups(model, of)) for of, values in rises.items()]
        for one in types:
            mine = {place: rises[HARM][place] for place, name in enumerate(type_of) if name == one}
            rows.append(harm_rise(mine, {**where, "of": one}))
    unseen = {one: under[f"all but {one}"] for one in types if f"all but {one}" in under}
    if unseen:
        where = {**labels, "mask": UNSEEN}
        of_others = {place: unseen[name][HARM][place] for place, name in enumerate(type_of) if name in unseen}
        rows.append(harm_rise(of_others, {**where, "of": HARM}))
        for name in ("benign", "prefilled"):
            if name in under[f"all but {types[0]}"]:
                mean = torch.stack([rises[name] for rises in unseen.values()]).mean(0)
                rows.append(Measurement.average(RISE, {**where, "of": name}, mean, groups(model, name)))
    return rows


def gap_rows(model: Model, under: Mapping[str, Losses], abilities: Sequence[str], labels: Labels) -> Rows:
    """`nll_gap` of an ability (`of`) against another: its loss under its own circuit minus that under the other's."""
    pairs = [pair for other in abilities for pair in ((HARM, other), (other, HARM))]
    return [
        Measurement.average(GAP, {**labels, "of": of, "against": other}, under[of][of] - under[other][of], groups(model, of))
        for of, other in pairs
    ]


# %% [markdown]
# ## The finding


# %%
def rise(mine: Rows, mask: str, of: str, protected: str = "benign") -> Measurement:
    return mine.where(RISE, mask=mask, of=of, protected=protected)[0]


def randoms(mine: Rows, of: str = HARM) -> Rows:
    return [row for row in mine.where(RISE, of=of) if str(row.labels["mask"]).startswith("random")]


def is_general(mine: Rows) -> bool:
    """The rule's first condition."""
    unseen = rise(mine, UNSEEN, HARM)
    others = [row for row in mine.where(RISE, mask=UNSEEN) if row.labels["of"] != HARM]
    above = unseen.low > max(row.high for row in [*others, *randoms(mine)])
    return above and unseen.mean >= LEAST * rise(mine, HARM, HARM).mean


def distinct_from(mine: Rows, protected: str = "benign") -> dict[str, bool]:
    """Other ability -> the rule's second condition."""
    gaps = mine.where(GAP, protected=protected)
    others = [str(row.labels["against"]) for row in gaps if row.labels["of"] == HARM]
    return {
        other: all(row.low > 0 for row in gaps if {row.labels["of"], row.labels["against"]} == {HARM, other})
        for other in others
    }


def verdict(rows: Rows) -> Verdict:
    judged = [(is_general(mine), distinct_from(mine)) for mine in by_model(rows).values()]
    if all(general and all(apart.values()) for general, apart in judged):
        return "holds"
    if all(general or (apart["benign"] and 2 * sum(apart.values()) >= len(apart)) for general, apart in judged):
        return "holds in part"
    return "does not hold here"


def finding(rows: Rows) -> ClaimResult:
    models = by_model(rows)
    said = {name: _words(mine) for name, mine in models.items()}
    words = "\n".join("\n".join([f"{name}: {first}", *others]) for name, (first, *others) in said.items())
    evidence = "; ".join(f"{name}: {_evidence(mine)}" for name, mine in models.items())
    return ClaimResult(NAME, CLAIM, verdict(rows), words, evidence)


def needed(rows: Rows) -> Rows:
    return list(rows)


def _words(mine: Rows) -> list[str]:
    removed = mine.where("weights_removed", protected="benign")[0].mean
    random = max(randoms(mine), key=lambda row: row.mean)
    said = [
        f"{removed:,.0f} weights, benign answers protected. The loss on harmful answers rises by {_rise(mine, HARM, HARM)} "
        f"under the circuit of all types, by {_rise(mine, UNSEEN, HARM)} under circuits that never saw their type, by "
        f"{_rise(mine, OPPOSITE, HARM)} under weights of the opposite sign, by {_nats(random)} at most under random ones. "
        f"Benign answers lose {_rise(mine, HARM, 'benign')} and {_rise(mine, UNSEEN, 'benign')} under the first two. "
        f"Harm is {'general' if is_general(mine) else 'not general'} by the rule."
    ]
    for protected, words in TITLES.items():
        for other, is_apart in distinct_from(mine, protected).items():
            said.append(
                f"Harm and {other}, {words}: {'distinct' if is_apart else 'not distinct'}. Harm loses "
                f"{_rise(mine, HARM, HARM, protected)} to its own circuit and {_rise(mine, other, HARM, protected)} to the "
                f"other's; {other} {_rise(mine, other, other, protected)} and {_rise(mine, HARM, other, protected)}."
            )
    lifts = ", ".join(f"{row.labels['of']} {row.mean:.1f} [{row.low:.1f}, {row.high:.1f}]" for row in mine.where("lift"))
    said.append(f"With nothing protected, harm's circuit shares so many times what chance gives with those of: {lifts}.")
    return said


def _evidence(mine: Rows) -> str:
    apart = [name for name, is_apart in distinct_from(mine).items() if is_apart]
    return (
        f"harm {_rise(mine, HARM, HARM)}, of types not seen {_rise(mine, UNSEEN, HARM)}, benign "
        f"{_rise(mine, HARM, 'benign')}; distinct from {', '.join(apart) or 'none'}"
    )


def _rise(mine: Rows, mask: str, of: str, protected: str = "benign") -> str:
    return _nats(rise(mine, mask, of, protected))


def _nats(row: Measurement) -> str:
    return f"{row.mean:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    text = "Rise of the loss on held-out reference answers, nats per token. Lines: circuits removed; columns: whose loss."
    found = []
    for protected, words in TITLES.items():
        panels = {name: mine.where(RISE, protected=protected) for name, mine in by_model(rows).items()}
        figure = heatmaps(panels, x="of", y="mask")
        found.append(section(f"Every loss under every circuit, {words}", text, plot(figure, first=not found)))
    return found


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
