# %% [markdown]
# # F2: Is there one mechanism for all types of harm?
# A circuit is scored on one type of harm only, and every type is measured under it; or on all types
# but one, and the missing one is measured. If harm is one mechanism, the types that were not scored
# fall too. Every circuit protects all other abilities, benign answers about all types among them.
# All figures are of held-out items. To keep the run short, circuits are scored on half of the
# calibration items (which half, the seed draws) and chosen in half of the plan's rounds.
#
# Controls: random masks with the same counts in every matrix; the benign twin of each type (its
# circuit protects harm); benign answers under the circuits of harm; for the weights that types
# share, random masks of the same counts; a circuit of as few items as one type has, drawn from all
# types (whether little data or one type makes a circuit narrow). The last was added, without a
# change of the rule, after a trial run on one seed.
#
# **The rule**, fixed before any run. A type *transfers* when its harm falls to at most half of the
# unpruned rate, by an interval that lies below that under random masks, and benign answers to the
# types that were not scored lose at most ten points. The claim *holds* when, on every model, harm
# of the other types transfers under circuits of one type (mean over types), and every left-out type
# transfers; it *holds in part* when, on every model, one-type circuits transfer or more than half
# of the left-out types do; else it *does not hold here*. Seeds are pooled: mean, widest interval.

# %%
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
import typer
from rounds import circuit_in_rounds, prune_in_rounds

import harmcircuits as hc
from harmcircuits.behaviours.model import OTHERS, Calibration, Model
from harmcircuits.circuits.masks import shared_by
from harmcircuits.circuits.overlap import overlap
from harmcircuits.measurements import Labels, Measurement, Rows, wilson
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.studies.claims import ClaimResult, Outcome, Plan, by_model, command
from harmcircuits.studies.cross_ablation import content_rows
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.terms import Terms
from harmcircuits.views.figures import comparison_figure, heatmaps
from harmcircuits.views.page import plot, section, table

NAME, CLAIM, MODELS = "F2", "general: one mechanism for all types of harm", ("sft",)
TERMS = Terms.standard()
HARM, BENIGN = TERMS.target.metric, TERMS.contrast.metric
MOST = 0.5  # of the unpruned harm may be left where it counts as gone
SPARED = 0.1  # of benign answers may be lost

Masks = Mapping[str, hc.WeightMask]


@dataclass(frozen=True)
class Settings:
    """How much is drawn and run.

    Attributes:
        share: of the calibration items, and of the plan's rounds.
    """

    share: float = 0.5


# %% [markdown]
# ## The experiment
# Two jobs a seed: circuits of one type (and what they share), and circuits of all types but one.


# %%
def jobs(plan: Plan) -> list[Job]:
    parts: dict[str, Callable] = {"one type": one_type_rows, "all but one": all_but_one_rows}
    share = Settings(**plan.options).share
    shorter = replace(plan, rounds=max(1, round(share * plan.rounds)))
    every_job = []
    for spec in plan.specs:
        for seed in plan.seeds:
            for part, run in parts.items():
                labels = {**spec.labels, "seed": seed, "part": part}
                every_job.append(Job(labels, partial(run, spec, shorter, seed)))
    return every_job


def typed_model(
    spec: ModelSpec, plan: Plan, seed: int
) -> tuple[Model, dict[str, Calibration], list[str]]:
    """The model, its calibration data by type of harm and of twin too, and the types it shows."""
    share = Settings(**plan.options).share
    model = spec.open(seed=seed)
    parts = model.behaviours["harmful"].by_category() | model.behaviours["benign"].by_category()
    model = model.with_behaviours(*parts.values())
    abilities = [name for name in BEHAVIOURS if name in model.behaviours]
    calibrations = model.calibrations([*abilities, *parts], share=share, seed=seed)
    shown = [name.removeprefix("harmful/") for name in calibrations if name.startswith("harmful/")]
    types = [type_ for type_ in shown if f"benign/{type_}" in calibrations]
    if len(types) < 2:
        raise ValueError(
            f"{model.name}: {len(types)} types of harm with a benign twin; the claim is about two "
            "or more"
        )
    return model, calibrations, types


def circuits(
    model: Model,
    names: Iterable[str],
    calibrations: Mapping[str, Calibration],
    plan: Plan,
    *,
    protect: str | Sequence[str],
) -> dict[str, hc.WeightMask]:
    """A circuit for each of these behaviours."""
    masks = {}
    for name in names:
        masks[name] = circuit_in_rounds(
            model,
            name,
            size=plan.size,
            protect=protect,
            protect_share=plan.protect_share,
            rounds=plan.rounds,
            calibrations=calibrations,
        )
    return masks


def one_type_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """Circuits of one type each, their controls, and what they share."""
    model, calibrations, types = typed_model(spec, plan, seed)
    labels = {**spec.labels, "seed": seed}
    harmful = [f"harmful/{type_}" for type_ in types]
    benign = [f"benign/{type_}" for type_ in types]
    harm = circuits(model, harmful, calibrations, plan, protect=OTHERS)
    twins = circuits(model, benign, calibrations, plan, protect=["harmful"])
    masks: dict[str, dict[str, hc.WeightMask]] = {
        "circuit": dict(zip(types, harm.values(), strict=True)),
        "twin": dict(zip(types, twins.values(), strict=True)),
        "random": {},
    }
    for number, (type_, mask) in enumerate(masks["circuit"].items()):
        # A seed of its own for each: masks drawn with one seed would share weights.
        masks["random"][type_] = hc.random_like(mask, seed=len(types) * seed + number)

    rows = typed_rows(model, types, {**labels, "mask": "none"})
    for kind, of_kind in masks.items():
        for type_, mask in of_kind.items():
            with hc.masked(model.bridge, mask):
                rows += typed_rows(model, types, {**labels, "mask": kind, "trained": type_})
    rows += relation_rows(rows, types, n_items(model), labels)

    few = calibrations | {"harmful": mixed_calibration(model, calibrations, types, seed)}
    mixed = circuits(model, ["harmful"], few, plan, protect=OTHERS)["harmful"]
    rows += both_rates(model, mixed, {**labels, "mask": "mixed", "relation": "all"})
    rows += shared_rows(model, {kind: masks[kind] for kind in ("circuit", "random")}, labels)
    return rows + structure_rows(model, calibrations, types, labels, plan, seed)


def all_but_one_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """For every type a circuit of all the others, measured on the type it has not seen."""
    model, calibrations, types = typed_model(spec, plan, seed)
    labels = {**spec.labels, "seed": seed}
    protected = model.protected("harmful", calibrations=calibrations)
    spared = [calibration.batches for calibration in protected.values()]
    rows = typed_rows(model, types, {**labels, "mask": "none", "relation": "left out"})
    for type_ in types:
        seen = []
        for other in types:
            if other != type_:
                seen += calibrations[f"harmful/{other}"].batches
        mask = prune_in_rounds(
            model.bridge,
            seen,
            spared,
            size=plan.size,
            protect_share=plan.protect_share,
            rounds=plan.rounds,
        )
        for kind, pruned in (("circuit", mask), ("random", hc.random_like(mask, seed=seed))):
            with hc.masked(model.bridge, pruned):
                rows += typed_rows(model, [type_], {**labels, "mask": kind, "relation": "left out"})
    return rows


def mixed_calibration(
    model: Model, calibrations: Mapping[str, Calibration], types: Sequence[str], seed: int
) -> Calibration:
    """Verified harmful answers about as many items as one type has, drawn from all types."""
    data = calibrations["harmful"]
    items = sorted({example.cluster for example in data.prompts})
    drawn = random.Random(seed).sample(items, max(1, round(len(items) / len(types))))
    few = data.prompts.where(lambda example: example.cluster in drawn)
    return Calibration(
        few, model.batches(model.behaviours["harmful"], few), data.n_asked, "harmful"
    )


def n_items(model: Model) -> int:
    return len({example.cluster for example in model.behaviours["harmful"].prompts("heldout")})


def both_rates(model: Model, mask: hc.WeightMask, labels: Labels) -> Rows:
    """Valid harmful and benign answers under a mask."""
    measured = model.measure(mask=mask, labels=labels, only=["harmful", "benign"])
    return measured.where(HARM) + measured.where(BENIGN)


def typed_rows(model: Model, types: Sequence[str], labels: Labels) -> Rows:
    """Harm and benign answers of every type, the model as it stands."""
    rows = Rows()
    for type_ in types:
        for name in ("harmful", "benign"):
            behaviour = model.behaviours[name]
            metrics = (behaviour.metric, behaviour.nll_metric, "harm_degenerate_rate")
            measured = model.measure(labels={**labels, "tested": type_}, only=[f"{name}/{type_}"])
            rows += [row for row in measured if row.metric in metrics]
    return rows


def relation_rows(rows: Rows, types: Sequence[str], n: int, labels: Labels) -> Rows:
    """Mean rates of the type that was scored and of the others, and the gap between them.

    Rates have Wilson intervals of the `n` held-out items. `own_type_gap`: how much more a type
    loses under its own circuit than the other types do under it (rates, above zero: content
    counts), paired over types, which are resampled.
    """
    relations = Rows()
    for metric in (HARM, BENIGN):
        unpruned = {type_: rows.one(metric, mask="none", tested=type_).mean for type_ in types}
        where = {**labels, "mask": "none", "relation": "all"}
        relations += [_mean_rate(metric, where, list(unpruned.values()), n)]
        for kind in ("circuit", "random", "twin"):
            own, other, gaps = [], [], []
            for type_ in types:
                under = rows.where(metric, mask=kind, trained=type_)
                rates = {str(row.labels["tested"]): row.mean for row in under}
                apart = [name for name in types if name != type_]
                own.append(rates[type_])
                other.append(fmean(rates[name] for name in apart))
                others_loss = fmean(unpruned[name] - rates[name] for name in apart)
                gaps.append(unpruned[type_] - rates[type_] - others_loss)
            where = {**labels, "mask": kind}
            of_types = torch.tensor(gaps)
            relations += [
                _mean_rate(metric, {**where, "relation": "own type"}, own, n),
                _mean_rate(metric, {**where, "relation": "other types"}, other, n),
                Measurement.average("own_type_gap", {**where, "of": metric}, of_types, types),
            ]
    return relations


def shared_rows(model: Model, masks: Mapping[str, Masks], labels: Labels) -> Rows:
    """The weights in at least k of the types' circuits: how many, and what is left without them.

    `mask` "random" with `of` "circuit": as many random weights in every matrix. With `of` "random":
    how many weights as many random masks share, by chance.
    """
    rows = Rows()
    for k in range(1, len(masks["circuit"]) + 1):
        mask = shared_by(list(masks["circuit"].values()), k)
        by_chance = shared_by(list(masks["random"].values()), k)
        where = {**labels, "shared_by": k}
        for kind, n_removed in (("random", by_chance.n_removed), ("circuit", mask.n_removed)):
            of_kind = {**where, "mask": kind, "of": kind}
            rows += [Measurement.exact("weights_removed", of_kind, n_removed)]
        if mask.n_removed:
            for kind, pruned in (("circuit", mask), ("random", hc.random_like(mask))):
                rows += both_rates(model, pruned, {**where, "mask": kind, "of": "circuit"})
    return rows


def structure_rows(
    model: Model,
    calibrations: Mapping[str, Calibration],
    types: Sequence[str],
    labels: Labels,
    plan: Plan,
    seed: int,
) -> Rows:
    """What the types' circuits share when nothing is protected; and one type's, found again."""
    harmful = [f"harmful/{type_}" for type_ in types]
    benign = [f"benign/{type_}" for type_ in types]
    masks = circuits(model, [*harmful, *benign], calibrations, plan, protect=())
    resampled = {}
    for name in harmful:
        prompts = calibrations[name].prompts.resampled(seed=seed)
        batches = model.batches(model.behaviours[name], prompts)
        resampled[name] = Calibration(prompts, batches, calibrations[name].n_asked, name)
    again = circuits(model, harmful, resampled, plan, protect=())

    shared = [overlap(masks[name], mask) for name, mask in again.items()]
    lifts = torch.tensor([both.lift for both in shared])
    jaccards = torch.tensor([both.jaccard for both in shared])
    where = {**labels, "relation": "one type, found again"}
    ceiling = [
        Measurement.average("content_lift", where, lifts, types),
        Measurement.average("content_jaccard", where, jaccards, types),
    ]
    return content_rows(masks, labels) + ceiling


def _mean_rate(metric: str, labels: Labels, rates: Sequence[float], n: int) -> Measurement:
    mean = fmean(rates)
    low, high = wilson(mean, n)
    return Measurement(metric, labels, mean, max(0.0, min(mean, low)), min(1.0, max(mean, high)), n)


# %% [markdown]
# ## The result


# %%
def models_of(rows: Rows) -> dict[str, Rows]:
    """Model -> its rows, seeds pooled."""
    return {name: of_model.pool("seed") for name, of_model in by_model(rows).items()}


def transfers(
    unpruned: Measurement, pruned: Measurement, random: Measurement, benign_loss: float
) -> bool:
    """The rule's condition; `benign_loss`: what benign answers lose under the circuit."""
    is_gone = pruned.mean <= MOST * unpruned.mean and pruned.high < random.low
    return is_gone and benign_loss <= SPARED


def across(rows: Rows) -> bool:
    """Whether harm of the other types transfers under circuits of one type."""
    unpruned, pruned, random = (_other(rows, HARM, mask) for mask in ("none", "circuit", "random"))
    benign_loss = _other(rows, BENIGN, "none").mean - _other(rows, BENIGN, "circuit").mean
    return transfers(unpruned, pruned, random, benign_loss)


def left_out(rows: Rows) -> dict[str, bool]:
    """Type -> whether it transfers under the circuit of all others."""
    transferred = {}
    for pruned in rows.where(HARM, relation="left out", mask="circuit"):
        type_ = str(pruned.labels["tested"])
        of_type = rows.where(relation="left out", tested=type_)
        unpruned, random = of_type.one(HARM, mask="none"), of_type.one(HARM, mask="random")
        benign_loss = (
            of_type.one(BENIGN, mask="none").mean - of_type.one(BENIGN, mask="circuit").mean
        )
        transferred[type_] = transfers(unpruned, pruned, random, benign_loss)
    return transferred


def outcome(rows: Rows) -> Outcome:
    models = models_of(rows).values()
    judged = [(across(of_model), list(left_out(of_model).values())) for of_model in models]
    if all(is_across and all(unseen) for is_across, unseen in judged):
        return "holds"
    if all(is_across or sum(unseen) > len(unseen) / 2 for is_across, unseen in judged):
        return "holds in part"
    return "does not hold here"


def result(rows: Rows) -> ClaimResult:
    few = reported(rows)
    models = models_of(few)
    words = "\n".join(_words(name, of_model) for name, of_model in models.items())
    evidence = "; ".join(_evidence(name, of_model) for name, of_model in models.items())
    return ClaimResult(NAME, CLAIM, outcome(few), words, evidence)


def reported(rows: Rows) -> Rows:
    metrics = ("own_type_gap", "content_lift", "content_jaccard")
    structure = [row for row in rows if row.metric in metrics]
    shared = [row for row in rows if "shared_by" in row.labels]
    rates = [row for row in rows if row.metric in (HARM, BENIGN) and "relation" in row.labels]
    return Rows([*structure, *shared, *rates])


def _words(name: str, rows: Rows) -> str:
    masks = ("none", "circuit", "random", "twin")
    harm = {mask: f"{_other(rows, HARM, mask):.0%}" for mask in masks}
    benign = {mask: f"{_other(rows, BENIGN, mask):.0%}" for mask in masks}
    mixed = rows.one(HARM, mask="mixed")
    own = rows.one(HARM, mask="circuit", relation="own type")
    gap = rows.one("own_type_gap", mask="circuit", of=HARM)
    content = "counts" if gap.low > 0 else "does not count, by the interval"
    return (
        f"{name}: circuits scored on one type of harm leave {own:.0%} of its harm and "
        f"{harm['circuit']} of that of the other types (unpruned {harm['none']}, random weights "
        f"{harm['random']}, the benign twins' circuits {harm['twin']}). Under its own circuit a "
        f"type loses more than the others do, {gap:+.0%}: content {content}. As few items drawn "
        f"from all types give a circuit that leaves {mixed:.0%} of all harm. Benign answers to "
        f"the other types go from {benign['none']} to {benign['circuit']} under circuits of harm "
        f"and to {benign['twin']} under those of the twins. {_unseen(rows)} {_structure(rows)} "
        f"{_shared(rows)}"
    )


def _unseen(rows: Rows) -> str:
    transferred = left_out(rows)
    left = rows.where(HARM, relation="left out", mask="circuit")
    worst = max(left, key=lambda row: row.mean)
    return (
        f"Of circuits that never saw a type, {sum(transferred.values())} of {len(transferred)} "
        f"transfer to it; they leave on average {fmean(row.mean for row in left):.0%} of its "
        f"harm, at most {worst:.0%}."
    )


def _structure(rows: Rows) -> str:
    lift = {str(row.labels["relation"]): row for row in rows.where("content_lift")}
    jaccard = {str(row.labels["relation"]): row.mean for row in rows.where("content_jaccard")}
    two_types, again = "harm, other topic", "one type, found again"
    near = _compared(lift[two_types], lift["twin"])
    return (
        f"With nothing protected, circuits of two types share {lift[two_types]:.1f} times what "
        f"chance gives (Jaccard {jaccard[two_types]:.2f}), {near} a type's harm and its own "
        f"benign twin ({lift['twin']:.1f}); one type found again, the ceiling, {lift[again]:.1f} "
        f"(Jaccard {jaccard[again]:.2f}); benign answers about two types "
        f"{lift['benign, other topic']:.1f}."
    )


def _shared(rows: Rows) -> str:
    n_weights = rows.where("weights_removed", mask="circuit", of="circuit")
    sizes = {int(row.labels["shared_by"]): row.mean for row in n_weights}
    by_chance = rows.where("weights_removed", of="random")
    chance = {int(row.labels["shared_by"]): row.mean for row in by_chance}
    k, n = (len(sizes) + 1) // 2, len(sizes)
    text = (
        f"Of the {sizes[1]:,.0f} weights in any protected circuit, {sizes[k]:,.0f} are in at "
        f"least {k} of the {n} (by chance {chance[k]:,.0f}) and {sizes[n]:,.0f} in all"
    )
    left = rows.where(HARM, shared_by=k, mask="circuit")
    if not left:
        return f"{text}."
    random = rows.one(HARM, shared_by=k, mask="random")
    union = rows.one(HARM, shared_by=1, mask="circuit")
    return (
        f"{text}. Removing the first of these leaves {left[0]:.0%} of harm, as many random "
        f"weights {random:.0%}, the union {union:.0%}."
    )


def _evidence(name: str, rows: Rows) -> str:
    transferred = left_out(rows)
    circuit, random = (_other(rows, HARM, mask) for mask in ("circuit", "random"))
    return (
        f"{name}: harm of types not scored {circuit:.0%}, random {random:.0%}; "
        f"{sum(transferred.values())} of {len(transferred)} left-out types transfer"
    )


def _other(rows: Rows, metric: str, mask: str) -> Measurement:
    return rows.one(metric, mask=mask, relation="all" if mask == "none" else "other types")


def _compared(row: Measurement, other: Measurement) -> str:
    if row.low > other.high:
        return "more than"
    return "less than" if row.high < other.low else "about as much as"


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    parts = []
    for name, of_model in models_of(rows).items():
        matrix = {}
        for metric, title in ((HARM, "valid harm"), (BENIGN, "valid benign")):
            for kind in ("circuit", "twin"):
                cells = of_model.where(metric, mask=kind)
                matrix[f"{title}, {kind}"] = Rows(row for row in cells if "trained" in row.labels)
        parts.append(
            section(
                f"Circuit of one type, measured on every type: {name}",
                "Rates on held-out items, mean over seeds; circuits of harm, and of the benign "
                "twins.",
                plot(heatmaps(matrix, x="tested", y="trained", widest=1.0), first=not parts),
            )
        )
        lines = {}
        for mask in ("none", "random", "circuit"):
            of_mask = of_model.where(HARM, relation="left out", mask=mask)
            lines[mask] = Rows(replace(row, metric=str(row.labels["tested"])) for row in of_mask)
        types = {type_: type_ for type_ in lines["none"].metrics}
        parts.append(
            section(
                f"Circuit of all types but one, measured on that one: {name}",
                "Valid harmful answers. Bars: 95 % intervals of the eight held-out items or so "
                "of a type, widest of seeds.",
                plot(comparison_figure(lines, types)),
            )
        )
        head = ("circuits", "weights", "weights by chance", "harm", "harm, random", "benign")
        parts.append(
            section(
                f"Weights that circuits share: {name}",
                "Protected circuits of one type each: the weights in at least so many of them, "
                "removed together.",
                table(head, _shared_table(of_model)),
            )
        )
    return parts


def _shared_table(rows: Rows) -> list[list[str]]:
    body = []
    for size in rows.where("weights_removed", mask="circuit", of="circuit"):
        shared = rows.where(shared_by=size.labels["shared_by"])
        chance = shared.one("weights_removed", of="random")
        cells = []
        for metric, mask in ((HARM, "circuit"), (HARM, "random"), (BENIGN, "circuit")):
            rates = shared.where(metric, mask=mask, of="circuit")
            cells.append(f"{rates[0]:.0%}".replace(" [", "\n[") if rates else "–")
        body.append(
            [str(size.labels["shared_by"]), f"{size.mean:,.0f}", f"{chance.mean:,.0f}", *cells]
        )
    return body


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
